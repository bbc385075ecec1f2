"""A store's documents as one flat line of tokens, whole or as the parts of an epoch, one after another.

In: a store and ranges of its tokens (each beginning and ending with a document). Out: tokens and documents at positions of the
line, in time that does not depend on its length.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.mixture import Part
from keural.data.tokens.store import TokenStore


class Line:
    """Positions ``0..num_tokens-1``; without `parts` those of the store itself."""

    def __init__(self, store: TokenStore, parts: Sequence[Part] | None = None) -> None:
        ranges = [(0, store.num_tokens)] if parts is None else [(part.start, part.end) for part in parts]
        self.store = store
        self._begins = [begin for begin, _ in ranges]
        self._ends = np.cumsum([end - begin for begin, end in ranges])
        self.num_tokens = int(self._ends[-1])

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """The tokens at positions ``start..stop-1``, cut at the end of the line."""
        parts = [self.store.read(low, high) for low, high, _ in self._ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype=np.uint32), *parts])

    def spans(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """The documents that overlap positions ``start..stop-1``: their numbers in the store, and where each ends in the line."""
        numbers: list[int] = []
        ends: list[int] = []
        for low, high, position in self._ranges(start, stop):
            first, found = self.store.spans(low, high)
            numbers += range(first, first + len(found))
            ends += (found - low + position).tolist()
        return numbers, ends

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Positions of the line as ranges of the store, each with the position it begins at."""
        stop, found = min(stop, self.num_tokens), []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[part])
            before = int(self._ends[part - 1]) if part else 0
            last = min(stop, end)
            low = self._begins[part] + start - before
            found.append((low, low + last - start, start))
            start, part = last, part + 1
        return found
