"""One training stage: objective, optimisation, router losses."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from keural.recipe.base import Part, Spec, length, neutral, not_for
from keural.recipe.data import DataSpec

Objective = Literal["next_token", "sft", "dpo"]


class TrainSpec(Spec):
    """Optimisation of one stage: one of `steps`, `epochs`, `budget_share`; batches are per optimizer step, not per device."""

    steps: int | None = length(None, gt=0)
    epochs: float | None = length(None, gt=0)
    budget_share: float | None = length(None, gt=0, le=1)
    """Share of the recipe's time budget; the number of steps is measured and fixed before step 0."""
    batch_tokens: int | None = Field(None, gt=0)
    """Tokens per optimizer step (next_token, sft): a multiple of data.sequence_length."""
    batch_pairs: int | None = Field(None, gt=0)
    """Preference pairs per optimizer step (dpo)."""
    micro_batch_tokens: int | None = neutral("work", None, gt=0)
    """Upper bound of tokens in one forward pass on one rank; default: the rank's whole share at once. Gradients are the same sums,
    cut elsewhere, so weights differ by rounding at most; with router.scope micro_batch the cut is part of the loss, and counts."""
    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices only, never to norms."""
    clip_norm: float = Field(1.0, gt=0)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = neutral("work", False)
    """Compute activations again in the backward pass instead of keeping them; on a CPU the same bits, otherwise up to rounding."""
    compile: bool = neutral("work", False)
    """Compile the layers; the same numbers up to rounding."""
    save_every: int | None = neutral("keeping", None, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = neutral("keeping", 1, gt=0)
    evaluate_every: int | None = neutral("keeping", None, gt=0)
    """Steps between evaluations on held-out data; it is always evaluated at the end."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("betas must lie in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sum(value is not None for value in (self.steps, self.epochs, self.budget_share)) != 1:
            raise ValueError("give exactly one of steps, epochs, budget_share")
        if self.min_lr > self.lr:
            raise ValueError("min_lr cannot exceed lr")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps must be smaller than steps")
        return self


class RouterSpec(Spec):
    """Router losses, added to every objective: coefficient times the mean over layers, on non-padding tokens."""

    balance_coef: float = Field(0.02, ge=0)
    z_coef: float = Field(0.001, ge=0)
    scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Tokens over which the load is balanced: the whole optimizer step (exact), or each forward pass (as published)."""


class DpoSpec(Spec):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid"] = "sigmoid"


class StageSpec(Spec):
    """One training stage."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    objective: Objective
    init_from: str = not_for(("weights",), "random")
    """`random`, the name of an earlier stage, or a model directory; what determines the weights there is in the fingerprint."""
    data: DataSpec
    train: TrainSpec
    router: RouterSpec = Field(default_factory=RouterSpec)
    dpo: DpoSpec = Field(default_factory=DpoSpec)
    notes: list[str] = neutral("report", default_factory=list)
    """Where the numbers come from, contradictions included."""

    def determining(self, part: Part, length: bool = True) -> dict[str, Any]:
        """As for every spec; where router losses are balanced within each forward pass its size is part of the loss."""
        found = super().determining(part, length)
        if self.router.scope == "micro_batch" and self.train.micro_batch_tokens is not None:
            found["micro_batch_tokens"] = self.train.micro_batch_tokens
        return found

    @property
    def starts_from_directory(self) -> bool:
        """Whether `init_from` is a model directory: a path, which has a slash."""
        return "/" in self.init_from

    @property
    def predecessor(self) -> str | None:
        """The earlier stage that `init_from` names; None for random weights and for a model directory."""
        return None if self.init_from == "random" or self.starts_from_directory else self.init_from

    @model_validator(mode="after")
    def _possible(self) -> Self:
        train, length = self.train, self.data.sequence_length
        if self.data.shards and self.objective != "next_token":
            raise ValueError(f"data.shards hold documents; objective {self.objective} cannot train on them")
        if self.objective == "dpo":
            if train.batch_pairs is None or train.batch_tokens is not None:
                raise ValueError("objective dpo needs train.batch_pairs and no train.batch_tokens")
            if self.data.cleaning is not None:
                raise ValueError("data.cleaning is for documents; objective dpo has gates per source")
            if self.init_from == "random":
                raise ValueError("objective dpo needs init_from: an earlier stage or a model directory")
        else:
            if train.batch_tokens is None or train.batch_pairs is not None:
                raise ValueError(f"objective {self.objective} needs train.batch_tokens and no train.batch_pairs")
            if train.batch_tokens % length:
                raise ValueError(f"train.batch_tokens {train.batch_tokens} is not a multiple of data.sequence_length {length}")
            if self.objective != "next_token" and self.data.cleaning is not None:
                raise ValueError(f"data.cleaning is for documents; objective {self.objective} has gates per source")
            if "dpo" in self.model_fields_set:
                raise ValueError(f"dpo settings have no effect with objective {self.objective}")
        row = 2 * length if self.objective == "dpo" else length
        if train.micro_batch_tokens is not None and train.micro_batch_tokens < row:
            raise ValueError(f"train.micro_batch_tokens {train.micro_batch_tokens} is smaller than one packed row ({row} tokens)")
        return self
