"""What an objective is: arithmetic on the log-probabilities of labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from keural.data.loading.stream import Batch
from keural.train.micro_batches import MicroBatch

References = Callable[[np.ndarray], Tensor]
"""Reference log-probabilities, float32, of store sequences given by number."""


@dataclass(frozen=True)
class Task:
    """The task loss of one forward pass, summed over its items, with gradient; and detached sums of what is reported besides."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """What a stage trains for."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is reported besides the loss."""

    def items(self, batch: Batch) -> int:
        """How many items the batch's loss is a sum over."""

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> Task:
        """The loss of a forward pass whose labels have these log-probabilities ``[rows, T]``."""
