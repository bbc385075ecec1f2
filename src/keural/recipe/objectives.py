"""The objectives by name, as everything but the loss needs to know them: one row each, read without torch.

In: the name of a stage's objective, or of what a store holds. Out: what its stores hold, what batches and weights count, what is
reported. The loss itself is its namesake in `keural.train.objectives.registry`; a new objective is a row here and a loss there.
"""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["next_token", "sft", "dpo"]
StoreKind = Literal["documents", "conversations", "pairs"]
Unit = Literal["tokens", "pairs"]


@dataclass(frozen=True)
class StoreShape:
    """What a kind of token store is made of."""

    unit: Unit
    """What a batch's size, a source's weight and a loss's denominator count."""
    sequences_per_record: int
    """Sequences that belong together and are never divided: a pair has a chosen and a rejected one."""


STORES: dict[str, StoreShape] = {
    "documents": StoreShape("tokens", 1),
    "conversations": StoreShape("tokens", 1),
    "pairs": StoreShape("pairs", 2),
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
    settings: str | None = None
    """The key of a stage that holds settings of its own."""

    @property
    def unit(self) -> Unit:
        """What its batches and its loss count."""
        return STORES[self.store].unit

    @property
    def sequences_per_record(self) -> int:
        """Sequences of its stores that are never divided; a packed row has room for so many of full length."""
        return STORES[self.store].sequences_per_record


OBJECTIVES: dict[str, ObjectiveKind] = {
    "next_token": ObjectiveKind("documents", "next token", "c1"),
    "sft": ObjectiveKind("conversations", "SFT", "c2"),
    "dpo": ObjectiveKind(
        "pairs",
        "DPO",
        "c3",
        needs_reference=True,
        metrics=("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected"),
        settings="dpo",
    ),
}
