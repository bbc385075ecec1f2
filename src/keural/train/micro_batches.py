"""A step's rows on the device, cut into micro-batches.

In: the stream's numpy `Batch` of this rank. Out: `MicroBatch`es of at most so many tokens, the same number on every rank, whole
rows each, so that a preference pair is never divided.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keural.data.loading.stream import Batch


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass; all tensors ``[rows, T]``. `rows` keeps the numpy original."""

    rows: Batch
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    real: Tensor
    """True where there is a token, False on padding."""


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

    return MicroBatch(batch, move(batch.input_ids), move(batch.position_ids), move(batch.labels), move(batch.segment_ids > 0))
