"""How many labelled answers are good and bad ones, and whether the weights of both suit that.

In: the stream that a stage trains on, and its weights. Out: `LabelBalance`, which the run keeps, and a line. Losses of good and bad
answers should weigh about the same, those of good ones up to a third more (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).
"""

from dataclasses import dataclass

from keural.data.loading.instances import Answers
from keural.data.loading.stream import Stream
from keural.recipe import KtoSpec

LEAST, MOST = 1.0, 4 / 3
"""What all good answers should weigh together, of what all bad ones do."""


@dataclass(frozen=True)
class LabelBalance:
    """Labels of an epoch's answers, and what those of one label weigh together, for each unit that the others do."""

    desirable: int
    undesirable: int
    ratio: float | None
    """None where there are no bad answers."""

    @property
    def suits(self) -> bool:
        """Whether the weights are those that are recommended."""
        return self.ratio is not None and LEAST * (1 - 1e-9) <= self.ratio <= MOST * (1 + 1e-9)


def label_balance(stream: Stream, spec: KtoSpec) -> LabelBalance | None:
    """Of labelled answers; of other data None."""
    if not isinstance(stream.instances, Answers):
        return None
    good = int(stream.instances.desirable.sum())
    bad = len(stream.instances) - good
    return LabelBalance(good, bad, spec.desirable_weight * good / (spec.undesirable_weight * bad) if bad else None)


def balance_line(found: LabelBalance, spec: KtoSpec) -> str:
    """What there is, and what to set where the weights do not suit it."""
    counts = f"{found.desirable:,} good and {found.undesirable:,} bad answers"
    if found.ratio is None or not found.desirable:
        return f"{counts}: nothing is learned from the difference"
    if found.suits:
        return f"{counts}, together weighed {found.ratio:.2f} to 1"
    even = spec.undesirable_weight * found.undesirable / found.desirable
    other = spec.desirable_weight * found.desirable / found.undesirable
    return (
        f"{counts}, together weighed {found.ratio:.2f} to 1; 1 to {MOST:.2f} is recommended: kto.desirable_weight "
        f"{LEAST * even:.3g} to {MOST * even:.3g}, or kto.undesirable_weight {other / MOST:.3g} to {other / LEAST:.3g}"
    )
