"""Log-probabilities of the reference model, computed once per stage and kept on disk.

In: the policy before its first step, and the batches that training is going to see. Out: one float32 per sequence of a pairs
store. They come from the same code, rows and micro-batches as training's own forward passes, so at step 0 policy and reference
agree to the last bit and the DPO loss is ln 2. A computation that was stopped goes on where it was.

Each value stands beside a checksum of itself, its place and what it was computed from, so that one that a killed process wrote by
half, or that was damaged since, is known and computed again.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.data.permutation import mixed
from keural.errors import UserError
from keural.files import CheckedFile, atomic_directory
from keural.files import fingerprint as fingerprint_of
from keural.terminal import say
from keural.train.micro_batches import micro_batches
from keural.train.objectives.preference import answer_logprobs
from keural.train.parallel import reshard
from keural.train.policy import Policy
from keural.train.ranks import Ranks

MANIFEST, VALUES, CHECKSUMS = "manifest.json", "logprobs.npy", "checksums.npy"


class ReferenceManifest(CheckedFile):
    """`manifest.json` of a directory of reference values."""

    remedy: ClassVar[str] = "delete the directory that it is in and run the same command again"

    fingerprint: str
    """Of the initial weights, the store and the stage."""
    sequences: int


class ReferenceCache:
    """Reference log-probabilities of the sequences of one store; NaN where not computed yet.

    Args:
        directory: where they are kept; made when missing, made anew when it belongs to other weights or another store.
        fingerprint: of the initial weights, the store and the stage.
        sequences: sequences in the store.
        ranks: rank 0 writes; every rank has all values in memory.
    """

    def __init__(self, directory: Path, fingerprint: str, sequences: int, ranks: Ranks) -> None:
        self.directory, self.fingerprint, self.ranks = directory, fingerprint, ranks
        self._files: dict[str, np.memmap] = {}
        self.values: np.ndarray = ranks.on_main(lambda: self._open(sequences))

    def __call__(self, sequences: np.ndarray) -> Tensor:
        """Values of the given sequences, in the shape of `sequences`, on this rank's device."""
        return torch.from_numpy(self.values[sequences]).to(self.ranks.device)

    def fill(
        self,
        policy: Policy,
        batches: Iterable[Batch],
        limit: int | None,
        exact_mode: bool = False,
        stop: Callable[[], bool] = lambda: False,
        ld_alpha: float = 1.0,
    ) -> int:
        """Compute what is missing for `batches`, this rank's rows of each step in turn. Every rank must call it.

        Args:
            policy: with the initial weights.
            batches: of this rank; their number is the same on all ranks.
            limit: tokens per micro-batch, as in training.
            exact_mode: record gradients as training does; compiled graphs differ in the last bit otherwise.
            stop: asked before each batch; when any rank says yes, the rest is left for the next start.
            ld_alpha: weight of the tokens by which an answer is longer than the other, as in training.

        Returns:
            How many batches were computed.
        """
        computed = 0
        for batch in batches:
            if self.ranks.any(stop()) or not np.isnan(self.values).any():
                break
            if not self._missing(batch):
                continue
            with torch.set_grad_enabled(exact_mode):
                found = list(self._logprobs(policy, batch, limit, ld_alpha))
            self._store(found)
            computed += 1
        reshard(policy)
        self.ranks.on_main(self._flush)
        return computed

    def _missing(self, batch: Batch) -> bool:
        """Whether any rank's part of this batch has a sequence without a value."""
        sequences = batch.sequence_ids[batch.sequence_ids >= 0]
        return self.ranks.any(bool(np.isnan(self.values[sequences]).any()))

    def _logprobs(
        self, policy: Policy, batch: Batch, limit: int | None, ld_alpha: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for micro in micro_batches(batch, limit, self.ranks.device):
            logprobs = policy(micro).logprobs
            values = answer_logprobs(logprobs.detach(), micro, ld_alpha)
            yield micro.pairs.sequences.ravel(), values.flatten().cpu().numpy()

    def _store(self, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Put values of all ranks where there is none yet: the first computation of a sequence stands."""
        parts = [part for parts in self.ranks.gather(found) for part in parts]
        sequences, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        new = np.isnan(self.values[sequences])
        self.values[sequences[new]] = values[new]
        if self.ranks.is_main:
            self._files[VALUES][sequences[new]] = values[new]
            self._files[CHECKSUMS][sequences[new]] = self._checksums(sequences[new], values[new])

    def _open(self, sequences: int) -> np.ndarray:
        """The values that are there and are what was written; NaN for the others."""
        manifest = ReferenceManifest(fingerprint=self.fingerprint, sequences=sequences)
        if ReferenceManifest.find(self.directory / MANIFEST) != manifest:
            with atomic_directory(self.directory) as directory:
                np.save(directory / VALUES, np.full(sequences, np.nan, dtype="<f4"))
                np.save(directory / CHECKSUMS, np.zeros(sequences, dtype="<u4"))
                manifest.write(directory / MANIFEST)
        self._files = {name: self._mapped(name, sequences) for name in (VALUES, CHECKSUMS)}
        values, checksums = np.array(self._files[VALUES]), np.array(self._files[CHECKSUMS])
        right = checksums == self._checksums(np.arange(sequences), values)
        if damaged := int((~right & ~(np.isnan(values) & (checksums == 0))).sum()):
            say(f"{self.directory / VALUES}: {damaged} values are damaged or half-written, and computed again")
        values[~right] = np.nan
        return values

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def _mapped(self, name: str, sequences: int) -> np.memmap:
        path, dtype = self.directory / name, np.dtype("<f4" if name == VALUES else "<u4")
        try:
            file = np.load(path, mmap_mode="r+", allow_pickle=False)
            if (file.dtype, file.shape) != (dtype, (sequences,)):
                raise ValueError(f"{file.dtype} {file.shape} instead of {dtype} {(sequences,)}")
        except (OSError, ValueError, TypeError, EOFError, OverflowError) as error:
            raise UserError(f"{path}: damaged ({error}); delete {self.directory} and run the same command again") from error
        assert isinstance(file, np.memmap)
        return file

    def _checksums(self, sequences: np.ndarray, values: np.ndarray) -> NDArray[np.uint32]:
        """Of each value, at its place, computed from what the fingerprint says."""
        keys = sequences.astype(np.uint64) << np.uint64(32) | values.astype("<f4").view("<u4")
        return (mixed(mixed(keys) ^ np.uint64(int(fingerprint_of(self.fingerprint)[:16], 16))) >> np.uint64(32)).astype(np.uint32)
