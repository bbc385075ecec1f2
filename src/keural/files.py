"""Files that are either whole or absent, and believed only when they are what was written.

In: content and a path. Out: a file that appears whole or not at all, and its content back, compared with its checksum first. Every
room that writes goes through this module, so that a killed process or a full disk never leaves something that looks finished.

A kind of JSON file is a subclass of `CheckedFile`, declared in the room that writes it: `train/` its plan and reference values,
`data/` what it prepared, `pipeline/run_directory.py` everything that is of a run as a whole, with the list of all.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from keural.errors import UserError, refusal_of, why_unwritten
from keural.parsing import Malformed, parse_json, parse_yaml
from keural.terminal import say

MAX_TEXT_BYTES = 1 << 30
"""Largest file that is read whole as text; the files of this package are far smaller."""
_TEMPORARY_FILE = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")
_TEMPORARY_DIRECTORY = re.compile(r"\..+\.(\d+)\.tmp")


def open_file(path: Path) -> BufferedReader:
    """Open a file to read its bytes. Raises OSError, also for a pipe or a device, which might never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return path.open("rb")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks. Raises OSError as `open_file` does."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`. Raises `UserError` when it is missing, cannot be read, is far too large or not UTF-8."""
    try:
        with open_file(path) as file:
            too_large = os.fstat(file.fileno()).st_size > MAX_TEXT_BYTES
            content = b"" if too_large else file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if too_large or len(content) > MAX_TEXT_BYTES:
        raise UserError(f"{path}: larger than {MAX_TEXT_BYTES:,} bytes; it is not what it should be, restore it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start:,}; the file is damaged, delete it or restore it") from error


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises `UserError` when it is missing, not JSON, or nested far too deeply."""
    try:
        return parse_json(read_text(path))
    except Malformed as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged, delete it or restore it") from error


def read_yaml(path: Path) -> Any:
    """The YAML value in `path`. Raises `UserError` when it is missing, not YAML, nested too deeply or unfolds to too much."""
    try:
        return parse_yaml(read_text(path))
    except Malformed as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error


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
    """Write `content` to a temporary neighbour, flush it to disk, then rename it to `path`. Raises `UserError` on a full disk, and
    for a pipe or a device in the place of `path`.

    What a killed process leaves of it `clear_leftovers` removes. Lone surrogates of a text (bytes of a file name that are no
    UTF-8) are written as `\\udc80`, which JSON reads back.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    # numbers of processes are not unique where machines or containers share a directory
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a pipe or a device, which is not replaced; name a file")
        with temporary.open("wb") as file:
            lock(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to tell a user whose system refuses to write `path`."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return refusal_of(error) or UserError(str(error))
    reason, advice = why_unwritten(error)
    return UserError(f"{path}: cannot be written ({reason}); {advice}, or choose another directory")


def check_output(path: Path, what: str = "") -> None:
    """Raise `UserError` unless a file can be written to `path`, or replaced there; `what` says which option names it."""
    said = f"{what} {path}".lstrip()
    if path == Path("-"):
        raise UserError(f"{said}: standard output is not written to; name a file")
    if path.is_dir():
        raise UserError(f"{said}: is a directory; name a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{said}: is a link, a pipe or a device, which would be replaced; name a file")
    parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{said}: {parent} is no directory that can be written to; name a file in one")


def clear_leftovers(directory: Path) -> None:
    """Remove the temporary files and directories that processes left anywhere below `directory` when they were killed.

    They are known by the names that `write_atomic` and `atomic_directory` give them, with the number of a process that runs no
    more on this machine, and no process on another machine holds the lock of one that is being written.
    """
    for place, names, files in os.walk(directory):
        for name in files:
            if (match := _TEMPORARY_FILE.fullmatch(name)) and not _runs(int(match[1])):
                _remove_unlocked(Path(place, name))
        for name in list(names):
            if (match := _TEMPORARY_DIRECTORY.fullmatch(name)) and not _runs(int(match[1])):
                shutil.rmtree(Path(place, name), ignore_errors=True)
                names.remove(name)


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if path.is_symlink() or not lock(file.fileno()):
            return
        path.unlink()


def lock(descriptor: int) -> bool:
    """Mark an open file as in use until it is closed; False when another process has. File systems without locks say yes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


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
        raise cannot_write(path, error) from error
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


CHECKSUM = "checksum"
"""The key of a checked file that holds the SHA-256 of all its others."""
_TEXT_HEAD = re.compile(r"# written by keural, SHA-256 of what follows: ([0-9a-f]{64})")


class CheckedFile(BaseModel):
    """The content of a JSON file that states its own checksum: a kind of file is a subclass whose fields are its keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    remedy: ClassVar[str] = "delete it and run the same command again"
    """What to do about a damaged one; it must work."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What was written to `path`. Raises `UserError` when it is missing, damaged, changed, or of an earlier version."""
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            content = read_object(path)
        except UserError as error:
            raise UserError(f"{path}: damaged; {cls.remedy} ({error})") from error
        stated = content.pop(CHECKSUM, None)
        if stated is None:
            raise UserError(f"{path}: damaged, or written by an earlier version of keural (it states no checksum); {cls.remedy}")
        if stated != fingerprint(content):
            raise UserError(f"{path}: damaged (its checksum differs); {cls.remedy}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: of another version of keural (key {key!r}: {first['msg']}); {cls.remedy}") from error

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """As `read`; None where there is no such file."""
        return cls.read(path) if path.exists() or path.is_symlink() else None

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        content = self.model_dump()
        write_json(path, {CHECKSUM: fingerprint(content), **content})


def write_checked_text(path: Path, text: str) -> None:
    """Write a text for people, in a language in which `#` begins a comment, with its checksum in the first line."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    write_atomic(path, f"# written by keural, SHA-256 of what follows: {digest}\n{text}")


def read_checked_text(path: Path) -> str:
    """What `write_checked_text` was given. Raises `UserError` unless the file is what was written."""
    try:
        with open_file(path) as file:
            head, _, text = file.read().decode("utf-8").partition("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    match = _TEXT_HEAD.fullmatch(head)
    if match is None or match[1] != hashlib.sha256(text.encode("utf-8")).hexdigest():
        raise UserError(f"{path}: is not what keural wrote there (its checksum is missing or differs)")
    return text


class FileState(BaseModel):
    """What tells that a file was changed without reading it: size, times (ns) of its content and its entry, and its number."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    size: int
    modified: int
    changed: int
    """Time of the last change of any kind; unlike the time of the content nobody can set it."""
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The state of a file. Raises OSError."""
        status = path.stat()
        return cls(size=status.st_size, modified=status.st_mtime_ns, changed=status.st_ctime_ns, inode=status.st_ino)

    def is_settled(self, now: int) -> bool:
        """Whether a later change would show: clocks of file systems have steps, and one just after the last may fall into it."""
        return max(self.modified, self.changed) < now - SETTLED_NS


SETTLED_NS = 2_000_000_000
"""Longer than the step of any file system's clock (FAT: two seconds)."""


class _Hashed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    state: FileState
    sha256: str


class _HashCache(CheckedFile):
    files: dict[str, _Hashed]


class FileHashes:
    """SHA-256 of files, remembered by path and `FileState`, so that big ones are read once."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._changed = path, False
        self.known: dict[str, _Hashed] = {}
        try:
            if path is not None and (cache := _HashCache.find(path)) is not None:
                self.known = dict(cache.files)
        except UserError as error:
            say(f"{error.args[0].split('; ')[0]}; it only remembers checksums of files, which are computed again")

    def of(self, path: Path) -> str:
        """The hex digest of a file's bytes."""
        name, state = str(path), FileState.of(path)
        entry = self.known.get(name)
        if entry is None or entry.state != state:
            entry = self.known[name] = _Hashed(state=state, sha256=sha256_file(path))
            self._changed = True
        return entry.sha256

    def save(self) -> None:
        """Keep what is known where it was read, but for files that may change once more without a sign of it."""
        if self._path is not None and self._changed:
            now = time.time_ns()
            kept = {name: entry for name, entry in self.known.items() if entry.state.is_settled(now)}
            _HashCache(files=kept).write(self._path)
            self._changed = False


class _Checked(CheckedFile):
    files: dict[str, FileState]


def remembered_check(directory: Path, memory: Path, check: Callable[[], object]) -> None:
    """Do `check()`, which reads all files of `directory`, unless it was done before and none of them has changed since.

    `memory` is the file that remembers; a damaged one only means that the check is done. What `check` raises comes through.
    """
    states = _states(directory)
    with contextlib.suppress(UserError):
        known = _Checked.find(memory)
        if known is not None and known.files == states:
            return
    check()
    now = time.time_ns()
    if all(state.is_settled(now) for state in states.values()):
        _Checked(files=states).write(memory)


def _states(directory: Path) -> dict[str, FileState]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): FileState.of(path) for path in paths}
