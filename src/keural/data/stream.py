"""The stream: which tokens an optimizer step sees, as a pure function of (store, settings, seed, step).

There is no iterator state. An epoch is a permutation of the store's units, taken batch by batch; where an epoch ends inside a
batch, the next one fills it, so every step has the same size. So any batch can be made again, resuming is exact and costs
nothing, and the number of ranks and micro-batches does not change what a step is.

- next_token: the (already shuffled) documents are one flat line of tokens, a unit is a window of T of them. Nothing is in memory.
- sft: a unit is a row of T in which whole conversations are packed; the plan is made once and kept beside the store.
- dpo: a unit is a pair; the pairs of a step are packed into rows of 2 T, a pair never divided. The number of rows differs
  between steps.

Packed neighbours are told apart by positions that restart at 0 with every document, and at the start of a row.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keural.data.packing import pack
from keural.data.permutation import Permutation
from keural.data.store import Kind, TokenStore
from keural.errors import UserError
from keural.files import fingerprint, write_atomic
from keural.recipe import Objective

STORE_KIND: dict[str, Kind] = {"next_token": "documents", "sft": "conversations", "dpo": "pairs"}
"""What kind of store an objective trains on."""
EMPTY = {"input_ids": 0, "labels": -100, "position_ids": 0, "segment_ids": 0, "sequence_ids": -1}
"""What stands where no token is (positions of padding run on from 0 by themselves)."""
PLAN_VERSION = 1

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, all arrays int64 ``[rows, T]``.

    `labels[r, t]` is the token that follows `input_ids[r, t]` in its document if that token is trained, else -100.
    `position_ids` restart with every document and with padding; `segment_ids` number a row's documents from 1, 0 is padding;
    `sequence_ids` name the store's sequence at each position, -1 is padding.
    """

    input_ids: Array
    labels: Array
    position_ids: Array
    segment_ids: Array
    sequence_ids: Array

    @property
    def counted_tokens(self) -> int:
        """Positions with a label."""
        return int((self.labels >= 0).sum())

    @property
    def real_tokens(self) -> int:
        """Positions with a token, padding left out."""
        return int((self.segment_ids > 0).sum())

    def select(self, rows: slice | Array | list[int]) -> "Batch":
        """Some rows of the batch."""
        return Batch(**{name: getattr(self, name)[rows] for name in EMPTY})

    def share(self, rank: int, world: int) -> "Batch":
        """Rows ``rank::world``, with an empty row added where others have one more, so that all ranks have equally many."""
        missing = -len(self.input_ids) % world
        if not missing:
            return self.select(slice(rank, None, world))
        empty = empty_batch(missing, self.input_ids.shape[1])
        return Batch(**{name: np.concatenate([getattr(self, name), getattr(empty, name)])[rank::world] for name in EMPTY})


class Segment(NamedTuple):
    """A piece of a row: `length` tokens of store sequence `sequence`, from position `start` of the row."""

    sequence: int
    start: int
    length: int


def empty_batch(rows: int, length: int) -> Batch:
    """Rows of nothing but padding."""
    arrays = {name: np.full((rows, length), fill, dtype=np.int64) for name, fill in EMPTY.items()}
    arrays["position_ids"][:] = np.arange(length)
    return Batch(**arrays)


class Stream:
    """Batches of a store for one objective. See the module's docstring for what a unit is.

    `batch_rows` (next_token, sft) or `batch_pairs` (dpo) is the size of an optimizer step; `sequence_length` is T. Raises
    `UserError` when the store is of another kind or holds a conversation (or side of a pair) longer than T.
    """

    def __init__(
        self,
        store: TokenStore,
        objective: Objective,
        sequence_length: int,
        batch_rows: int | None = None,
        batch_pairs: int | None = None,
        seed: int = 0,
    ) -> None:
        size = batch_pairs if objective == "dpo" else batch_rows
        assert size, "dpo takes batch_pairs, the other objectives batch_rows"
        _check_store(store, objective, sequence_length)
        self.store, self.objective, self.sequence_length, self.seed = store, objective, sequence_length, seed
        self.batch_size = size
        self.row_length = 2 * sequence_length if objective == "dpo" else sequence_length
        self.fingerprint = fingerprint(
            {
                "store": store.fingerprint,
                "objective": objective,
                "length": sequence_length,
                "batch": size,
                "seed": seed,
                "plan": PLAN_VERSION,
            }
        )

    @cached_property
    def units_per_epoch(self) -> int:
        """Windows, packed rows or pairs in the store."""
        if self.objective == "next_token":
            return -(-self.store.num_tokens // self.sequence_length)
        return self.store.num_sequences // 2 if self.objective == "dpo" else len(self._plan)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every token has been seen once; the last one of an epoch may reach into the next."""
        return self.steps_for(1)

    def steps_for(self, epochs: float) -> int:
        """Steps that see `epochs` times the store, rounded up."""
        return max(1, int(np.ceil(epochs * self.units_per_epoch / self.batch_size - 1e-9)))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of optimizer step `step`, or rank `rank`'s share of it (rows ``rank::world``, equally many on each)."""
        assert step >= 0
        assert 0 <= rank < world
        units = self._units(step)
        if self.objective == "next_token":
            batch = self._windows(units)
        else:
            batch = self._packed_rows(self._pair_rows(units) if self.objective == "dpo" else self._plan.rows(units))
        self.store.forget_pages()
        return batch.share(rank, world)

    def batches_once(self, rows: int) -> Iterator[Batch]:
        """The whole store once, in order, at most `rows` rows (of `row_length`) at a time: for evaluation."""
        if self.objective == "next_token":
            for start in range(0, self.units_per_epoch, rows):
                yield self._windows(np.arange(start, min(start + rows, self.units_per_epoch)))
            return
        units = np.arange(self.units_per_epoch)
        plan = self._pair_rows(units) if self.objective == "dpo" else self._plan.rows(units)
        for start in range(0, len(plan), rows):
            yield self._packed_rows(plan[start : start + rows])

    def describe(self, step: int) -> list[list[Segment]]:
        """What the rows of `step` are made of."""
        batch = self.batch(step)
        return [_segments(segments, ids) for segments, ids in zip(batch.segment_ids, batch.sequence_ids, strict=True)]

    def _units(self, step: int) -> Array:
        """The step's units: positions ``step * size ..`` of the epochs' permutations, one after another."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, inside = np.divmod(positions, self.units_per_epoch)
        parts = [
            Permutation(self.units_per_epoch, self.seed, epoch).take(inside[epochs == epoch])
            for epoch in np.unique(epochs).tolist()
        ]
        return np.concatenate(parts)

    def _windows(self, units: Array) -> Batch:
        """Rows of consecutive tokens; the last label of a row is the first token of the next window when the document goes on."""
        length = self.sequence_length
        batch = empty_batch(len(units), length)
        for row, unit in enumerate(units.tolist()):
            start = unit * length
            tokens = self.store.read(start, start + length + 1)
            first, ends = self.store.spans(start, start + min(length, len(tokens)))
            ends = ends - start
            begin = 0
            for number, end in enumerate(ends.tolist()):
                stop = min(end, length)
                labels = np.full(stop - begin, -100, dtype=np.int64)
                following = tokens[begin + 1 : min(end, length + 1)]
                labels[: len(following)] = following
                _fill(batch, row, begin, tokens[begin:stop], labels, number + 1, first + number)
                begin = stop
            batch.position_ids[row, begin:] = np.arange(length - begin)
        return batch

    def _packed_rows(self, rows: list[list[int]]) -> Batch:
        """Rows of whole sequences, one after another."""
        batch = empty_batch(len(rows), self.row_length)
        for row, sequences in enumerate(rows):
            begin = 0
            for number, sequence in enumerate(sequences, start=1):
                tokens = self.store.sequence(sequence)
                labels = np.full(len(tokens), -100, dtype=np.int64)
                labels[:-1] = np.where(self.store.loss_mask(sequence)[1:], tokens[1:].astype(np.int64), -100)
                _fill(batch, row, begin, tokens, labels, number, sequence)
                begin += len(tokens)
            batch.position_ids[row, begin:] = np.arange(self.row_length - begin)
        return batch

    def _pair_rows(self, pairs: Array) -> list[list[int]]:
        """Pairs packed into rows: of each pair first the chosen, then the rejected side."""
        sizes = [len(self.store.sequence(2 * pair)) + len(self.store.sequence(2 * pair + 1)) for pair in pairs.tolist()]
        rows = pack(sizes, self.row_length)
        return [[2 * int(pairs[index]) + side for index in row for side in (0, 1)] for row in rows]

    @cached_property
    def _plan(self) -> "_Plan":
        """The packed rows of an sft store, read from the file beside the store or made."""
        name = f"{self.store.directory.name}.rows-{self.sequence_length}-{self.store.fingerprint[:16]}-v{PLAN_VERSION}.npy"
        path = self.store.directory.with_name(name)
        plan = _Plan.read(path, self.store.num_sequences)
        if plan is None:
            plan = _Plan.of(pack(self.store.lengths(), self.sequence_length))
            plan.write(path)
        return plan


@dataclass(frozen=True)
class _Plan:
    """Packed rows as two arrays: all sequences row by row, and where each row ends among them."""

    sequences: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.ends)

    def rows(self, units: Array) -> list[list[int]]:
        """The sequences of the given rows."""
        return [self.sequences[self.ends[unit - 1] if unit else 0 : self.ends[unit]].tolist() for unit in units.tolist()]

    @classmethod
    def of(cls, rows: list[list[int]]) -> "_Plan":
        return cls(np.array([sequence for row in rows for sequence in row]), np.cumsum([len(row) for row in rows]))

    @classmethod
    def read(cls, path: Path, num_sequences: int) -> "_Plan | None":
        """The plan in a file, if it is there and names each of `num_sequences` sequences once."""
        try:
            flat = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        plan = cls(flat[:num_sequences], flat[num_sequences:])
        rising = plan.ends.size > 0 and plan.ends[-1] == num_sequences and bool((np.diff(plan.ends, prepend=0) > 0).all())
        return plan if rising and np.array_equal(np.sort(plan.sequences), np.arange(num_sequences)) else None

    def write(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([self.sequences, self.ends]))
        write_atomic(path, buffer.getvalue())


def _check_store(store: TokenStore, objective: Objective, length: int) -> None:
    if store.kind != STORE_KIND[objective]:
        raise UserError(f"{store.directory}: holds {store.kind}; objective {objective} needs {STORE_KIND[objective]}")
    if objective != "next_token" and store.longest > length:
        raise UserError(
            f"{store.directory}: its longest sequence has {store.longest} tokens, more than data.sequence_length {length}; "
            "prepare the data with this length"
        )


def _fill(batch: Batch, row: int, begin: int, tokens: NDArray[np.uint32], labels: Array, segment: int, sequence: int) -> None:
    """Put one document (or piece of one) into a row at `begin`."""
    place = slice(begin, begin + len(tokens))
    batch.input_ids[row, place] = tokens
    batch.labels[row, place] = labels
    batch.position_ids[row, place] = np.arange(len(tokens))
    batch.segment_ids[row, place] = segment
    batch.sequence_ids[row, place] = sequence


def _segments(segments: Array, sequences: Array) -> list[Segment]:
    starts = [int(np.argmax(segments == number)) for number in range(1, int(segments.max()) + 1)]
    return [Segment(int(sequences[start]), start, int((segments == number).sum())) for number, start in enumerate(starts, start=1)]
