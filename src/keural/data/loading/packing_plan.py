"""The packing plan of a store: which sequences stand in which row, worked out once and kept in a file.

In: lengths of sequences, a row's capacity, and the fingerprint of the data. Out: which sequences stand in each row. The file's
name holds everything that determines the plan, the file ends with the digest of its bytes, and it appears whole or not at all: a
plan for other data, another length or by other rules is another file, a damaged one is made again, and processes that make one
at once write the same bytes.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.packing import pack
from keural.files import write_atomic

PLAN_VERSION = 1
"""Raised when the same lengths are packed otherwise."""
DIGEST_BYTES = 16

Array = NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """Packed rows as two arrays: all sequences row by row, and where each row ends among them."""

    sequences: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.ends)

    def rows(self, numbers: Array) -> list[list[int]]:
        """The sequences of the given rows."""
        return [self.sequences[self.ends[row - 1] if row else 0 : self.ends[row]].tolist() for row in numbers.tolist()]

    @classmethod
    def pack(cls, sequences: Array, lengths: Array, capacity: int) -> "RowPlan":
        """Pack these sequences (one may be there several times) of these lengths."""
        rows = pack(lengths, capacity)
        order = np.fromiter((index for row in rows for index in row), dtype=np.int64, count=len(sequences))
        return cls(sequences[order], np.cumsum([len(row) for row in rows]))


def kept_plan(directory: Path, name: str, capacity: int, data_fingerprint: str, make: Callable[[], RowPlan]) -> RowPlan:
    """The plan kept in `directory` for this data and capacity, made first where there is none."""
    path = directory / f"{name}.rows-{capacity}-{data_fingerprint[:16]}-v{PLAN_VERSION}.plan"
    plan = _read(path)
    if plan is None:
        plan = make()
        _write(path, plan)
    return plan


def _read(path: Path) -> RowPlan | None:
    """The plan in a file; None when it is not there or damaged."""
    try:
        file = path.read_bytes()
    except OSError:
        return None
    content = memoryview(file)[:-DIGEST_BYTES]
    if len(file) < DIGEST_BYTES or blake2b(content, digest_size=DIGEST_BYTES).digest() != file[-DIGEST_BYTES:]:
        return None
    flat = np.load(io.BytesIO(content), allow_pickle=False)
    rows = int(flat[0])
    return RowPlan(flat[1 + rows :], flat[1 : 1 + rows])


def _write(path: Path, plan: RowPlan) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([[len(plan)], plan.ends, plan.sequences]))
    content = buffer.getvalue()
    write_atomic(path, content + blake2b(content, digest_size=DIGEST_BYTES).digest())
