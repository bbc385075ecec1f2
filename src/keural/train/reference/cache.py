"""Log-probabilities of the reference model, computed once for each pair and kept on disk.

In: a file of records (`RecordFile`), a store of pairs or labelled answers (which are two sequences, too), what computes, and the
batches that training is going to see. Out: the values of any sequences of the store. They come from the same code, rows and
micro-batches as training's own forward passes, so where a stage computes them itself, policy and reference agree to the last bit at
step 0 and the DPO loss is ln 2; values that were computed in other rows differ from those by rounding. A computation that was
stopped, or whose store has grown since, goes on with what is missing.
"""

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.terminal import say
from keural.train.micro_batches import MicroBatch, micro_batches
from keural.train.processes.ranks import Ranks
from keural.train.reference.records import RecordFile, pair_digests

Compute = Callable[[MicroBatch], Tensor]
"""Reference log-probabilities of a micro-batch's sequences, in the shape of `PairIndices.sequences`."""


class ReferenceCache:
    """Reference log-probabilities of the pairs of one store; NaN where not computed yet. Equal pairs share their values.

    Args:
        file: where they are kept; several stores may share one.
        store: of pairs or labelled answers.
        ranks: rank 0 reads and writes; every rank has all values in memory.

    Raises `UserError` as `RecordFile.read` does.
    """

    def __init__(self, file: RecordFile, store: TokenStore, ranks: Ranks) -> None:
        self.file, self.store, self.ranks = file, store, ranks
        self._digests = np.zeros((0, 2), dtype=np.uint64)  # of the different pairs, on rank 0
        self._number: NDArray[np.int64] = ranks.on_main(self._number_pairs)
        self._values, self.damaged = ranks.on_main(self._read)

    @property
    def values(self) -> NDArray[np.float32]:
        """Of every sequence of the store."""
        return self._values[self._number].reshape(-1)

    def __call__(self, sequences: NDArray[np.int64]) -> Tensor:
        """Values of the given sequences, in the shape of `sequences`, on this rank's device."""
        return torch.from_numpy(self._of(sequences)).to(self.ranks.device)

    def fill(self, compute: Compute, batches: Iterable[Batch], limit: int | None, stop: Callable[[], bool] = lambda: False) -> int:
        """Compute what is missing for `batches`, this rank's rows of each step in turn. Every rank must call it.

        Args:
            compute: the reference model, see `Compute`.
            batches: of this rank; their number is the same on all ranks.
            limit: tokens per micro-batch, as in training.
            stop: asked before each batch; when any rank says yes, the rest is left for the next start.

        Returns:
            How many batches were computed.

        Raises:
            UserError: when another process is filling the same file, the disk refuses, or a value is not finite.
        """
        computed, writing = 0, False
        with contextlib.ExitStack() as stack:
            for batch in batches:
                if self.ranks.any(stop()) or not np.isnan(self._values).any():
                    break
                if self._missing(batch) and not writing:
                    self._values, self.damaged = self.ranks.on_main(lambda: self._begin(stack))
                    writing = True
                if self._missing(batch):
                    self._store(batch, compute, limit)
                    computed += 1
        return computed

    def missing(self, batches: Iterable[Batch]) -> tuple[int, int]:
        """How many of the pairs in all ranks' `batches` have no value, and how many pairs there are. Every rank must call it."""
        seen = {number for batch in batches for number in self._number[batch.pair_sequences[0] // 2].tolist()}
        numbers = sorted(set().union(*self.ranks.gather(seen)))
        return int(np.isnan(self._values[numbers, 0]).sum()), len(numbers)

    def _of(self, sequences: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._values[self._number[sequences // 2], sequences % 2]
        return found

    def _missing(self, batch: Batch) -> bool:
        """Whether any rank's part of this batch has a sequence without a value."""
        return self.ranks.any(bool(np.isnan(self._of(batch.pair_sequences)).any()))

    def _store(self, batch: Batch, compute: Compute, limit: int | None) -> None:
        """Put values of all ranks where there is none yet: the first computation of a pair stands."""
        micros = [micro for part in batch.parts for micro in micro_batches(part, limit, self.ranks.device)]
        found = [(micro.pairs.sequences.ravel(), compute(micro).detach().cpu().numpy().ravel()) for micro in micros]
        parts = [part for parts in self.ranks.gather(found) for part in parts]
        sequences, computed = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if not np.isfinite(computed).all():
            raise UserError(
                f"{self.store.directory}: record {sequences[~np.isfinite(computed)][0] // 2} has a reference log-probability that "
                "is not finite; the model that the stage starts from is damaged, or computes too coarsely (train.compute_dtype)"
            )
        sides, places = np.unique(2 * self._number[sequences // 2] + sequences % 2, return_index=True)
        numbers, values = sides[::2] // 2, computed[places].reshape(-1, 2)  # every record's both sequences are in its step
        new = np.isnan(self._values[numbers, 0])
        numbers, values = numbers[new], values[new]
        self._values[numbers] = values
        self.ranks.on_main(lambda: self.file.append(self._digests[numbers], values))

    def _begin(self, stack: contextlib.ExitStack) -> tuple[NDArray[np.float32], int]:
        """Open the file for writing, and read it again: another process may have filled it meanwhile."""
        damaged = self.file.read().damaged
        stack.enter_context(self.file.writing())
        if damaged:
            say(f"{self.file.path}: {damaged} records are damaged, and their values computed again")
        return self._read()

    def _number_pairs(self) -> NDArray[np.int64]:
        """For each pair of the store its number among the different ones."""
        self._digests, numbers = np.unique(pair_digests(self.store), axis=0, return_inverse=True)
        return numbers.reshape(-1)

    def _read(self) -> tuple[NDArray[np.float32], int]:
        """The values ``[different pairs, 2]``, and how many records of the file are damaged."""
        found = self.file.read()
        values = np.full((len(self._digests), 2), np.nan, dtype=np.float32)
        places = {digest.tobytes(): number for number, digest in enumerate(self._digests)}
        for pair, value in zip(found.pairs, found.values, strict=True):
            number = places.get(pair.tobytes(), -1)
            if number >= 0 and np.isnan(values[number, 0]):
                values[number] = value
        return values, found.damaged
