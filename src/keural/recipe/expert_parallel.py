"""Experts that are divided among processes, and which settings of a stage that goes with."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

if TYPE_CHECKING:
    from keural.recipe.training import TrainSpec


def _number(value: Any) -> Any:
    """`true` is no number, though Python takes it for 1."""
    return str(value).lower() if isinstance(value, bool) else value


ExpertParallel = Annotated[Literal[1, 2, 4, 8], BeforeValidator(_number)]


def why_not_expert_parallel(train: "TrainSpec") -> str | None:
    """Why a stage with these settings cannot divide its experts among processes; None when it can."""
    if train.expert_parallel == 1:
        return None
    if train.precision in ("split", "split-host"):
        return f"expert_parallel does not go with precision {train.precision}; give fp32-bf16m, or leave expert_parallel out"
    if train.compile:
        return "expert_parallel cannot be compiled: how many tokens a process gets is known when they are sent; leave compile out"
    return None
