"""The objectives by name, as everything but the loss needs to know them: one row each, read without torch.

In: the name of a stage's objective, or of what a store holds. Out: what its stores hold, what batches and weights count, what is
reported. The loss itself is its namesake in `keural.train.objectives.registry`; a new objective is a row here and a loss there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Objective = Literal["next_token", "sft", "dpo", "kto"]
StoreKind = Literal["documents", "conversations", "pairs", "answers"]
Unit = Literal["tokens", "pairs", "answers"]
PreferenceLossName = Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "rpo", "dpop", "simpo", "nll"]
KtoLossName = Literal["kto", "apo_zero_unpaired"]


@dataclass(frozen=True)
class StoreShape:
    """What a kind of token store is made of."""

    unit: Unit
    """What a batch's size, a source's weight and a loss's denominator count."""
    sequences_per_record: int
    """Sequences that belong together: a pair has a chosen and a rejected one, a labelled answer its own and its prompt with the
    answer to another one."""
    sequences_per_row: int
    """Sequences of full length that a packed row must have room for: those of a pair stand in one row."""


STORES: dict[str, StoreShape] = {
    "documents": StoreShape("tokens", 1, 1),
    "conversations": StoreShape("tokens", 1, 1),
    "pairs": StoreShape("pairs", 2, 2),
    "answers": StoreShape("answers", 2, 1),
}


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective that can be asked for by name."""

    store: StoreKind
    """What it trains on."""
    label: str
    """Its name in a report."""
    color: str
    """Its class in a report's style sheet."""
    needs_reference: bool = False
    """Whether the loss compares with the model that the stage starts from."""
    metrics: tuple[str, ...] = ()
    """What is reported beside the loss, as means over its denominator."""
    reference_metrics: tuple[str, ...] = ()
    """What is reported besides where a reference is at hand."""
    settings: str | None = None
    """The key of a stage that holds settings of its own."""
    shares: Mapping[str, str] = field(default_factory=dict)
    """Of metrics that are means over some of what is counted: the metric that says how large a share these are."""
    margin: tuple[str, str] | None = None
    """Of such metrics the two whose difference is reported as `reward_margin`."""

    @property
    def unit(self) -> Unit:
        """What its batches and its loss count."""
        return STORES[self.store].unit

    @property
    def sequences_per_record(self) -> int:
        """Sequences of its stores that belong together."""
        return STORES[self.store].sequences_per_record

    @property
    def sequences_per_row(self) -> int:
        """Sequences of full length that a packed row has room for."""
        return STORES[self.store].sequences_per_row


OBJECTIVES: dict[str, ObjectiveKind] = {
    "next_token": ObjectiveKind("documents", "next token", "c1"),
    "sft": ObjectiveKind("conversations", "SFT", "c2", settings="sft"),
    "dpo": ObjectiveKind(
        "pairs",
        "DPO",
        "c3",
        needs_reference=True,
        metrics=(
            "reward_margin",
            "reward_accuracy",
            "reward_chosen",
            "reward_rejected",
            "logprob_chosen",
            "logprob_rejected",
            "length_chosen",
            "length_rejected",
        ),
        reference_metrics=("kl_estimate",),
        settings="dpo",
    ),
    "kto": ObjectiveKind(
        "answers",
        "KTO",
        "c4",
        needs_reference=True,
        metrics=(
            "desirable",
            "undesirable",
            "reward_desirable",
            "reward_undesirable",
            "logprob_desirable",
            "logprob_undesirable",
            "length_desirable",
            "length_undesirable",
            "kl",
        ),
        settings="kto",
        shares={f"{figure}_{label}": label for figure in ("reward", "logprob", "length") for label in ("desirable", "undesirable")},
        margin=("reward_desirable", "reward_undesirable"),
    ),
}


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of preference pairs that can be asked for by name (`dpo.loss`)."""

    options: tuple[str, ...] = ()
    """Keys of `dpo` that it reads beside `beta`."""
    needs_reference: bool = True
    """Whether it compares with the model that the stage starts from."""
    per_token: bool = False
    """Whether it compares means over an answer's tokens instead of sums."""


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(("label_smoothing", "ld_alpha")),
    "sigmoid_norm": PreferenceLoss(("label_smoothing",), per_token=True),
    "ipo": PreferenceLoss(per_token=True),
    "hinge": PreferenceLoss(("ld_alpha",)),
    "robust": PreferenceLoss(("label_smoothing", "ld_alpha")),
    "rpo": PreferenceLoss(("label_smoothing", "rpo_alpha", "ld_alpha")),
    "dpop": PreferenceLoss(("dpop_lambda", "ld_alpha")),
    "simpo": PreferenceLoss(("simpo_gamma",), needs_reference=False, per_token=True),
    "nll": PreferenceLoss(needs_reference=False, per_token=True),
}
"""The formulas stand in `keural.train.objectives.pairwise`."""


@dataclass(frozen=True)
class KtoLoss:
    """A loss of labelled answers that can be asked for by name (`kto.loss`)."""

    needs_divergence: bool
    """Whether it compares with the divergence of policy and reference that answers to other prompts show."""


KTO_LOSSES: dict[str, KtoLoss] = {"kto": KtoLoss(needs_divergence=True), "apo_zero_unpaired": KtoLoss(needs_divergence=False)}
"""The formulas stand in `keural.train.objectives.labelled`."""
