"""Checkpoints: a sharded directory that is either whole and verifiable or not there.

In: weights, moments and progress of a stage. Out: ``checkpoints/step-00000050/``, which loads on any number of ranks. It is written
under a temporary name, while training goes on (`writing`); the manifest with the SHA-256 of every file comes last, then the rename.
What is read back is compared with the manifest before a byte of it is used.

The tensors lie in safetensors files, whose headers say where each piece belongs, and the manifest is JSON: a run directory may come
from somebody else, and neither format can hold code. (torch's own format has pickles, and reads the one with the metadata without
limits; checkpoints of this package had it up to format 1, and are refused.)
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from keural.errors import UserError, why_unwritten
from keural.files import fingerprint as fingerprint_of
from keural.files import flush, flush_directory, sha256_file, write_json
from keural.recipe import StageSpec
from keural.train.checkpoints.manifest import DIRECTORY, FORMAT, MANIFEST, REMEDY, Manifest, Progress, read_manifest, step_of
from keural.train.checkpoints.pieces import pieces_of
from keural.train.checkpoints.unneeded import Unneeded
from keural.train.checkpoints.writing import Buffers, Given, Writing, has_room
from keural.train.optimization.optimizer import Optimizer, set_step, state_tensors
from keural.train.optimization.trainable import trained_parameters
from keural.train.processes.ranks import Ranks

READERS = 8
"""Threads of a rank that hash files at a time."""


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint, sharing memory with model and optimizer: `model.<name>` of what is trained, and
    `optimizer.state_tensors`.
    """
    names = trained_parameters(model)
    return {f"model.{name}": parameter.detach() for parameter, name in names.items()} | state_tensors(optimizer, names)


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        directory: where they lie, `<run>/<stage>/checkpoints`.
        stage: the resolved stage, kept in every manifest.
        fingerprint: of everything that determines the stage's weights; a checkpoint with another one is refused.
        ranks: all of them must call `prepare`, `begin`, `finish`, `save` and `load` together.
        frozen: digest of the weights that are not trained; a checkpoint of what was trained beside other ones is refused.
    """

    def __init__(self, directory: Path, stage: StageSpec, fingerprint: str, ranks: Ranks, frozen: str = "") -> None:
        self.directory, self.stage, self.fingerprint, self.ranks, self.frozen = directory, stage, fingerprint, ranks, frozen
        self._writing: Writing | None = None
        self._final = directory
        self._buffers: Buffers | None = Buffers()
        self._unneeded = Unneeded()

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Make room for copies on the host. Where there is none checkpoints are written while training waits, and that is said."""
        pieces = pieces_of(tensors(model, optimizer), self.ranks.is_main)
        number = sum(piece.values.nbytes for piece in pieces)
        if self.ranks.any(not has_room(number)):
            self._buffers = None
            self.ranks.log_once(
                f"{self.stage.name}: the host has no room for {number / 2**30:.1f} GiB of copies of each process, so training "
                "waits while checkpoints are written"
            )
        elif self.ranks.device.type == "cuda" and self._buffers is not None:
            self._buffers.make(pieces)  # pinned memory takes its time

    def begin(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> Path:
        """Begin to write a checkpoint of the state as it is now; returns where it will be, and older ones beyond
        `train.keep_checkpoints` are deleted then. `wait_for_copy` comes before the next change of that state.

        Raises `UserError` when the disk refuses, or had refused the one before.
        """
        self.finish()
        final = self._final = self.directory / f"step-{progress.step:08d}"
        temporary = _temporary(final)
        self.ranks.on_main(lambda: self._guarded(lambda: self._clear(temporary)))
        ranks, content = self.ranks, self._content(progress)
        finish: Callable[[dict[str, str]], None] | None = None
        if ranks.is_main:

            def finish(files: dict[str, str]) -> None:
                self._finish(final, content | {"files": files})

        pieces = pieces_of(tensors(model, optimizer), ranks.is_main)
        self._writing = Writing(temporary, pieces, ranks.rank, ranks.world, self._buffers, finish, ranks.device)
        return final

    @property
    def signs(self) -> tuple[bool, bool]:
        """Whether this rank still writes, and whether it could not."""
        writing = self._writing
        return writing is not None and not writing.is_done, writing is not None and writing.error is not None

    def wait_for_copy(self) -> None:
        """Wait until weights and moments may be changed."""
        if self._writing is not None:
            self._writing.wait_for_copy()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        A checkpoint that is no longer kept and cannot be deleted is said, once; the new one is whole all the same. Raises
        `UserError` when the disk refused a write; earlier checkpoints are then untouched and nothing half-written is left.
        """
        writing = self._writing
        if writing is None:
            return
        while self.ranks.any(not writing.is_done):
            if self.ranks.any(writing.error is not None):
                writing.give_up()
            writing.wait_a_while()
        self._writing = None
        given_up = writing.error is None or isinstance(writing.error, Given)
        reasons = self.ranks.gather(None if given_up or writing.error is None else why_unwritten(writing.error))
        if failures := [reason for reason in reasons if reason is not None]:
            self.ranks.on_main(lambda: shutil.rmtree(_temporary(self._final), ignore_errors=True))
            raise _refusal(self._final, *failures[0]) from writing.error
        self._unneeded.say(self.ranks.log_once)

    def give_up(self) -> None:
        """Before the process ends at once: nothing more is begun of what is being written."""
        if self._writing is not None:
            self._writing.give_up()

    def leave(self) -> None:
        """Before the process ends for another reason: what is being written becomes a checkpoint if it can."""
        if self._writing is not None:
            self._writing.leave()

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> Path:
        """Write a checkpoint, and wait for it."""
        final = self.begin(model, optimizer, progress)
        self.finish()
        return final

    @property
    def number(self) -> int:
        """How many checkpoints there are."""
        return sum(1 for _ in self._all())

    def latest(self) -> Path | None:
        """The checkpoint with the highest step, by number, or None."""
        return self.ranks.on_main(lambda: max(self._all(), key=step_of, default=None))

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Put a checkpoint's tensors into model and optimizer. Raises `UserError` when it is damaged or of other settings."""
        state = tensors(model, optimizer)
        progress = self._verified(path, state)
        with warnings.catch_warnings(action="ignore"):  # it says that there is no process group
            load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=self.ranks.world == 1)
        set_step(optimizer, progress.step)
        return progress

    def _all(self) -> Iterator[Path]:
        if self.directory.is_dir():
            yield from (path for path in self.directory.iterdir() if DIRECTORY.fullmatch(path.name))

    def _clear(self, temporary: Path) -> None:
        """Remove what killed processes left, and make room for a new checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".step-*.tmp"):
            self._unneeded.delete(leftover)
        if temporary.exists():
            shutil.rmtree(temporary)  # what is in the way cannot stay; it says why it does
        temporary.mkdir()

    def _guarded(self, write: Callable[[], None]) -> None:
        """Run `write`; what the disk refuses becomes a `UserError`."""
        try:
            write()
        except OSError as error:
            raise _refusal(self._final, *why_unwritten(error)) from error

    def _content(self, progress: Progress) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "progress": asdict(progress),
            "world": self.ranks.world,
            "stage": self.stage.model_dump(),
            "frozen": self.frozen,
        }

    def _finish(self, final: Path, content: dict[str, Any]) -> None:
        """Make a checkpoint of a directory with all files, and delete those that are not kept."""
        temporary, replaced = _temporary(final), final.with_name(f".{final.name}-replaced.tmp")
        write_json(temporary / MANIFEST, {**content, "checksum": fingerprint_of(content)})
        flush_directory(temporary)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        flush(self.directory)
        if replaced.exists():
            self._unneeded.delete(replaced)
        every = self.stage.train.keep_every
        for old in sorted(self._all(), key=step_of)[: -self.stage.train.keep_checkpoints]:
            if every is None or step_of(old) % every:
                self._unneeded.discard(old, _temporary(old))

    def _verified(self, path: Path, state: Mapping[str, Tensor]) -> Progress:
        """Compare a checkpoint with its manifest, each rank some of its files, and its tensors with those that are to be filled."""
        manifest = self.ranks.on_main(lambda: _with_its_files(path))
        mine = sorted(manifest.files)[self.ranks.rank :: self.ranks.world]
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            intact = list(pool.map(lambda name: _is_intact(path, name, manifest), mine))
        damaged = [name for name, same in zip(mine, intact, strict=True) if not same]
        if found := sorted(name for names in self.ranks.gather(damaged) for name in names):
            raise UserError(f"{path}: damaged checkpoint: {found[0]} differs from its checksum; {REMEDY}")
        self.ranks.on_main(lambda: self._check_settings(path, manifest, state))
        return manifest.progress

    def _check_settings(self, path: Path, manifest: Manifest, state: Mapping[str, Tensor]) -> None:
        if manifest.fingerprint != self.fingerprint:
            raise UserError(
                f"{path}: made with other settings, data or initial weights; use another run directory or delete this one"
            )
        if manifest.frozen != self.frozen:
            raise UserError(
                f"{path}: was trained beside other frozen weights than those that the stage starts from now; put the model back "
                "that it started from, or delete this directory"
            )
        _check_tensors(path, state)


def _temporary(final: Path) -> Path:
    """Where a checkpoint is until it is whole."""
    return final.with_name(f".{final.name}.tmp")


def _with_its_files(path: Path) -> Manifest:
    """The manifest of a checkpoint that has the files which it names, and no others."""
    manifest = read_manifest(path)
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    if unknown := sorted(present - manifest.files.keys()):
        raise UserError(f"{path}: {unknown[0]} is no file of this checkpoint; remove it, or {REMEDY}")
    for name in manifest.files:
        if name not in present or not (path / name).is_file():
            raise UserError(f"{path}: damaged checkpoint: {name} is missing; {REMEDY}")
    return manifest


def _is_intact(path: Path, name: str, manifest: Manifest) -> bool:
    try:
        return sha256_file(path / name) == manifest.files[name]
    except OSError:
        return False


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless the files hold exactly the tensors of `state`, in name, shape and type.

    The files are as they were written, and for these settings: with other tensors, they are of a version that stored others. The
    checkpoints before are, too.
    """
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: damaged checkpoint: {' '.join(str(error).split())[:200]}; {REMEDY}") from error
    for name in sorted(state.keys() ^ stored.keys()):
        raise _other_version(path, f"tensor {name} {'is missing' if name in state else 'is not of this stage'}")
    for name, tensor in state.items():
        found = stored[name]
        assert isinstance(found, TensorStorageMetadata)  # the reader knows no others
        if (found.size, found.properties.dtype) != (tensor.shape, tensor.dtype):
            has, needs = f"{list(found.size)} {found.properties.dtype}", f"{list(tensor.shape)} {tensor.dtype}"
            raise _other_version(path, f"tensor {name} is {has} instead of {needs}")


def _other_version(path: Path, difference: str) -> UserError:
    return UserError(
        f"{path}: a checkpoint of another version of keural ({difference}); finish the stage with the version that began it, or "
        f"delete {path.parent} to start it again"
    )


def _refusal(final: Path, reason: str, advice: str) -> UserError:
    """What to tell a user whose system refuses to write a checkpoint."""
    return UserError(
        f"{final}: the checkpoint cannot be written ({reason}); earlier checkpoints are intact: {advice} and run the same command "
        "again"
    )
