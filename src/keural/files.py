"""Files that are either whole or absent: atomic writes, checksums and fingerprints.

Every room that writes goes through this module, so that a killed process or a full disk never leaves something that looks finished.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keural.errors import UserError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises `UserError` when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number with too many digits
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged, delete it or restore it") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary neighbour, flush it to disk, then rename it to `path`. Raises `UserError` on a full disk."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space or choose another directory") from error


def check_new(path: Path, needed: int = 0) -> None:
    """Raise `UserError` unless `path` can become a new directory of about `needed` bytes: not there, or empty, and room for it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not empty; choose another directory")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{path}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; free some space or choose another disk"
        )


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `path` when the block ends well, and vanishes when it does not.

    A directory left behind by a killed process under the temporary name is removed first; an existing `path` is replaced at the
    end. Raises `UserError` when the disk refuses a write inside the block.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free some space or choose another directory") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
