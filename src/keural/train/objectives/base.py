"""What an objective is: arithmetic on the log-probabilities of labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from keural.data.loading.batch import Array, Batch
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
        """How many labels or pairs the batch's loss is a sum over; of weighted pairs, the sum of their weights."""

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> LossTerms:
        """The loss of a forward pass whose labels have these log-probabilities ``[rows, T]``."""
