"""Configuration of the Keural mixture-of-experts language model, and its parameter count in closed form.

In: keyword arguments or a ``config.json``. Out: a validated `KeuralConfig`, the single description of the network that the
modelling file, the planner and the exporters read. The file needs nothing of the `keural` package: it is copied next to
exported weights and loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

from dataclasses import field
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedConfig

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"

PUBLISHED_IM_END_ID = 131_073
"""Id of ``<|im_end|>`` in the published vocabulary of 131,074 pieces (the last one)."""
PUBLISHED_BASE_VOCABULARY = 131_072
"""Size of the published vocabulary before the two ChatML ids were added; its texts end with ``</s>``, id 2."""
_LARGEST_SIZE = 2**31
"""No size is this large; a configuration that says so is damaged."""


def _expert_parallel_plan() -> dict[str, str]:
    """Expert-parallel plan in the words of the installed transformers, which renamed its styles after 5.17."""
    plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
    }
    if find_spec("transformers.distributed.expert_parallel") is not None:
        return {**plan, "layers.*.mlp.experts": "ep_dispatch_experts"}
    return {"layers.*.mlp.gate": "ep_router", **plan, "layers.*.mlp.experts": "moe_tp_experts"}


class KeuralConfig(PreTrainedConfig):
    """Shape and constants of a Keural model; the defaults are the published 14.83B model with ChatML ids.

    Every layer is attention plus a mixture of experts; there are no biases, no dropout, no shared expert and no query or
    key normalisation. Fields whose meaning is not in their name:

    - ``intermediate_size``: width of one expert.
    - ``head_dim``: width of one attention head; None stands for ``hidden_size / num_attention_heads``.
    - ``sliding_window``: keys a token of a sliding layer sees, itself included. The published training code lets a token
      see itself and 512 earlier ones, hence 513.
    - ``layer_types``: ``"sliding_attention"`` or ``"full_attention"`` for each layer; empty stands for sliding on the even
      layers (0, 2, ...) and full on the odd ones, or full everywhere when ``sliding_window`` is None.
    - ``rope_parameters``: ``{"rope_type", "rope_theta"}`` as everywhere in transformers 5; a ``rope_theta`` argument is
      accepted and moved there.
    - ``eos_token_id``: ``<|im_end|>``, 131,073. When the vocabulary is smaller and nothing else is asked for, the last id,
      where this project's tokenizers keep ``<|im_end|>``; for the published vocabulary without ChatML ids ``</s>``, 2.
    - ``router_aux_loss_coef``, ``router_z_loss_coef``: weights of the two router losses, see `router_losses` of the modelling
      file.

    Raises:
        ValueError: for a combination that no network can have.
    """

    model_type = "keural"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    default_theta = 500_000.0

    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = _expert_parallel_plan()
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 131_074
    hidden_size: int = 4096
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    sliding_window: int | None = 513
    layer_types: list[str] = field(default_factory=list)
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.02
    router_z_loss_coef: float = 0.001
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = PUBLISHED_IM_END_ID

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_numbers()
        if self.head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}); give head_dim",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.layer_types:
            even = FULL_ATTENTION if self.sliding_window is None else SLIDING_ATTENTION
            self.layer_types = [FULL_ATTENTION if layer % 2 else even for layer in range(self.num_hidden_layers)]
        if self.eos_token_id == PUBLISHED_IM_END_ID and self.vocab_size <= PUBLISHED_IM_END_ID:
            self.eos_token_id = 2 if self.vocab_size == PUBLISHED_BASE_VOCABULARY else self.vocab_size - 1
        super().__post_init__(**kwargs)
        self._check_architecture()

    def _check_numbers(self) -> None:
        """Refuse sizes below one, before anything is derived from them."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "num_local_experts",
            "num_experts_per_tok",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value < _LARGEST_SIZE, f"{name} must be a whole number below 2^31, got {value!r:.40}")
            _require(value >= 1, f"{name} must be at least 1, got {value}")

    def _check_architecture(self) -> None:
        """Refuse combinations that cannot be built or that would silently mean something else."""
        types = self.layer_types
        known = {FULL_ATTENTION, SLIDING_ATTENTION}
        _require(
            len(types) == self.num_hidden_layers,
            f"layer_types has {len(types)} entries for num_hidden_layers = {self.num_hidden_layers}",
        )
        _require(set(types) <= known, f"layer_types must be of {sorted(known)}, got {sorted(set(types) - known)}")
        _require(
            SLIDING_ATTENTION not in types or (self.sliding_window is not None and self.sliding_window >= 1),
            f"sliding layers need sliding_window of at least 1, got {self.sliding_window}",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        _require(
            self.head_dim is not None and self.head_dim >= 2 and self.head_dim % 2 == 0,
            f"head_dim must be even (rotary embedding turns pairs), got {self.head_dim}",
        )
        _require(
            self.num_experts_per_tok <= self.num_local_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_local_experts ({self.num_local_experts})",
        )
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for token in (self.pad_token_id, self.bos_token_id, *eos):
            _require(
                token is None or 0 <= token < self.vocab_size,
                f"special token id {token} is outside the vocabulary of {self.vocab_size}",
            )


class ParameterCount(NamedTuple):
    """Numbers of weights of a model."""

    total: int
    """Every weight once; a tied head is the embedding."""
    active: int
    """Weights that one token uses: all but those of the experts it is not routed to."""


def count_parameters(config: KeuralConfig) -> ParameterCount:
    """Count the weights of the model that ``config`` describes, without building it.

    Per layer, with hidden size H, expert width I, E experts, top-k k, head width D, Q query and K key-value heads: attention
    2·H·D·(Q + K), router E·H, experts 3·E·H·I, two norms 2·H. Once: embedding V·H, the head V·H again when it is not tied, final
    norm H. Active leaves out the (E - k) idle experts of each layer.
    """
    assert config.head_dim is not None  # set in __post_init__
    hidden, experts = config.hidden_size, config.num_local_experts
    one_expert = 3 * hidden * config.intermediate_size
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + experts * hidden + experts * one_expert + 2 * hidden
    embedding = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    total = config.num_hidden_layers * layer + embedding + hidden
    idle = config.num_hidden_layers * (experts - config.num_experts_per_tok) * one_expert
    return ParameterCount(total=total, active=total - idle)


def _require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"KeuralConfig: {message}")


__all__ = ["KeuralConfig", "ParameterCount", "count_parameters"]
