"""Low-rank adapters of a stage, and which settings of the stage they go with."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from keural.recipe.base import Spec, neutral

if TYPE_CHECKING:
    from keural.recipe.training import RouterSpec, TrainSpec

Target = Literal["attention", "experts", "router"]
GROUPED_RANK = 8
"""The grouped product in bfloat16 reads rows of whole 16 bytes, so a rank of experts is a multiple of this there."""


class LoraSpec(Spec):
    """Train low-rank adapters (LoRA, Hu et al. 2021, through PEFT) and leave the model that the stage starts from as it is. The
    stage leaves an adapter directory and the model with the adapter merged into it, which the next stage starts from."""

    rank: int = Field(16, gt=0, le=4096)
    """Width of the low-rank product; each expert has one of its own."""
    alpha: int = Field(32, gt=0)
    """The product counts alpha / rank times."""
    targets: list[Target] = Field(["attention", "experts"], min_length=1)
    """What gets an adapter: `attention` (query, key, value, output), `experts` (both matrices of every expert), `router`. All else
    is frozen, the router too where it is not named."""
    base_dtype: Literal["float32", "bfloat16"] = neutral("work", "float32")
    """What the frozen matrices are stored in while training; bfloat16 takes half the memory and, with compute_dtype bfloat16, gives
    the same bits, because matrices are rounded where they are used. Norms, routers and the adapter stay in float32."""

    @field_validator("targets")
    @classmethod
    def _once(cls, targets: list[Target]) -> list[Target]:
        if len(set(targets)) < len(targets):
            raise ValueError("names a target twice")
        return targets


def why_not_adapted(lora: LoraSpec, init_from: str, train: "TrainSpec", router: "RouterSpec") -> str | None:
    """Why a stage of these settings cannot train adapters; None when it can."""
    if init_from == "random":
        return "lora adapts a model: init_from must be an earlier stage or a model directory"
    if train.precision != "fp32":
        return (
            f"lora has no use for train.precision {train.precision}, which stores trained weights; lora.base_dtype bfloat16 with "
            "train.compute_dtype bfloat16 stores the frozen ones in half"
        )
    if train.recompute == "budget":
        return "train.recompute budget goes by a plan, and plans do not count adapters (lora); set selective or full"
    if lora.base_dtype == "bfloat16" and train.compute_dtype != "bfloat16":
        return "lora.base_dtype bfloat16 needs train.compute_dtype bfloat16; in float32 it would change the model"
    if train.compile and train.compute_dtype == "float32":
        return "lora with train.compile needs train.compute_dtype bfloat16: there is no compiled grouped product in float32"
    if "experts" in lora.targets and train.compute_dtype == "bfloat16" and lora.rank % GROUPED_RANK:
        return (
            f"lora.rank {lora.rank}: with target experts and train.compute_dtype bfloat16 it must be a multiple of {GROUPED_RANK}"
        )
    if router.freeze and "router" in lora.targets:
        return "router.freeze and lora target router contradict each other; leave one of them out"
    return None
