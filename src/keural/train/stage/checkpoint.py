"""Checkpoints: a sharded directory that is either whole and verifiable or not there.

In: weights, moments and progress of a stage. Out: ``checkpoints/step-00000050/``, written by torch's distributed checkpoint, so
that it loads on any number of ranks. It is written under a temporary name; the manifest with the SHA-256 of every file comes
last, then the rename. What is read back is compared with the manifest before a byte of it is used.

The tensors lie in safetensors files, whose headers say where each piece belongs, and the manifest is JSON: a run directory may come
from somebody else, and neither format can hold code. (torch's own format has pickles, and reads the one with the metadata without
limits; checkpoints of this package had it up to format 1, and are refused.)
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from keural.errors import UserError
from keural.files import fingerprint as fingerprint_of
from keural.files import flush, flush_directory, read_object, sha256_file, write_json
from keural.recipe import StageSpec
from keural.train.optimization.optimizer import Optimizer, set_step, state_tensors
from keural.train.optimization.trainable import trained_parameters
from keural.train.processes.ranks import Ranks

MANIFEST = "manifest.json"
FORMAT = 2
"""2: tensors in safetensors. 1: in pickles, metadata included."""
FILE_BYTES = 1 << 30
"""About so many bytes of tensors go into one file, or one of each rank, which is put together in memory."""
DIRECTORY = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a stage is: optimizer steps done, non-padding tokens seen, wall-clock seconds spent, task losses of its first and
    latest steps, and the latest held-out figures.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """The step plan of the stage, which a resumed run must share."""
    tokens_per_expert: list[list[float]] = field(default_factory=list)
    """Assignments per layer and expert of the latest step, by which the next one balances with `router.load: lagged`."""
    taken: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the latest steps, by which `train.skip_spikes` judges the next."""
    spikes: int = 0
    """Steps of the stage that were not taken for being spikes .."""
    spikes_in_a_row: int = 0
    """.. and the latest of them, since one was."""


class Manifest(BaseModel):
    """What `manifest.json` holds beside its own checksum."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    fingerprint: str
    progress: Progress
    world: int
    stage: dict[str, Any]
    files: dict[str, str]
    """SHA-256 of every other file in the directory."""
    frozen: str = ""
    """Digest of the weights that are not trained, and so not in here; empty where all are."""


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint, sharing memory with model and optimizer: `model.<name>` of what is trained, and
    `optimizer.state_tensors`.
    """
    names = trained_parameters(model)
    return {f"model.{name}": parameter.detach() for parameter, name in names.items()} | state_tensors(optimizer, names)


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
    return Stored(newest, manifest.fingerprint, manifest.progress)


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        directory: where they lie, `<run>/<stage>/checkpoints`.
        stage: the resolved stage, kept in every manifest.
        fingerprint: of everything that determines the stage's weights; a checkpoint with another one is refused.
        ranks: all of them must call `save` and `load` together.
        frozen: digest of the weights that are not trained; a checkpoint of what was trained beside other ones is refused.
    """

    def __init__(self, directory: Path, stage: StageSpec, fingerprint: str, ranks: Ranks, frozen: str = "") -> None:
        self.directory, self.stage, self.fingerprint, self.ranks, self.frozen = directory, stage, fingerprint, ranks, frozen

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> Path:
        """Write a checkpoint, then delete older ones beyond `train.keep_checkpoints`.

        Raises `UserError` when the disk refuses a write; earlier checkpoints are then untouched and nothing half-written is left.
        """
        final = self.directory / f"step-{progress.step:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        self.ranks.on_main(lambda: self._writing(final, lambda: self._clear(temporary)))
        self._writing(final, lambda: self._write_tensors(temporary, tensors(model, optimizer)))
        self.ranks.on_main(lambda: self._writing(final, lambda: self._finish(temporary, final, progress)))
        return final

    @property
    def number(self) -> int:
        """How many checkpoints there are."""
        return sum(1 for _ in self._all())

    def latest(self) -> Path | None:
        """The checkpoint with the highest step, by number, or None."""
        return self.ranks.on_main(lambda: max(self._all(), key=_step, default=None))

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Put a checkpoint's tensors into model and optimizer. Raises `UserError` when it is damaged or of other settings."""
        state = tensors(model, optimizer)
        progress = self.ranks.on_main(lambda: self._verified(path, state))
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
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _write_tensors(self, temporary: Path, state: dict[str, Tensor]) -> None:
        with warnings.catch_warnings(action="ignore"):  # it says that there is no process group
            writer = HuggingFaceStorageWriter(str(temporary), _file_numbers(state), save_distributed=True)
            save(state, storage_writer=writer, no_dist=self.ranks.world == 1)

    def _finish(self, temporary: Path, final: Path, progress: Progress) -> None:
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "progress": asdict(progress),
            "world": self.ranks.world,
            "stage": self.stage.model_dump(),
            "files": files,
            "frozen": self.frozen,
        }
        write_json(temporary / MANIFEST, {**content, "checksum": fingerprint_of(content)})
        flush_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(self.directory)
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

    def _verified(self, path: Path, state: Mapping[str, Tensor]) -> Progress:
        """Compare a checkpoint with its manifest, and its tensors with those that are going to be filled."""
        manifest = _manifest(path)
        present = {file.name for file in path.iterdir()} - {MANIFEST}
        if unknown := sorted(present - manifest.files.keys()):
            raise UserError(f"{path}: {unknown[0]} is no file of this checkpoint; remove it, or {_REMEDY}")
        for name, expected in manifest.files.items():
            if name not in present or not (path / name).is_file():
                raise UserError(f"{path}: damaged checkpoint: {name} is missing; {_REMEDY}")
            if sha256_file(path / name) != expected:
                raise UserError(f"{path}: damaged checkpoint: {name} differs from its checksum; {_REMEDY}")
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
        return manifest.progress


_REMEDY = "delete this directory to resume from the checkpoint before it, or from the start where there is none"


def _manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, as it was written. Raises `UserError`."""
    try:
        values = read_object(path / MANIFEST)
    except UserError as error:
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST} is missing or unreadable; {_REMEDY}") from error
    checksum = values.pop("checksum", None)
    if checksum != fingerprint_of(values):
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST} was changed; {_REMEDY}")
    if values.get("format") == 1:
        raise UserError(
            f"{path}: a checkpoint of an earlier version of keural, whose metadata could run code when it is read, so it is not; "
            f"finish the stage with the version that began it, or delete {path.parent} to start it again"
        )
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: a checkpoint of another version of keural; resume with that version, or {_REMEDY}")
    try:
        return Manifest.model_validate_json(json.dumps(values))  # of JSON, a strict model still takes an object for a dataclass
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST}: {where}: {error.errors()[0]['msg']}; {_REMEDY}") from error


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless the files hold exactly the tensors of `state`, in name, shape and type."""
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: damaged checkpoint: {' '.join(str(error).split())[:200]}; {_REMEDY}") from error
    for name in sorted(state.keys() ^ stored.keys()):
        what = "is missing" if name in state else "is not of this stage"
        raise UserError(f"{path}: damaged checkpoint: tensor {name} {what}; {_REMEDY}")
    for name, tensor in state.items():
        found = stored[name]
        assert isinstance(found, TensorStorageMetadata)  # the reader knows no others
        if (found.size, found.properties.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{path}: damaged checkpoint: tensor {name} is {list(found.size)} {found.properties.dtype} instead of "
                f"{list(tensor.shape)} {tensor.dtype}; {_REMEDY}"
            )


def _file_numbers(state: Mapping[str, Tensor]) -> dict[str, int]:
    """For each tensor the number of the file that it goes into, from 1; about `FILE_BYTES` of whole tensors go into one."""
    numbers: dict[str, int] = {}
    before = 0
    for name, tensor in state.items():
        numbers[name] = 1 + before // FILE_BYTES
        before += tensor.numel() * tensor.element_size()
    return numbers


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
    return _disk_failure(error.__context__) if error.__context__ is not None else None
