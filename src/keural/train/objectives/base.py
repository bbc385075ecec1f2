"""What an objective is: arithmetic on the log-probabilities of labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from keural.data.loading.batch import Array, Batch
from keural.recipe import ObjectiveKind
from keural.train.micro_batches import MicroBatch

References = Callable[[Array], Tensor]
"""Reference log-probabilities, float32, of store sequences given by number, in the shape of the numbers."""


@dataclass(frozen=True)
class LossTerms:
    """The task loss of one forward pass, summed over what the objective counts, with gradient; and detached sums of its metrics
    (`ObjectiveKind.metrics`) by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """What a stage trains for."""

    @property
    def uniform(self) -> bool:
        """Whether the loss is a multiple of the sum of all labels' log-probabilities, so that one pass over the head serves both
        directions.
        """

    def denominator(self, batch: Batch) -> float:
        """How many labels, pairs or answers the batch's loss is a sum over; of weighted pairs, the sum of their weights."""

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> LossTerms:
        """The loss of a forward pass whose labels have these log-probabilities ``[rows, T]``."""


@runtime_checkable
class ComparedObjective(Objective, Protocol):
    """An objective that goes by how far the policy has gone from its reference on answers to other prompts."""

    def against(self, divergence: Tensor) -> Objective:
        """The objective of a step in which that is `divergence`, a number."""


def figures(means: Mapping[str, float], kind: ObjectiveKind) -> dict[str, float]:
    """What is reported, from means over all that is counted: metrics of a part of it become means over that part
    (`ObjectiveKind.shares`), and are left out where there is none.
    """
    parts = {name: means[name] / means[share] for name, share in kind.shares.items() if means[share] > 0}
    found = {name: value for name, value in means.items() if name not in kind.shares} | parts
    if kind.margin is not None and all(name in found for name in kind.margin):
        better, worse = kind.margin
        found["reward_margin"] = found[better] - found[worse]
    return found
