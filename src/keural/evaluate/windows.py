"""Windows in which a text that is longer than the context is read."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Places in a text's ids: `ids[first:stop]` are predicted, each from what stands before it from `start` on."""

    start: int
    first: int
    stop: int


def windows(size: int, length: int, overlap: int) -> Iterator[Window]:
    """Windows of at most `length` inputs in which each of a text's `size` ids but the first is predicted exactly once.

    Each but the first repeats `overlap` inputs, fewer than `length`, so that its first prediction knows them and one more.
    """
    first = 1
    while first < size:
        start = max(first - 1 - overlap, 0)
        stop = min(start + length + 1, size)
        yield Window(start, first, stop)
        first = stop
