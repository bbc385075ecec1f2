"""Settings of objectives that learn from judgements of answers: `dpo` and `kto`, and of the reference that both compare with."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from keural.errors import nearest, quoted
from keural.limits import LARGEST
from keural.recipe.base import BOUNDED, Spec, neutral
from keural.recipe.objectives import KTO_LOSSES, PREFERENCE_LOSSES, KtoLossName, PreferenceLossName


class ReferenceSpec(Spec):
    """Where what an objective compares with comes from."""

    reference: Literal["cached", "online"] = neutral("work", "cached")
    """Where the log-probabilities of the model that the stage starts from come from. `cached`: computed once for each record ahead
    of training and kept in the run directory, whatever else of the recipe changes. `online`: in every step by a frozen copy (with
    `lora` by the model with its adapter off), without that pass, at the cost of twice the weights in memory and of a forward pass
    more. The same values up to rounding."""
    reference_path: str | None = neutral("place", None)
    """A directory of such values that were made elsewhere (`--reference-only`; `reference` of a run, or one inside it). It is
    verified and must hold every pair or answer of the stage; nothing is computed. None: those of the run directory, where missing
    ones are computed."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model that the stage starts from."""
        return True

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.reference == "online" and self.reference_path is not None:
            raise ValueError("reference_path has no effect with reference online")
        return self


class DpoSpec(ReferenceSpec):
    """Preference optimisation; an option that the loss does not read is refused."""

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to its reference; margins are multiplied by it (of `ipo`: tau). Losses of sums want about
    0.1, those of means per token (`sigmoid_norm`, `simpo`) 2 to 10."""
    loss: Annotated[PreferenceLossName | dict[PreferenceLossName, float], BOUNDED] = "sigmoid"
    """What is minimised over pairs, or several with their weights, `{ipo: 1.0, nll: 0.2}`. `sigmoid`: DPO, with `label_smoothing`
    cDPO. `sigmoid_norm`: DPO of means per token. `ipo`: a square, of means per token. `hinge`. `robust`: DPO without the bias of
    swapped labels. `rpo`: DPO and `nll`. `dpop`: DPO that does not let the chosen answer fall. `simpo`: means per token without
    a reference. `nll`: the chosen answer's, beside others."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be swapped (`sigmoid`, `sigmoid_norm`, `rpo`: cDPO; `robust`)."""
    ld_alpha: float = Field(1.0, ge=0, le=1)
    """Weight of the tokens by which one answer is longer than the other: LD-DPO (Liu et al. 2024, arXiv:2409.06411); 1 is
    plain DPO. Of losses of sums."""
    rpo_alpha: float = Field(1.0, gt=0)
    """Weight of `nll` in `rpo`."""
    dpop_lambda: float = Field(50.0, gt=0)
    """Weight of the penalty in `dpop`."""
    simpo_gamma: float = Field(1.0, ge=0)
    """Margin that `simpo` asks for, in rewards."""

    @property
    def weights(self) -> dict[str, float]:
        """The losses that are added up, each with its weight."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else {str(name): weight for name, weight in self.loss.items()}

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with the model that the stage starts from."""
        return any(PREFERENCE_LOSSES[name].needs_reference for name in self.weights)

    @property
    def per_token(self) -> bool:
        """Whether all losses are of means over an answer's tokens."""
        return all(PREFERENCE_LOSSES[name].per_token for name in self.weights)

    @field_validator("loss", mode="before")
    @classmethod
    def _known(cls, loss: Any) -> Any:
        asked = loss if isinstance(loss, dict) else {loss: 1.0} if isinstance(loss, str) else {}
        if not asked:
            raise ValueError(f"must be a name or a mapping of names to weights, got {quoted(loss)}")
        for name, weight in asked.items():
            if name not in PREFERENCE_LOSSES:
                raise ValueError(f"unknown loss {quoted(name)}{nearest(str(name), PREFERENCE_LOSSES)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= LARGEST:
                raise ValueError(f"the weight of {name} must be a number above 0 and at most {LARGEST:,}, got {quoted(weight)}")
        return loss

    @model_validator(mode="after")
    def _used(self) -> Self:
        asked = self.weights
        if not asked.keys() - {"nll"}:
            raise ValueError("loss nll is for beside others, e.g. {sigmoid: 1.0, nll: 0.2}; alone it is objective sft")
        for option in ("label_smoothing", "ld_alpha", "rpo_alpha", "dpop_lambda", "simpo_gamma"):
            readers = [name for name, known in PREFERENCE_LOSSES.items() if option in known.options]
            if option in self.model_fields_set and not asked.keys() & set(readers):
                raise ValueError(f"{option} has no effect with loss {' and '.join(asked)}; {', '.join(readers)} read it")
        if self.ld_alpha != 1 and (others := [name for name in asked if PREFERENCE_LOSSES[name].per_token and name != "nll"]):
            raise ValueError(f"ld_alpha weighs the tokens of sums, and loss {others[0]} is of means; leave one of them out")
        if not self.needs_reference and (unread := sorted(self.model_fields_set & {"reference", "reference_path"})):
            raise ValueError(f"{unread[0]} has no effect with loss {' and '.join(asked)}, which compares with no reference")
        if "robust" in asked and self.label_smoothing == 0:
            raise ValueError("loss robust needs label_smoothing, the share of swapped pairs; without it it is loss sigmoid")
        return self


class KtoSpec(ReferenceSpec):
    """Learning from single answers with a label, good or bad: KTO (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to its reference; log-ratios are multiplied by it."""
    loss: KtoLossName = "kto"
    """`kto`: against the divergence that answers to other prompts show. `apo_zero_unpaired`: against 0, for good answers that are
    better than what the model says (D'Oosterlinck et al. 2024, arXiv:2408.06266); without a pass over answers to other prompts."""
    desirable_weight: float = Field(1.0, gt=0)
    """What a good answer counts in the loss. Times their number it should be 1 to 4/3 times `undesirable_weight` times the number
    of bad ones (the paper's eq. 8); what it is is said before step 0."""
    undesirable_weight: float = Field(1.0, gt=0)
    """What a bad answer counts in the loss."""

    @property
    def needs_divergence(self) -> bool:
        """Whether the loss goes by what answers to other prompts say of the policy."""
        return KTO_LOSSES[self.loss].needs_divergence
