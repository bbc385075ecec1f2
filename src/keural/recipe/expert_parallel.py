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
    if train.precision == "split-host":
        return "precision split-host is for one process, and expert_parallel for several; give split, or leave expert_parallel out"
    return None
