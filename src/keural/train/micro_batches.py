"""A step's rows on the device, cut into micro-batches.

In: the stream's numpy `Batch` of this rank. Out: `MicroBatch`es of at most so many tokens, the same number on every rank, whole
rows each, so that a preference pair is never divided.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keural.data.loading.batch import Array, Batch


@dataclass(frozen=True)
class PairIndices:
    """Where the two sides of each preference pair stand in a forward pass; side k is the chosen one of pair k, side pairs + k the
    rejected one. Labelled answers have one side. Empty where there are neither.
    """

    sequences: Array
    """``[2, pairs]``: the store's sequences, the chosen ones first, or ``[1, answers]``; on the CPU, where references are looked
    up.
    """
    positions: Tensor
    """``[n]``: indices into the flattened rows of every token of every side."""
    sides: Tensor
    """``[n]``: the side that each of these tokens belongs to."""
    weights: Tensor | None = None
    """``[pairs]``, float32: what each pair counts in the loss; None: all count the same."""
    desirable: Tensor | None = None
    """``[answers]``, bool: which labelled answers are good ones; None of pairs."""
    ends: tuple[int, ...] = ()
    """Where pairs or answers end among the flattened rows (`group_ends`); on the CPU, where pieces are cut by them. Found from the
    tensors where it is not given, for which a device is waited for.
    """

    def __post_init__(self) -> None:
        if not self.ends and (number := self.sequences.shape[-1]):
            found = group_ends(self.positions.cpu().numpy(), self.sides.cpu().numpy() % number, number)
            object.__setattr__(self, "ends", found)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass; the tensors are ``[rows, T]``."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    token_mask: Tensor
    """True where there is a token, False on padding."""
    positions: Array
    """`position_ids` on the CPU, where documents are found by them."""
    pairs: PairIndices
    noise: Tensor | None = None
    """``[rows, T, H]``, added to the embeddings; None: nothing."""


def rows_per_pass(row_length: int, limit: int | None, total: int) -> int:
    """Rows of one forward pass when `limit` tokens are allowed (None: all `total` rows at once); at least one."""
    return total if limit is None else max(1, limit // row_length)


def micro_batches(batch: Batch, limit: int | None, device: torch.device) -> list[MicroBatch]:
    """Cut a batch into micro-batches of at most `limit` tokens (None: one), each of at least one row."""
    total, length = batch.input_ids.shape
    size = rows_per_pass(length, limit, total)
    return [to_device(batch.select(slice(start, start + size)), device) for start in range(0, total, size)]


def to_device(batch: Batch, device: torch.device) -> MicroBatch:
    """The batch's arrays as tensors on `device`."""

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    positions, sides = _tokens_of_sides(batch)
    return MicroBatch(
        input_ids=move(batch.input_ids),
        position_ids=move(batch.position_ids),
        labels=move(batch.labels),
        token_mask=move(batch.segment_ids > 0),
        positions=np.ascontiguousarray(batch.position_ids),
        pairs=PairIndices(
            batch.pair_sequences,
            move(positions),
            move(sides),
            None if batch.pair_weights is None else move(batch.pair_weights),
            None if batch.desirable is None else move(batch.desirable),
            group_ends(positions, sides % max(len(batch.pairs), 1), len(batch.pairs)),
        ),
    )


def _tokens_of_sides(batch: Batch) -> tuple[Array, Array]:
    """Each token of each side: its place in the flattened rows, and the number of its side."""
    row, *bounds = batch.pairs.T
    begins, lengths = np.concatenate(bounds[:-1]), np.diff(bounds, axis=0).ravel()
    begins = begins + np.tile(row * batch.input_ids.shape[1], len(bounds) - 1)
    sides = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.arange(len(sides)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return begins[sides] + inside, sides


def group_ends(positions: Array, groups: Array, number: int) -> tuple[int, ...]:
    """Where `number` groups of positions end: behind every position of those that begin before there."""
    begins, ends = np.full(number, np.iinfo(np.int64).max), np.zeros(number, dtype=np.int64)
    np.minimum.at(begins, groups, positions)
    np.maximum.at(ends, groups, positions + 1)
    order = np.argsort(begins, kind="stable")
    reached = np.maximum.accumulate(ends[order])
    closed = np.append(begins[order][1:] >= reached[:-1], True)[:number]
    return tuple(reached[closed].tolist())
