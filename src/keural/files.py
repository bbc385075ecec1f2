"""Files that are either whole or absent: atomic writes, checksums and fingerprints.

Every room that writes goes through this module, so that a killed process or a full disk never leaves something that looks finished.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `UserError` when it is missing, not JSON or another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; the file is damaged, restore it")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary neighbour, flush it to disk, then rename it to `path`. Raises `UserError` on a full disk."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    # numbers of processes are not unique where machines or containers share a directory
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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
    if path.is_symlink() or path.is_mount() or path.resolve() == Path.cwd():
        raise UserError(f"{path}: a link, a mount point or the current directory; name a new directory inside it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not empty; choose another directory")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: {parent} is not a directory that can be written to; choose another place")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{path}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; free some space or choose another disk"
        )


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `path` when the block ends well, and vanishes when it does not.

    The temporary name holds the number of the process; those that killed processes left behind are removed first. What was written
    is flushed to the disk before it gets its name, so that a power cut leaves no directory of empty files. An existing `path` is
    replaced at the end. Raises `UserError` when the disk refuses a write inside the block.
    """
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush_directory(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free some space or choose another directory") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush_directory(directory: Path) -> None:
    """Wait until every file below `directory`, and the names of the files, are on the disk. Raises OSError."""
    for parent, _, names in os.walk(directory):
        for name in names:
            flush(Path(parent) / name)
        flush(Path(parent))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk; links are left alone. Raises OSError."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush this
            raise
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary directories for `path` of processes that no longer run."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    for found in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(found.name)
        if match and found.is_dir() and not _runs(int(match[1])):
            shutil.rmtree(found, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
