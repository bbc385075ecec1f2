"""Best-fit-decreasing packing: sequences into rows of fixed capacity, none divided, none lost.

In: lengths. Out: for each row the indices of its sequences. Deterministic: equal lengths keep their order, and of equally full
rows the one that has been so for longest is taken. O(n log n).
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows whose lengths sum to at most `capacity`; rows in the order they were opened.

    Each sequence, longest first, goes into the row with the least space that still holds it. Every length must be in 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.size == 0 or (sizes.min() >= 1 and sizes.max() <= capacity), "a length is outside 1..capacity"
    rows: list[list[int]] = []
    spaces: list[int] = []  # the different free spaces of open rows, sorted: at most `capacity` values
    rows_with_space: dict[int, deque[int]] = {}
    ordered = sizes.tolist()
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = ordered[index]
        position = bisect_left(spaces, size)
        if position == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[position]
            row = rows_with_space[space].popleft()
            if not rows_with_space[space]:
                del rows_with_space[space], spaces[position]
        rows[row].append(index)
        if space > size:
            if space - size not in rows_with_space:
                insort(spaces, space - size)
                rows_with_space[space - size] = deque()
            rows_with_space[space - size].append(row)
    return rows
