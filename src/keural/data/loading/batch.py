"""What an optimizer step sees: rows of packed documents as arrays, and how a document is put into one."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

EMPTY = {"input_ids": 0, "labels": -100, "position_ids": 0, "segment_ids": 0, "sequence_ids": -1}
"""What stands where no token is (positions of padding run on from 0 by themselves)."""

Array = NDArray[np.int64]


def no_pairs() -> Array:
    """The pairs of a batch that has none."""
    return np.zeros((0, 4), dtype=np.int64)


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, all arrays int64 ``[rows, T]``.

    `labels[r, t]` is the token that follows `input_ids[r, t]` in its document if that token is trained, else -100.
    `position_ids` restart with every document and with padding; `segment_ids` number a row's documents from 1, 0 is padding;
    `sequence_ids` name the store's sequence at each position, -1 is padding.

    `pairs` ``[pairs, 4]`` says where preference pairs stand: the row, and the positions where the chosen side begins, where the
    rejected one begins, and where that ends. They are ordered by row and number in the store; other data has none.
    `pair_weights` ``[pairs]``, float32, is what each counts in the loss; None: all count the same.

    Of labelled answers `pairs` is ``[answers, 3]``: the row, and where the answer with its prompt begins and ends. `desirable`
    ``[answers]`` says which are good ones. `mismatched` has their prompts with the answers to others, as rows of its own in which
    nothing is trained; it, too, names them in `pairs`.
    """

    input_ids: Array
    labels: Array
    position_ids: Array
    segment_ids: Array
    sequence_ids: Array
    pairs: Array = field(default_factory=no_pairs)
    pair_weights: NDArray[np.float32] | None = None
    desirable: NDArray[np.bool_] | None = None
    mismatched: "Batch | None" = None

    @property
    def num_labels(self) -> int:
        """Positions with a label."""
        return int((self.labels >= 0).sum())

    @property
    def num_tokens(self) -> int:
        """Positions with a token, padding left out."""
        return int((self.segment_ids > 0).sum())

    @property
    def pair_sequences(self) -> Array:
        """The store's sequences ``[2, pairs]`` of all pairs: the chosen ones first; ``[1, answers]`` of labelled answers."""
        row, *begins, _ = self.pairs.T
        return np.stack([self.sequence_ids[row, begin] for begin in begins])

    @property
    def parts(self) -> "tuple[Batch, ...]":
        """All rows that forward passes see: its own, and those of `mismatched`."""
        return (self,) if self.mismatched is None else (self, self.mismatched)

    def select(self, rows: slice | Array | list[int]) -> "Batch":
        """Some rows of the batch, without `mismatched`, which is cut by itself."""
        kept = np.arange(len(self.input_ids))[rows]
        places = [np.flatnonzero(self.pairs[:, 0] == row) for row in kept.tolist()]
        found = [self.pairs[place] for place in places]
        for number, of_row in enumerate(found):
            of_row[:, 0] = number
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in EMPTY}
        chosen = np.concatenate([np.zeros(0, dtype=int), *places])
        weights = None if self.pair_weights is None else self.pair_weights[chosen]
        desirable = None if self.desirable is None else self.desirable[chosen]
        pairs = np.concatenate([self.pairs[:0], *found])
        return replace(self, **arrays, pairs=pairs, pair_weights=weights, desirable=desirable, mismatched=None)

    def share(self, rank: int, world: int) -> "Batch":
        """Rows ``rank::world``, with an empty row added where others have one more, so that all ranks have equally many."""
        whole, missing = self, -len(self.input_ids) % world
        if missing:
            empty = empty_batch(missing, self.input_ids.shape[1])
            arrays: dict[str, Any] = {name: np.concatenate([getattr(self, name), getattr(empty, name)]) for name in EMPTY}
            whole = replace(self, **arrays)
        mismatched = self.mismatched.share(rank, world) if self.mismatched is not None else None
        return replace(whole.select(slice(rank, None, world)), mismatched=mismatched)


class Segment(NamedTuple):
    """A piece of a row: `length` tokens of store sequence `sequence`, from position `start` of the row."""

    sequence: int
    start: int
    length: int


def empty_batch(rows: int, length: int) -> Batch:
    """Rows of nothing but padding."""
    arrays: dict[str, Any] = {name: np.full((rows, length), fill, dtype=np.int64) for name, fill in EMPTY.items()}
    arrays["position_ids"][:] = np.arange(length)
    return Batch(**arrays, pair_weights=None)


def fill(batch: Batch, row: int, begin: int, tokens: NDArray[np.uint32], labels: Array, segment: int, sequence: int) -> None:
    """Put one document (or piece of one) into a row at `begin`."""
    place = slice(begin, begin + len(tokens))
    batch.input_ids[row, place] = tokens
    batch.labels[row, place] = labels
    batch.position_ids[row, place] = np.arange(len(tokens))
    batch.segment_ids[row, place] = segment
    batch.sequence_ids[row, place] = sequence


def segments_of(segments: Array, sequences: Array) -> list[Segment]:
    """The pieces of one row, from its segment and sequence ids."""
    starts = [int(np.argmax(segments == number)) for number in range(1, int(segments.max()) + 1)]
    return [Segment(int(sequences[start]), start, int((segments == number).sum())) for number, start in enumerate(starts, start=1)]
