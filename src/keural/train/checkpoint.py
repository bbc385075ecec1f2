"""Checkpoints: a sharded directory that is either whole and verifiable or not there.

In: weights, moments and progress of a stage. Out: ``checkpoints/step-00000050/``, written by torch's distributed checkpoint, so
that it loads on any number of ranks. It is written under a temporary name; the manifest with the SHA-256 of every file comes
last, then the rename. What is read back is compared with the manifest before a byte of it is used.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from keural.errors import UserError
from keural.files import fingerprint as fingerprint_of
from keural.files import read_json, sha256_file, write_json
from keural.recipe import StageSpec
from keural.train.optimizer import MOMENTS, set_step
from keural.train.ranks import Ranks

MANIFEST = "manifest.json"
FORMAT = 1
DIRECTORY = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a stage is: optimizer steps done, real tokens seen, wall-clock seconds spent, task losses of its first and latest
    steps, and the latest held-out figures.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)
    """The step plan of the stage, which a resumed run must share."""


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint, sharing memory with model and optimizer: `model.<name>`, `exp_avg.<name>`,
    `exp_avg_sq.<name>`.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for moment in MOMENTS:
            state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return state


@dataclass(frozen=True)
class Stored:
    """A checkpoint by what its manifest says; its tensors were not looked at."""

    path: Path
    fingerprint: str
    progress: Progress


def newest_progress(directory: Path) -> Stored | None:
    """What the newest checkpoint in `directory` says of itself; None where there is none. Raises `UserError` when it is damaged."""
    found = [path for path in directory.iterdir() if DIRECTORY.fullmatch(path.name)] if directory.is_dir() else []
    if not found:
        return None
    newest = max(found, key=_step)
    manifest = _manifest(newest)
    return Stored(newest, manifest["fingerprint"], Progress(**manifest["progress"]))


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        directory: where they lie, `<run>/<stage>/checkpoints`.
        stage: the resolved stage, kept in every manifest.
        fingerprint: of everything that determines the stage's weights; a checkpoint with another one is refused.
        ranks: all of them must call `save` and `load` together.
    """

    def __init__(self, directory: Path, stage: StageSpec, fingerprint: str, ranks: Ranks) -> None:
        self.directory, self.stage, self.fingerprint, self.ranks = directory, stage, fingerprint, ranks

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write a checkpoint, then delete older ones beyond `train.keep_checkpoints`.

        Raises `UserError` when the disk refuses a write; earlier checkpoints are then untouched and nothing half-written is left.
        """
        final = self.directory / f"step-{progress.step:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        self.ranks.on_main(lambda: self._writing(final, lambda: self._clear(temporary)))
        self._writing(final, lambda: self._write_tensors(temporary, tensors(model, optimizer)))
        self.ranks.on_main(lambda: self._writing(final, lambda: self._finish(temporary, final, progress)))
        return final

    def latest(self) -> Path | None:
        """The checkpoint with the highest step, by number, or None."""
        return self.ranks.on_main(lambda: max(self._all(), key=_step, default=None))

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Put a checkpoint's tensors into model and optimizer. Raises `UserError` when it is damaged or of other settings."""
        progress = self.ranks.on_main(lambda: self._verified(path))
        with warnings.catch_warnings(action="ignore"):  # it says that there is no process group
            dcp.load(tensors(model, optimizer), storage_reader=dcp.FileSystemReader(path), no_dist=self.ranks.world == 1)
        set_step(optimizer, progress.step)
        return progress

    def _all(self) -> Iterator[Path]:
        if self.directory.is_dir():
            yield from (path for path in self.directory.iterdir() if DIRECTORY.fullmatch(path.name))

    def _clear(self, temporary: Path) -> None:
        """Remove what killed processes left, and make room for a new checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _write_tensors(self, temporary: Path, state: dict[str, Tensor]) -> None:
        with warnings.catch_warnings(action="ignore"):  # it says that there is no process group
            dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary), no_dist=self.ranks.world == 1)

    def _finish(self, temporary: Path, final: Path, progress: Progress) -> None:
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "progress": asdict(progress),
            "world": self.ranks.world,
            "stage": self.stage.model_dump(),
            "files": files,
        }
        write_json(temporary / MANIFEST, {**content, "checksum": fingerprint_of(content)})
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_directory(self.directory)
        for old in sorted(self._all(), key=_step)[: -self.stage.train.keep_checkpoints]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))

    def _writing(self, final: Path, write: Any) -> None:
        """Run `write`; a failure of the disk becomes a `UserError` after the temporary directory is gone."""
        try:
            write()
        except (OSError, UserError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(final.with_name(f".{final.name}.tmp"), ignore_errors=True)
            reason = _disk_failure(error)
            if reason is None:
                raise
            raise UserError(
                f"{final}: the checkpoint cannot be written ({reason}); earlier checkpoints are intact: free some space and run "
                "the same command again"
            ) from error

    def _verified(self, path: Path) -> Progress:
        """Compare a checkpoint with its manifest."""
        manifest, remedy = _manifest(path), _REMEDY
        for name, expected in manifest["files"].items():
            if not (path / name).is_file():
                raise UserError(f"{path}: damaged checkpoint: {name} is missing; {remedy}")
            if sha256_file(path / name) != expected:
                raise UserError(f"{path}: damaged checkpoint: {name} differs from its checksum; {remedy}")
        if manifest["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{path}: made with other settings, data or initial weights; use another run directory or delete this one"
            )
        return Progress(**manifest["progress"])


_REMEDY = "delete this directory to resume from the checkpoint before it, or from the start where there is none"


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written. Raises `UserError`."""
    try:
        manifest = read_json(path / MANIFEST)
    except UserError as error:
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST} is missing or unreadable; {_REMEDY}") from error
    checksum = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if checksum is None or checksum != fingerprint_of(manifest) or manifest["format"] != FORMAT:
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST} was changed; {_REMEDY}")
    return dict(manifest)


def _step(path: Path) -> int:
    match = DIRECTORY.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _disk_failure(error: BaseException) -> str | None:
    """What the operating system said, when it was the cause of a failed save; None when the failure is another one."""
    if isinstance(error, CheckpointException):
        reasons = [_disk_failure(failure) for failure, _ in error.failures.values()]
        return next((reason for reason in reasons if reason), None)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UserError):
        return str(error)
    if "PytorchStreamWriter" in str(error):
        return "no space left, or the file is too large"
    return _disk_failure(error.__context__) if error.__context__ is not None else None


def _sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
