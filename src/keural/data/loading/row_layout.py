"""The rows of a step's pairs: as few positions as possible, and equally much on every rank.

In: the lengths of the pairs, the number of ranks, and what a row may be. Out: which pairs stand in which row, and how long the rows
are. Rows of one step are of one length, that of the fullest, so hardly anything in them is padding; their number is a multiple of
the ranks', so that no rank computes on an empty one. What attends document by document does not mind how long a row is; what masks
rows gets short ones.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from keural.data.loading.packing import pack


@dataclass(frozen=True)
class RowShape:
    """What rows of pairs may be."""

    limit: int | None
    """Tokens of the longest row, at least those of two full sequences; None: a rank's share of a step is one row."""
    multiple: int = 1
    """Rows are filled up to a multiple of so many tokens (or to the limit), where every other length costs a compilation."""


def lay_out(lengths: Sequence[int], ranks: int, shape: RowShape) -> tuple[list[list[int]], int]:
    """Put pairs of these lengths into rows, none divided.

    Returns:
        The pairs of each row, by their place in `lengths`, and the length of the rows. Where there are fewer pairs than ranks some
        rows are empty.
    """
    total, longest = sum(lengths), max(lengths)
    limit = max(total if shape.limit is None else shape.limit, longest)
    number = ranks * -(-total // (ranks * limit))
    spread = even_rows(lengths, number)
    while _fullest(spread, lengths) > limit:
        number += ranks
        spread = even_rows(lengths, number)
    packed = pack(lengths, limit)
    packed += [[] for _ in range(-len(packed) % ranks)]
    rows = min((spread, packed), key=lambda rows: len(rows) * _fullest(rows, lengths))
    filled = -(-_fullest(rows, lengths) // shape.multiple) * shape.multiple
    return rows, max(min(filled, limit), _fullest(rows, lengths))


def even_rows(lengths: Sequence[int], number: int) -> list[list[int]]:
    """`number` rows of which the fullest has about as few tokens as it can: the least capacity at which packing needs no more of
    them is searched for (Coffman, Garey and Johnson 1978), below what dealing out reaches.
    """
    rows = _dealt(lengths, number)
    least, most = max(max(lengths), -(-sum(lengths) // number)), _fullest(rows, lengths)
    while least < most:
        capacity = (least + most) // 2
        packed = pack(lengths, capacity)
        if len(packed) <= number:
            rows, most = packed + [[] for _ in range(number - len(packed))], capacity
        else:
            least = capacity + 1
    return rows


def _dealt(lengths: Sequence[int], number: int) -> list[list[int]]:
    """`number` rows: each pair, longest first, goes where there are the fewest tokens (Graham 1969)."""
    rows: list[list[int]] = [[] for _ in range(number)]
    tokens = [(0, row) for row in range(number)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        least, row = heapq.heappop(tokens)
        rows[row].append(place)
        heapq.heappush(tokens, (least + lengths[place], row))
    return rows


def _fullest(rows: list[list[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[place] for place in row) for row in rows)
