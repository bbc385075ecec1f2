"""Preference optimisation: losses over the summed log-probabilities of pairs."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from keural.data.loading.stream import Batch
from keural.train.micro_batches import MicroBatch
from keural.train.objectives.base import References, Task


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation, sigmoid loss (Rafailov et al. 2023, eq. 7), summed over pairs."""

    beta: float
    metrics: tuple[str, ...] = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")

    def items(self, batch: Batch) -> int:
        """Pairs."""
        return len(sides(batch).sequences) // 2

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> Task:
        """Sum of -log sigmoid(beta * ((chosen - its reference) - (rejected - its reference)))."""
        assert references is not None
        found = sides(micro.rows)
        rewards = self.beta * (sequence_logprobs(logprobs, found) - references(found.sequences))
        chosen, rejected = rewards.view(2, -1)
        margins = (chosen - rejected).detach()
        sums = (margins.sum(), (margins > 0).float().sum(), chosen.detach().sum(), rejected.detach().sum())
        return Task(-F.logsigmoid(chosen - rejected).sum(), dict(zip(self.metrics, sums, strict=True)))


@dataclass(frozen=True)
class Sides:
    """Where the sides of a batch's pairs are.

    `sequences` ``[2 * pairs]``: store numbers, first the chosen ones, then their rejected ones in the same order. `slots`
    ``[rows, T]``: index into `sequences` at each position, -1 on padding.
    """

    sequences: np.ndarray
    slots: np.ndarray


def sides(batch: Batch) -> Sides:
    """Find the pairs of a batch: sequence 2k of the store is chosen, 2k + 1 rejected, both in one row.

    A pair may occur twice, where an epoch ends inside the batch; its occurrences are told apart by row and segment.
    """
    row = np.broadcast_to(np.arange(len(batch.input_ids))[:, None], batch.input_ids.shape)
    real = batch.segment_ids > 0
    keys = np.stack([row[real], batch.sequence_ids[real], batch.segment_ids[real]])
    found, slot_of_position = np.unique(keys, axis=1, return_inverse=True)
    side = found[1] % 2
    assert 2 * int(side.sum()) == len(side), "a side is missing"
    order = np.concatenate([np.flatnonzero(side == 0), np.flatnonzero(side == 1)])
    chosen, rejected = found[:, order].reshape(3, 2, -1).swapaxes(0, 1)
    assert np.array_equal(chosen[0], rejected[0]), "a pair is not in one row"
    assert np.array_equal(chosen[1] + 1, rejected[1]), "the sides of a pair do not follow each other"
    slots = np.full(batch.input_ids.shape, -1)
    slots[real] = np.argsort(order)[slot_of_position.reshape(-1)]
    return Sides(found[1][order], slots)


def sequence_logprobs(logprobs: Tensor, found: Sides) -> Tensor:
    """Sum of the labels' log-probabilities ``[rows, T]`` over each side; ``[2 * pairs]`` in the order of `found.sequences`."""
    slots = torch.from_numpy(found.slots).to(logprobs.device).flatten()
    index = (slots >= 0).nonzero().squeeze(-1)
    zeros = torch.zeros(len(found.sequences), dtype=logprobs.dtype, device=logprobs.device)
    return zeros.index_add(0, slots.index_select(0, index), logprobs.flatten().index_select(0, index))
