"""The instances of an epoch, for each kind of data: they are numbered, and some of them together become the rows of a batch.

In: a store or shards, a row's length, perhaps a mixture. Out: a `Batch` of any instances. Nothing here knows of steps, order or
seeds; the stream chooses the instances.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from keural.data.loading.batch import Array, Batch, empty_batch, fill
from keural.data.loading.concatenated import ConcatenatedDocuments
from keural.data.loading.mixture import Mixture
from keural.data.loading.packing import pack
from keural.data.loading.packing_plan import RowPlan, kept_plan
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.files import fingerprint


class Instances(Protocol):
    """Instances ``0..len - 1`` of an epoch; rows are `row_length` long."""

    row_length: int

    def __len__(self) -> int: ...

    def batch(self, numbers: Array) -> Batch:
        """The rows of some instances."""
        ...

    def once(self, rows: int) -> Iterator[Batch]:
        """All of them in order, at most `rows` rows at a time."""
        ...


class Chunks:
    """Concatenated documents, cut into chunks of a row's length; an instance is a chunk."""

    def __init__(self, store: TokenStore, length: int, mixture: Mixture | None, _: Path) -> None:
        self.documents, self.row_length = ConcatenatedDocuments(store, mixture.ranges if mixture else None), length

    def __len__(self) -> int:
        return -(-self.documents.num_tokens // self.row_length)

    def batch(self, numbers: Array) -> Batch:
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

    def __init__(self, store: TokenStore, length: int, mixture: Mixture | None, plans: Path) -> None:
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

    def batch(self, numbers: Array) -> Batch:
        """Rows of whole conversations, one after another."""
        return _packed(self.store, self.plan.rows(numbers), self.row_length)

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`."""
        return _in_order(self, rows)


class Pairs:
    """Preference pairs; an instance is a pair. Those of a batch are packed into rows of twice the length, a pair never divided."""

    def __init__(self, store: TokenStore, length: int, mixture: Mixture | None, _: Path) -> None:
        self.store, self.row_length = store, 2 * length
        ranges = [(each.first // 2, each.stop // 2) for each in mixture.ranges] if mixture else [(0, store.num_sequences // 2)]
        self._begins = np.array([begin for begin, _ in ranges])
        self._ends = np.cumsum([end - begin for begin, end in ranges])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, numbers: Array) -> Batch:
        """Rows of pairs; how many there are depends on their lengths."""
        return self._batch(self._rows(numbers))

    def once(self, rows: int) -> Iterator[Batch]:
        """See `Instances`."""
        plan = self._rows(np.arange(len(self)))
        for start in range(0, len(plan), rows):
            yield self._batch(plan[start : start + rows])

    def _batch(self, rows: list[list[int]]) -> Batch:
        """Rows of pairs, and where each pair stands: in the order of the store within a row, wherever packing has put it."""
        places, pairs = [], []
        for row, sequences in enumerate(rows):
            ends = np.cumsum([0, *(len(self.store.sequence(sequence)) for sequence in sequences)]).tolist()
            bounds = zip(sequences[::2], ends[::2], ends[1::2], ends[2::2], strict=False)
            places += [(row, *where) for _, *where in sorted(bounds)]
            pairs += sorted(sequence // 2 for sequence in sequences[::2])
        weights = None if self.store.pair_weights is None else self.store.pair_weights[np.array(pairs, dtype=np.int64)]
        packed = _packed(self.store, rows, self.row_length)
        return replace(packed, pairs=np.array(places, dtype=np.int64).reshape(-1, 4), pair_weights=weights)

    def _rows(self, numbers: Array) -> list[list[int]]:
        """Sequences row by row: of each pair first the chosen, then the rejected side."""
        within = np.searchsorted(self._ends, numbers, side="right")
        pairs = (self._begins[within] + numbers - np.concatenate([[0], self._ends])[within]).tolist()
        sizes = [len(self.store.sequence(2 * pair)) + len(self.store.sequence(2 * pair + 1)) for pair in pairs]
        return [[2 * pairs[index] + side for index in row for side in (0, 1)] for row in pack(sizes, self.row_length)]


class ShardSequences:
    """Published shards as they are; an instance is a sequence, a row. Padding and stray marks are not trained.

    `sequence_ids` are positions: that of a document's first token among all positions of all shards.
    """

    def __init__(self, shards: PublishedShards) -> None:
        self.shards, self.row_length = shards, shards.length

    def __len__(self) -> int:
        return self.shards.num_sequences

    def batch(self, numbers: Array) -> Batch:
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


STORE_INSTANCES: dict[str, Callable[[TokenStore, int, Mixture | None, Path], Instances]] = {
    "documents": Chunks,
    "conversations": PackedRows,
    "pairs": Pairs,
}
"""The instances of each kind of store, from the store, a row's length, the mixture and where plans are kept."""


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
