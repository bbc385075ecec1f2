"""Which optimizer trains what of a stage's model, and which settings it goes with."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from keural.recipe.base import Spec

if TYPE_CHECKING:
    from keural.recipe.training import TrainSpec

OptimizerName = Literal["adamw", "muon"]


class MuonSpec(Spec):
    """Muon (Jordan et al. 2024) for the matrices of the layers, each expert's by itself; embedding, head, routers and norms stay
    with AdamW. Steps are scaled to the length of AdamW's (Liu et al. 2025, arXiv:2502.16982): lr and weight_decay are for both."""

    lr_scale: float = Field(1.0, gt=0, le=1000)
    """The matrices' learning rate in units of train.lr."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the mean gradient, which looks one step ahead (Nesterov)."""
    iterations: int = Field(5, gt=0, le=20)
    """Newton-Schulz iterations of a step; fewer cost less and bring singular values less near to 1."""


def why_not_muon(train: "TrainSpec", adapted: bool) -> str | None:
    """Why a stage with these settings cannot use Muon, or its settings are not read; None when all is well."""
    if train.optimizer != "muon":
        unread = train.muon.model_fields_set  # `train.muon={}` takes back what a recipe says
        return "train.muon has no effect with train.optimizer adamw; leave it out, or give train.muon={}" if unread else None
    if adapted:
        return "train.optimizer muon is for whole matrices; lora trains pairs of thin ones, with adamw"
    if train.precision != "fp32":
        return f"train.optimizer muon needs train.precision fp32; {train.precision} keeps its state in parts, for adamw"
    return None
