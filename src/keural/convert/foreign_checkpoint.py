"""Checkpoints as somebody left them: files opened without reading the tensors, and without running anything that is in them.

In: a path. Out: a `Checkpoint`: lazy weights under the names that the files have, the configuration that came with them, and
how far training had come. Read are PyTorch's `.pt` (a state dict, or the published training checkpoint with one under `model`)
and safetensors (one file, or a directory with one or several). Whatever is damaged, or would need code from the file, is
refused.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from keural.errors import UserError
from keural.files import read_object
from keural.pretrained.kinds import is_adapter, is_training_checkpoint, what_is
from keural.pretrained.lineage import check_sums, read_record
from keural.pretrained.location import CHECKPOINTS, CONFIG, check_there
from keural.pretrained.safetensors import DTYPES, INDEX, open_safetensors, weight_files
from keural.pretrained.weights import TensorInfo, Weights, read_tensor

_PROGRESS = ("step", "epoch", "tokens_processed")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open for reading."""

    where: Path
    """The file, or the directory of the files."""
    weights: Weights
    """Under the names that the files have."""
    config: Mapping[str, Any] | None = None
    """The values of `config.json` or of the checkpoint's `model_config`; None where there is neither."""
    progress: Mapping[str, int] = field(default_factory=dict)
    """Those of step, epoch and tokens_processed that the checkpoint names."""
    ours: bool = False
    """Whether this package wrote it, so that its configuration follows this package's conventions."""
    verified: str = ""
    """What was compared with checksums; empty where nothing was."""

    @property
    def directory(self) -> Path:
        """Where files that belong to it would lie."""
        return self.where if self.where.is_dir() else self.where.parent


def open_checkpoint(path: Path, verify: bool = True) -> Checkpoint:
    """Open the checkpoint at `path`: a `.pt` or `.safetensors` file, or a directory that holds one checkpoint.

    With `verify`, checksums are compared first, which reads it once: those inside a `.pt`, and those of `keural.json` beside it.
    Raises `UserError` when there is none, when it is cut off, damaged or not as it is listed, when reading it would run code from
    it, or when it holds something else than floating-point tensors.
    """
    check_there(path, CHECKPOINTS)
    if is_training_checkpoint(path) or is_adapter(path):
        raise UserError(f"{path}: {what_is(path)}")
    file = _only_checkpoint(path) if path.is_dir() else path
    suffix = file.suffix.lower() if file.is_file() else ".safetensors"
    if suffix not in _OPENERS:
        what = suffix or "a file without suffix"
        raise UserError(f"{file}: {what} is no checkpoint ({what_is(file)}); known are {', '.join(_OPENERS)}")
    listed = _check_record(path, file) if verify else ""
    checkpoint = _OPENERS[suffix](file, verify)
    return replace(checkpoint, verified="; ".join(filter(None, (checkpoint.verified, listed))))


def _check_record(path: Path, file: Path) -> str:
    """Compare the directory with its `keural.json`; empty where there is none."""
    directory = path if path.is_dir() else path.parent
    coverage = check_sums(directory, () if file.is_dir() else (file.name,))
    return "" if coverage.record is None else str(coverage)


def _only_checkpoint(directory: Path) -> Path:
    """What a directory holds: itself where there are safetensors, else its only `.pt`."""
    if (directory / INDEX).is_file() or any(directory.glob("*.safetensors")):
        return directory
    files = sorted(file for suffix in _OPENERS for file in directory.glob(f"*{suffix}"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} checkpoints ({', '.join(file.name for file in files[:4])}); name one" if files else "no checkpoint"
    what = "" if files else f" ({what_is(directory)})"
    raise UserError(f"{directory}: holds {found}{what}; known are {', '.join(_OPENERS)}")


def _open_safetensors(path: Path, verify: bool) -> Checkpoint:
    weights = open_safetensors(weight_files(path) if path.is_dir() else [path])
    directory = path if path.is_dir() else path.parent
    config = _mapping(directory / CONFIG)
    return Checkpoint(path, weights, config, ours="keural" in read_record(directory))


def _mapping(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`; None where there is no file. Raises `UserError` when it is not an object."""
    return read_object(file) if file.is_file() else None


def _open_pt(path: Path, verify: bool) -> Checkpoint:
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a whole PyTorch checkpoint (cut off, older than PyTorch 1.6, or another format); copy it again"
        )
    _check_records(path, verify)
    try:
        # Fake tensors have no values, but their storages know where in the file theirs are.
        with warnings.catch_warnings(action="ignore"), FakeTensorMode():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds objects other than tensors and plain values; reading them would run code from the file, so "
            "it is refused"
        ) from error
    except Exception as error:  # a damaged archive makes PyTorch stumble in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: is damaged or holds tensors of unusual types ({reason[:200]}); copy it again") from error
    state_dict = _state_dict(path, loaded)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}
    config = loaded.get("model_config")
    if config is not None and not isinstance(config, Mapping):
        raise UserError(f"{path}: its model_config is a {type(config).__name__}, not a mapping; give a configuration with --config")
    progress = {name: loaded[name] for name in _PROGRESS if isinstance(loaded.get(name), int)}
    return Checkpoint(
        path,
        Weights(infos, lambda name: _read_from_archive(path, state_dict[name])),
        _mapping(path.parent / CONFIG) if config is None else config,
        progress,
        verified="the records of the file match its own checksums" if verify else "",
    )


def _read_from_archive(path: Path, fake: Tensor) -> Tensor:
    """The values of a tensor of a `.pt`, of which `fake` says storage, place in the storage, and shape."""
    storage: Any = fake.untyped_storage()
    width = fake.element_size()
    begin = int(storage._checkpoint_offset)
    if fake.is_contiguous():
        return read_tensor(path, begin + int(fake.storage_offset()) * width, TensorInfo(tuple(fake.shape), fake.dtype))
    whole = read_tensor(path, begin, TensorInfo((int(storage.nbytes()) // width,), fake.dtype))
    return whole.as_strided(fake.shape, fake.stride(), fake.storage_offset()).contiguous()


def _check_records(path: Path, verify: bool) -> None:
    """Raise `UserError` when a record of a `.pt` is compressed or, with `verify`, does not match its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise UserError(f"{path}: its records are compressed, which PyTorch does not write; save it with torch.save")
            damaged = archive.testzip() if verify else None
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: is damaged ({error}); copy it again") from error
    if damaged is not None:
        raise UserError(
            f"{path}: record {damaged} does not match its checksum, the file is damaged or was changed; copy it again, or read it "
            "as it is with --no-verify"
        )


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The tensors of a loaded `.pt`. Raises `UserError` when it is not a state dict of dense floating-point tensors."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    state_dict = loaded["model"] if isinstance(loaded.get("model"), Mapping) else loaded
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: {str(name)[:80]!r} is not a named tensor; the weights must be under 'model' or alone in the file"
            )
        if tensor.is_meta:
            raise UserError(f"{path}: tensor {name} has a shape but no values; save the model after its weights were loaded")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise UserError(
                f"{path}: tensor {name} is of type {tensor.dtype}, {tensor.layout}; only {', '.join(DTYPES.values())} can be read"
            )
    if not state_dict:
        raise UserError(f"{path}: holds no tensors")
    return dict(state_dict)


_OPENERS: dict[str, Callable[[Path, bool], Checkpoint]] = {
    ".safetensors": _open_safetensors,
    ".pt": _open_pt,
    ".pth": _open_pt,
    ".bin": _open_pt,
}
