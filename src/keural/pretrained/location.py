"""Where a model is: which directory a path stands for.

In: a path that somebody typed. Out: the model directory, or a refusal. Torch is not needed to refuse.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.files import read_object
from keural.pretrained.kinds import what_is

CONFIG = "config.json"
CHECKPOINTS = "a .pt or .safetensors file, or a directory with one"
"""What can be imported."""
MODEL_TYPE = "keural"
"""`model_type` of `config.json`."""
EXPORTED_TYPE = "granitemoe_swa"
"""That of `keural export --format granite`."""


def check_there(path: Path, wanted: str) -> None:
    """Raise `UserError` unless there is something at `path`; `wanted` says what may be given."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; give {wanted}")


def check_kind(directory: Path) -> dict[str, Any]:
    """The values of a model directory's `config.json`. Raises `UserError` when they describe another architecture."""
    file = directory / CONFIG
    values = read_object(file)
    check_type(directory, values)
    return values


def check_type(where: Path, values: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a configuration that was found at `where` describes a Keural model."""
    if (kind := values.get("model_type")) != MODEL_TYPE:
        if kind == EXPORTED_TYPE and values.get("shared_intermediate_size") == 0:
            raise UserError(
                f"{where}: is a model for programs that know {kind} (transformers, vLLM, SGLang), as `keural export --format "
                "granite` writes one; give the model directory that it was exported from"
            )
        raise UserError(
            f"{where}: its {CONFIG} describes a {kind!r} model, not {MODEL_TYPE!r}; give one that this package has written"
        )


def model_directory(path: Path) -> Path:
    """The model directory that `path` stands for: itself, the `model` of a stage, or the `final` of a run; links resolved.

    Raises `UserError` when there is none.
    """
    for candidate in (path, path / "model", path / "final"):
        if (candidate / CONFIG).is_file():
            return candidate.resolve()
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: points to {path.readlink()}, which does not exist; run the stage that makes it")
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a model directory, e.g. runs/toy/final")
    raise UserError(f"{path}: {what_is(path)} (not a model directory: no {CONFIG} there; give one such as runs/toy/final)")
