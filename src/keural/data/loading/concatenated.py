"""Concatenated documents: a store's tokens one after another, or those of the ranges that an epoch is made of.

In: a store and ranges of it. Out: tokens and documents at flat positions, in time that does not depend on how many there are.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.mixture import SequenceRange
from keural.data.tokens.store import TokenStore


class ConcatenatedDocuments:
    """Flat positions ``0..num_tokens-1``; without `ranges` those of the store itself."""

    def __init__(self, store: TokenStore, ranges: Sequence[SequenceRange] | None = None) -> None:
        bounds = [(0, store.num_tokens)] if ranges is None else [(each.start, each.end) for each in ranges]
        self.store = store
        self._begins = [begin for begin, _ in bounds]
        self._ends = np.cumsum([end - begin for begin, end in bounds])
        self.num_tokens = int(self._ends[-1])

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """The tokens at positions ``start..stop-1``, cut at the end."""
        pieces = [self.store.read(low, high) for low, high, _ in self._ranges(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype=np.uint32), *pieces])

    def spans(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """The documents that overlap positions ``start..stop-1``: their numbers in the store, and where each ends (exclusive)."""
        numbers: list[int] = []
        ends: list[int] = []
        for low, high, position in self._ranges(start, stop):
            first, found = self.store.spans(low, high)
            numbers += range(first, first + len(found))
            ends += (found - low + position).tolist()
        return numbers, ends

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Flat positions as ranges of the store's, each with the position it begins at."""
        stop, found = min(stop, self.num_tokens), []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[number])
            before = int(self._ends[number - 1]) if number else 0
            last = min(stop, end)
            low = self._begins[number] + start - before
            found.append((low, low + last - start, start))
            start, number = last, number + 1
        return found
