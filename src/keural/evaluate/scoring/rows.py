"""Requests as rows of tokens, in which what they share stands once.

In: groups of requests, each group of one item. Out: rows. A row is a tree of tokens written in depth-first order: the choices of an
item branch off behind its question, and items that begin alike (with the same examples) share that beginning. A token sees its
ancestors alone, which `ends` says: token j is an ancestor of token i where j <= i < ends[j]. Positions are depths, so that every
request reads as it would by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from keural.evaluate.tasks.items import Likelihood

SMALL = 256
"""Tokens up to which a row takes whatever comes: shorter ones leave a processor idle."""


class Edge(NamedTuple):
    """A token that is predicted: `label` after the token at `parent` of the row."""

    group: int
    request: int
    parent: int
    label: int


@dataclass
class Row:
    """A tree of tokens in depth-first order."""

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """The groups whose requests stand in it, all of each."""
    edges: list[Edge] = field(default_factory=list)
    _path: list[int] = field(default_factory=list)
    """Places of the tokens from the root to the last one."""

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens the row's last branch and a sequence begin with alike."""
        return _alike([self.ids[place] for place in self._path[: len(ids)]], ids)

    def add(self, ids: Sequence[int]) -> list[int]:
        """Put a sequence in; gives the places of its tokens."""
        shared = self.shared(ids)
        first = len(self.ids)
        self.ids += ids[shared:]
        self.depths += range(shared, len(ids))
        self._path = [*self._path[:shared], *range(first, len(self.ids))]
        return self._path

    def ends(self) -> list[int]:
        """For each token the place after its last descendant."""
        found = [len(self.ids)] * len(self.ids)
        waiting: list[int] = []
        for place, depth in enumerate(self.depths):
            while waiting and self.depths[waiting[-1]] >= depth:
                found[waiting.pop()] = place
            waiting.append(place)
        return found


def rows_of(groups: Sequence[Sequence[Likelihood]], attention: float) -> Iterator[Row]:
    """The groups in rows, longest row first.

    `attention` is what attending to one more token costs, relative to all else that is done for a token: a row of n tokens costs
    n + attention * n². A group joins a row where that costs less than a row of its own.
    """
    order = sorted(range(len(groups)), key=lambda number: sorted(inputs(request) for request in groups[number]))
    rows: list[Row] = []
    row = Row()
    for number in order:
        sequences = sorted({inputs(request) for request in groups[number]})
        size = len(sequences[0]) + sum(len(sequence) - _alike(before, sequence) for before, sequence in pairwise(sequences))
        new = size - row.shared(sequences[0])
        if (
            row.ids
            and len(row.ids) + new > SMALL
            and _cost(len(row.ids) + new, attention) - _cost(len(row.ids), attention) > _cost(size, attention)
        ):
            rows.append(row)
            row = Row()
        _put(row, number, groups[number], sequences)
    if row.ids:
        rows.append(row)
    yield from sorted(rows, key=lambda row: -len(row.ids))


def inputs(request: Likelihood) -> tuple[int, ...]:
    """The tokens that are read for a request."""
    return request.context + request.continuation[:-1]


def _put(row: Row, number: int, requests: Sequence[Likelihood], sequences: Sequence[tuple[int, ...]]) -> None:
    row.groups.append(number)
    places = {sequence: row.add(sequence) for sequence in sequences}
    for index, request in enumerate(requests):
        path = places[inputs(request)]
        start = len(request.context) - 1
        row.edges += [Edge(number, index, path[start + step], label) for step, label in enumerate(request.continuation)]


def _cost(tokens: int, attention: float) -> float:
    return tokens + attention * tokens * tokens


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    most = min(len(first), len(second))
    return next((place for place in range(most) if first[place] != second[place]), most)


def batches(rows: Sequence[Row], tokens: int) -> Iterator[Sequence[Row]]:
    """Rows together, at most so many tokens with what fills them up; they come longest first."""
    start = 0
    while start < len(rows):
        count = max(1, tokens // len(rows[start].ids))
        yield rows[start : start + count]
        start += count
