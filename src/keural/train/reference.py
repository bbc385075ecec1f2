"""Log-probabilities of the reference model, computed once per stage and kept on disk.

In: the policy before its first step, and the batches that training is going to see. Out: one float32 per sequence of a pairs
store. They come from the same code, rows and micro-batches as training's own forward passes, so at step 0 policy and reference
agree to the last bit and the DPO loss is ln 2. A computation that was stopped goes on where it was.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.errors import UserError
from keural.files import atomic_directory, read_json, sha256_file, write_json
from keural.train.micro_batches import micro_batches
from keural.train.objectives.preference import pair_logprobs
from keural.train.parallel import reshard
from keural.train.policy import Policy
from keural.train.ranks import Ranks

MANIFEST, VALUES = "manifest.json", "logprobs.npy"


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
        self._noted = False  # whether the manifest has a checksum of the values as they are
        self._file: np.memmap
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
    ) -> int:
        """Compute what is missing for `batches`, this rank's rows of each step in turn. Every rank must call it.

        Args:
            policy: with the initial weights.
            batches: of this rank; their number is the same on all ranks.
            limit: tokens per micro-batch, as in training.
            exact_mode: record gradients as training does; compiled graphs differ in the last bit otherwise.
            stop: asked before each batch; when any rank says yes, the rest is left for the next start.

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
                found = list(self._logprobs(policy, batch, limit))
            self._store(found)
            computed += 1
        reshard(policy)
        self.ranks.on_main(self._complete)
        return computed

    def _missing(self, batch: Batch) -> bool:
        """Whether any rank's part of this batch has a sequence without a value."""
        sequences = batch.sequence_ids[batch.sequence_ids >= 0]
        return self.ranks.any(bool(np.isnan(self.values[sequences]).any()))

    def _logprobs(self, policy: Policy, batch: Batch, limit: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for micro in micro_batches(batch, limit, self.ranks.device):
            logprobs = policy(micro).logprobs
            yield micro.pairs.sequences.ravel(), pair_logprobs(logprobs.detach(), micro.pairs).flatten().cpu().numpy()

    def _store(self, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Put values of all ranks where there is none yet: the first computation of a sequence stands."""
        parts = [part for parts in self.ranks.gather(found) for part in parts]
        sequences, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        new = np.isnan(self.values[sequences])
        self.values[sequences[new]] = values[new]
        if self.ranks.is_main:
            if self._noted:  # until all is there again, the file is not what its checksum says
                write_json(self.directory / MANIFEST, {"fingerprint": self.fingerprint, "sha256": None})
                self._noted = False
            self._file[sequences[new]] = values[new]

    def _open(self, sequences: int) -> np.ndarray:
        manifest = self._manifest()
        if manifest is None or manifest.get("fingerprint") != self.fingerprint:
            with atomic_directory(self.directory) as directory:
                np.save(directory / VALUES, np.full(sequences, np.nan, dtype=np.float32))
                write_json(directory / MANIFEST, {"fingerprint": self.fingerprint, "sha256": None})
            manifest = self._manifest()
        path = self.directory / VALUES
        self._noted = manifest is not None and manifest["sha256"] is not None
        if manifest is not None and manifest["sha256"] not in (None, sha256_file(path)):
            raise UserError(f"{path}: damaged (its checksum differs); delete {self.directory} and run the same command again")
        try:
            self._file = np.load(path, mmap_mode="r+")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged ({error}); delete {self.directory} and run the same command again") from error
        return np.array(self._file)

    def _manifest(self) -> dict[str, Any] | None:
        path = self.directory / MANIFEST
        manifest = read_json(path) if path.is_file() else None
        if manifest is not None and not (isinstance(manifest, dict) and {"fingerprint", "sha256"} <= manifest.keys()):
            raise UserError(f"{path}: damaged; delete {self.directory} and run the same command again")
        return manifest

    def _complete(self) -> None:
        """Note the checksum of what was computed."""
        self._file.flush()
        path = self.directory / VALUES
        write_json(self.directory / MANIFEST, {"fingerprint": self.fingerprint, "sha256": sha256_file(path)})
        self._noted = True
