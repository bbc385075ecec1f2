"""The instances of an epoch, for each kind of data: they are numbered, and some of them together become the rows of a batch.

In: a store or shards, a row's length, perhaps a mixture. Out: a `Batch` of any instances. Nothing here knows of steps, order or
seeds; the stream chooses the instances.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.batch import Array, Batch, empty_batch, fill
from keural.data.loading.concatenated import ConcatenatedDocuments
from keural.data.loading.mixture import Mixture
from keural.data.loading.packing import pack
from keural.data.loading.packing_plan import RowPlan, kept_plan
from keural.data.loading.row_layout import RowShape, lay_out
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.files import fingerprint
from keural.recipe import STORES


class Instances(Protocol):
    """Instances ``0..len - 1`` of an epoch; rows are `row_length` long."""

    row_length: int
    """Of batches; those of pairs are of other lengths, and this is what `once` has."""

    @property
    def lengths(self) -> Array | None:
        """Tokens of every instance, where they differ within a step."""
        ...

    def __len__(self) -> int: ...

    def batch(self, numbers: Array, ranks: int = 1) -> Batch:
        """The rows of some instances; `ranks` is how many share them."""
        ...

    def once(self, rows: int) -> Iterator[Batch]:
        """All of them in order, at most `rows` rows at a time."""
        ...


class Chunks:
    """Concatenated documents, cut into chunks of a row's length; an instance is a chunk."""

    lengths = None

    def __init__(self, store: TokenStore, length: int, mixture: Mixture | None, _: Path, __: RowShape | None) -> None:
        self.documents, self.row_length = ConcatenatedDocuments(store, mixture.ranges if mixture else None), length

    def __len__(self) -> int:
        return -(-self.documents.num_tokens // self.row_length)

    def batch(self, numbers: Array, ranks: int = 1) -> Batch:
        """Rows of consecutive tokens; the last label of a row is the first token of the next chunk when the document goes on."""
        length = self.row_length
        batch = empty_batch(len(numbers), length)
        for row, chunk in enumerate(numbers.tolist()):
            start = chunk * length
            tokens = self.documents.read(start, start + length + 1)
            begin = 0
            sequences, ends = self.documents.spans(start, start + min(length, len(tokens)))
            for segment, (sequence, end) in enumerate(zip(sequences, ends, strict=True), start=1):
                stop = min(end - start, length)
                labels = np.full(stop - begin, -100, dtype=np.int64)
                following = tokens[begin + 1 : min(end - start, length + 1)]
                labels[: len(following)] = following
                fill(batch, row, begin, tokens[begin:stop], labels, segment, sequence)
                begin = stop
            batch.position_ids[row, begin:] = np.arange(length - begin)
        return batch

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`."""
        return _in_order(self, rows)


class PackedRows:
    """Conversations; an instance is a row of whole ones, by a plan that is made once and kept."""

    lengths = None

    def __init__(self, store: TokenStore, length: int, mixture: Mixture | None, plans: Path, _: RowShape | None) -> None:
        self.store, self.row_length, self.mixture, self.plans = store, length, mixture, plans

    @cached_property
    def plan(self) -> RowPlan:
        """Which conversations stand in which row."""
        mixture, store = self.mixture, self.store
        data = fingerprint([store.fingerprint, mixture.fingerprint]) if mixture else store.fingerprint
        return kept_plan(self.plans, store.directory.name, self.row_length, data, self._make_plan)

    def _make_plan(self) -> RowPlan:
        whole = np.arange(self.store.num_sequences)
        ranges = [(each.first, each.stop) for each in self.mixture.ranges] if self.mixture else [(0, len(whole))]
        sequences = np.concatenate([whole[first:stop] for first, stop in ranges])
        return RowPlan.pack(sequences, self.store.lengths()[sequences], self.row_length)

    def __len__(self) -> int:
        return len(self.plan)

    def batch(self, numbers: Array, ranks: int = 1) -> Batch:
        """Rows of whole conversations, one after another."""
        return _packed(self.store, self.plan.rows(numbers), self.row_length)

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`."""
        return _in_order(self, rows)


class Pairs:
    """Preference pairs; an instance is a pair. Those of a batch are put into rows of the length that fits them, a pair never
    divided; in `once` all of them into rows of at most twice a sequence's length.
    """

    def __init__(self, store: TokenStore, length: int, mixture: Mixture | None, _: Path, shape: RowShape | None) -> None:
        self.store, self.row_length = store, STORES[store.kind].sequences_per_row * length
        self.shape = shape or RowShape(self.row_length)
        ranges = [(each.first // 2, each.stop // 2) for each in mixture.ranges] if mixture else [(0, store.num_sequences // 2)]
        self._begins = np.array([begin for begin, _ in ranges])
        self._ends = np.cumsum([end - begin for begin, end in ranges])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def lengths(self) -> Array:
        """Tokens of every instance, both sides together."""
        sides: Array = self.store.lengths().reshape(-1, 2).sum(1)
        return sides[self._pairs(np.arange(len(self)))]

    def batch(self, numbers: Array, ranks: int = 1) -> Batch:
        """Rows of pairs, of which each rank takes equally many; how many there are, and of what length, depends on the pairs."""
        rows, length = lay_out(self.lengths[numbers].tolist(), ranks, self.shape)
        return self._batch(self._pairs(numbers), rows, length)

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`."""
        plan, pairs, multiple = pack(self.lengths, self.row_length), self._pairs(np.arange(len(self))), self.shape.multiple
        for start in range(0, len(plan), rows):
            chosen = plan[start : start + rows]
            fullest = max(int(self.lengths[row].sum()) for row in chosen)
            yield self._batch(pairs, chosen, min(-(-fullest // multiple) * multiple, self.row_length))

    def _pairs(self, numbers: Array) -> Array:
        """The store's pairs that instances are."""
        within = np.searchsorted(self._ends, numbers, side="right")
        found: Array = self._begins[within] + numbers - np.concatenate([[0], self._ends])[within]
        return found

    def _batch(self, numbered: Array, rows: list[list[int]], length: int) -> Batch:
        """Rows of pairs, by their place in `numbered`, and where each pair stands: in the order of the store within a row, wherever
        packing has put it.
        """
        places, pairs, sides = [], [], []
        for row, members in enumerate(rows):
            found = numbered[members].tolist()
            sides.append([2 * pair + side for pair in found for side in (0, 1)])
            ends = np.cumsum([0, *(len(self.store.sequence(sequence)) for sequence in sides[-1])]).tolist()
            bounds = zip(sides[-1][::2], ends[::2], ends[1::2], ends[2::2], strict=False)
            places += [(row, *where) for _, *where in sorted(bounds)]
            pairs += sorted(found)
        weights = None if self.store.pair_weights is None else self.store.pair_weights[np.array(pairs, dtype=np.int64)]
        packed = _packed(self.store, sides, length)
        return replace(packed, pairs=np.array(places, dtype=np.int64).reshape(-1, 4), pair_weights=weights)


class Answers(Pairs):
    """Labelled answers; an instance is one, with its prompt, and its prompt with the answer to another one. Both are put into rows
    of their own, as the second is only looked at.
    """

    @property
    def desirable(self) -> NDArray[np.bool_]:
        """Which instances are good answers."""
        assert self.store.labels is not None
        return self.store.labels[self._pairs(np.arange(len(self)))]

    def batch(self, numbers: Array, ranks: int = 1) -> Batch:
        """Rows of answers, of which each rank takes equally many, and rows of what they are compared with."""
        records = self._pairs(numbers)
        return self._whole(records, lambda lengths: lay_out(lengths.tolist(), ranks, self.shape))

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`; `rows` counts those of answers."""
        records = self._pairs(np.arange(len(self)))
        plan = pack(self._sides[records, 0], self.row_length)
        for start in range(0, len(plan), rows):
            chosen = records[np.concatenate(plan[start : start + rows])]
            yield self._whole(chosen, lambda lengths: _filled(lengths, self.row_length, self.shape.multiple))

    @cached_property
    def _sides(self) -> Array:
        """Tokens of both sequences of every record of the store."""
        return self.store.lengths().reshape(-1, 2)

    def _whole(self, records: Array, layout: Callable[[Array], tuple[list[list[int]], int]]) -> Batch:
        """Records of the store in rows, by a function of their lengths that gives rows and the length of these."""
        own, other = (self._rows(records, side, *layout(self._sides[records, side])) for side in (0, 1))
        return replace(own, mismatched=other)

    def _rows(self, records: Array, side: int, rows: list[list[int]], length: int) -> Batch:
        """One sequence of each record, by its place in `records`, in the order of the store within a row."""
        assert self.store.labels is not None
        found = [np.sort(records[members]).tolist() for members in rows]
        places = []
        for row, members in enumerate(found):
            ends = np.cumsum([0, *(self._sides[record, side] for record in members)]).tolist()
            places += [(row, *bounds) for bounds in pairwise(ends)]
        packed = _packed(self.store, [[2 * record + side for record in members] for members in found], length)
        order = np.array([record for members in found for record in members], dtype=np.int64)
        return replace(packed, pairs=np.array(places, dtype=np.int64).reshape(-1, 3), desirable=self.store.labels[order])


def _filled(lengths: Array, limit: int, multiple: int) -> tuple[list[list[int]], int]:
    """As few rows of at most `limit` as there can be, of the length of the fullest, which is filled up to a multiple."""
    rows = pack(lengths, limit)
    fullest = max(int(lengths[row].sum()) for row in rows)
    return rows, min(-(-fullest // multiple) * multiple, limit)


class ShardSequences:
    """Published shards as they are; an instance is a sequence, a row. Padding and stray marks are not trained.

    `sequence_ids` are positions: that of a document's first token among all positions of all shards.
    """

    lengths = None

    def __init__(self, shards: PublishedShards) -> None:
        self.shards, self.row_length = shards, shards.length

    def __len__(self) -> int:
        return self.shards.num_sequences

    def batch(self, numbers: Array, ranks: int = 1) -> Batch:
        """Rows of documents, told apart by BOS and EOS."""
        batch = empty_batch(len(numbers), self.row_length)
        for row, number in enumerate(numbers.tolist()):
            tokens, non_padding, starts = self.shards.read(number)
            used = int(non_padding.sum())
            begins = np.flatnonzero(starts).tolist()
            for segment, (begin, end) in enumerate(zip(begins, [*begins[1:], used], strict=True), start=1):
                labels = np.append(tokens[begin + 1 : end].astype(np.int64), -100)
                fill(batch, row, begin, tokens[begin:end], labels, segment, number * self.row_length + begin)
            batch.position_ids[row, used:] = np.arange(self.row_length - used)
        return batch

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`."""
        return _in_order(self, rows)


STORE_INSTANCES: dict[str, Callable[[TokenStore, int, Mixture | None, Path, RowShape | None], Instances]] = {
    "documents": Chunks,
    "conversations": PackedRows,
    "pairs": Pairs,
    "answers": Answers,
}
"""The instances of each kind of store, from the store, a sequence's length, the mixture, where plans are kept, and what rows of
pairs may be.
"""


def _in_order(instances: Instances, rows: int) -> Iterator[Batch]:
    for start in range(0, len(instances), rows):
        yield instances.batch(np.arange(start, min(start + rows, len(instances))))


def _packed(store: TokenStore, rows: Sequence[list[int]], length: int) -> Batch:
    """Rows of whole sequences, one after another."""
    batch = empty_batch(len(rows), length)
    for row, sequences in enumerate(rows):
        begin = 0
        for number, sequence in enumerate(sequences, start=1):
            tokens = store.sequence(sequence)
            labels = np.full(len(tokens), -100, dtype=np.int64)
            labels[:-1] = np.where(store.loss_mask(sequence)[1:], tokens[1:].astype(np.int64), -100)
            fill(batch, row, begin, tokens, labels, number, sequence)
            begin += len(tokens)
        batch.position_ids[row, begin:] = np.arange(length - begin)
    return batch
