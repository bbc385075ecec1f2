"""What of a path an engine runs: a model directory, a GGUF file."""

from pathlib import Path

from keural.errors import UserError
from keural.pretrained.kinds import what_is
from keural.pretrained.location import check_kind, model_directory


def gguf_file(path: Path) -> Path:
    """The GGUF file that `path` stands for: itself, or the only one in the directory. Raises `UserError` when there is none."""
    found = _gguf_files(path)
    if len(found) == 1:
        return found[0].resolve()
    if found:
        raise UserError(f"{path}: holds {len(found)} GGUF files ({', '.join(file.name for file in found)}); name one of them")
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; give a GGUF file or the directory with one")
    if is_model_directory(path):
        raise UserError(f"{path}: holds no GGUF file; make one with `keural export {path} OUT --format gguf`")
    raise UserError(f"{path}: holds no GGUF file, which the llama.cpp engine runs ({what_is(path)})")


def _gguf_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.gguf"))
    return [path] if path.is_file() and path.suffix == ".gguf" else []


def looks_like_gguf(path: Path) -> bool:
    """Whether `path` is named like a GGUF file, or holds one."""
    return path.suffix == ".gguf" or bool(_gguf_files(path))


def transformers_directory(path: Path) -> Path:
    """The model directory that `path` stands for, with advice where a GGUF file stands instead."""
    if not is_model_directory(path) and _gguf_files(path):
        raise UserError(
            f"{path}: is GGUF, which the transformers engine does not run; use --engine llama.cpp, or give the model directory "
            "it was exported from"
        )
    directory = model_directory(path)
    check_kind(directory)
    return directory


def is_model_directory(path: Path) -> bool:
    """Whether `path` stands for a model directory that transformers could load."""
    try:
        model_directory(path)
    except UserError:
        return False
    return True
