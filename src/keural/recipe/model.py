"""Shape of the network."""

from typing import Self

from pydantic import Field, model_validator

from keural.recipe.base import Spec


class ModelSpec(Spec):
    """Shape of the network; the defaults are the published 14.83B model."""

    hidden_size: int = Field(4096, gt=0, le=1_000_000)
    """Width of the residual stream; a multiple of 8."""
    intermediate_size: int = Field(5632, gt=0, le=1_000_000)
    """Width of one expert."""
    num_hidden_layers: int = Field(24, gt=0, le=10_000)
    """Blocks of attention and experts; even ones (the first is 0) see a sliding window, odd ones everything."""
    num_attention_heads: int = Field(32, gt=0, le=10_000)
    """Query heads; a multiple of num_key_value_heads."""
    num_key_value_heads: int = Field(8, gt=0, le=10_000)
    """Key and value heads, each shared by as many query heads as there are for it."""
    head_dim: int = Field(128, gt=0, le=10_000)
    """Width of one attention head; even."""
    num_local_experts: int = Field(8, gt=0, le=10_000)
    """Experts of a block."""
    num_experts_per_tok: int = Field(2, gt=0)
    """Experts that work on one token: those of highest router probability."""
    sliding_window: int = Field(513, gt=0)
    """Keys a token of a sliding (even) layer sees, itself included."""
    max_position_embeddings: int = Field(4096, gt=0, le=100_000_000)
    """Longest context in tokens; no stage may have longer rows."""
    rope_theta: float = Field(500_000.0, gt=0)
    """Base of the rotary embedding's wavelengths; larger turns slower and reaches farther."""
    rms_norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square before its root in every norm."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of random weights at the start."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError("num_experts_per_tok cannot exceed num_local_experts")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even (rotary embedding turns pairs)")
        if self.hidden_size % 8 or self.intermediate_size % 8:
            raise ValueError("hidden_size and intermediate_size must be multiples of 8 (grouped products need aligned rows)")
        return self
