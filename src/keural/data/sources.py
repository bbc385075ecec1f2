"""Sources of a recipe: which files they are, whether they can be read at all, and the records they give.

In: `SourceSpec`s and the data directory. Out: records and drops in file order, row by row. Everything the user can get wrong
about a source (adapter, option, format, path) is found by `check_sources` before anything is read.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keural.data.adapters import ADAPTERS, Adapter
from keural.data.readers import FORMATS, DataFile, OptionTypes, Row, format_of, read_rows
from keural.data.records import Drop, Record
from keural.errors import UserError, nearest
from keural.recipe import SourceSpec

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_sources(sources: Iterable[SourceSpec], data_dir: Path | None) -> None:
    """Refuse sources that cannot be read.

    Raises `UserError` for an unknown adapter, format or option (naming the nearest), an option of a wrong type, a path that
    does not exist or holds no file that the adapter reads, and an empty file.
    """
    for source in sources:
        adapter = adapter_of(source)
        if not adapter.formats:
            _own_rows(source, seed=0)
            continue
        formats = {format_name for _, format_name in files_of(source, data_dir)}
        _check_options(source, adapter, formats)


def adapter_of(source: SourceSpec) -> Adapter:
    """The adapter of a source. Raises `UserError` naming the nearest one."""
    if source.adapter not in ADAPTERS:
        raise _error(source, f"unknown adapter {source.adapter!r}{nearest(source.adapter, ADAPTERS)}")
    return ADAPTERS[source.adapter]


def read_source(source: SourceSpec, data_dir: Path | None, seed: int) -> Iterator[Record | Drop]:
    """Every row of a source as a record or a drop, in file order. `seed` is for sources that make their own rows."""
    adapter = adapter_of(source)
    for row in _rows(source, adapter, data_dir, seed):
        yield row if isinstance(row, Drop) else adapter(row.value, source, row.where)


def _rows(source: SourceSpec, adapter: Adapter, data_dir: Path | None, seed: int) -> Iterator[Row | Drop]:
    if not adapter.formats:
        rows = enumerate(_own_rows(source, seed), start=1)
        yield from (Row(f"{source.adapter}#{number}", value) for number, value in rows)
        return
    for file, format_name in files_of(source, data_dir):
        options = {name: value for name, value in source.options.items() if name in FORMATS[format_name].options}
        yield from read_rows(file, format_name, options)


def _own_rows(source: SourceSpec, seed: int) -> Iterator[dict[str, Any]]:
    from keural.data import microworld

    if source.path or source.format:
        raise _error(source, f"adapter {source.adapter} makes its own rows; leave path and format out")
    return microworld.rows(source.options, seed)


def files_of(source: SourceSpec, data_dir: Path | None) -> list[tuple[DataFile, str]]:
    """The files of a source with their formats, in natural order of their names.

    A directory stands for all files below it whose suffix the adapter reads (or, with `format`, whose suffix is of that
    format); a glob for all files it matches. Raises `UserError` when there are none, or when one is empty.
    """
    adapter = adapter_of(source)
    if source.format is not None:
        _check_format(source, adapter)
    if not source.path:
        raise _error(source, f"adapter {source.adapter} needs a path")
    pattern = Path(source.path).expanduser()
    if data_dir is None and not pattern.is_absolute():
        raise _error(source, f"path {source.path!r} is relative to the data directory; give data=DIR")
    base = (data_dir or Path()).absolute()
    found = _find(source, adapter, base / pattern)
    files = [(DataFile(path, _shown(path, base)), source.format or format_of(path)) for path in sorted(found, key=_natural)]
    return [(file, _checked(source, adapter, file, name)) for file, name in files]


def _find(source: SourceSpec, adapter: Adapter, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        wanted = (source.format,) if source.format else adapter.formats
        found = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path) and format_of(file) in wanted]
        if not found:
            raise _error(source, f"{path} holds no {' or '.join(wanted)} file; name the files by a glob and give their format")
        return found
    anchor = Path(path.anchor)
    found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
    if not found:
        hub = f" (from {source.hub})" if source.hub else ""
        raise _error(source, f"no such file or directory: {path}{hub}; check data=DIR and the path {source.path!r}")
    return found


def _checked(source: SourceSpec, adapter: Adapter, file: DataFile, format_name: str | None) -> str:
    """The file's format, if the adapter can read it and it is not empty."""
    if format_name is None:
        raise _error(source, f"{file.path}: its suffix is of no known format; give format: {', '.join(adapter.formats)}")
    if format_name not in adapter.formats:
        raise _error(
            source, f"{file.path}: adapter {source.adapter} does not read {format_name}, only {', '.join(adapter.formats)}"
        )
    if file.path.stat().st_size == 0:
        raise _error(source, f"{file.path}: the file is empty; fetch it again or leave it out")
    with file.path.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise _error(source, f"{file.path}: is a Git LFS pointer, not the data; fetch it with git lfs pull")
    return format_name


def _check_format(source: SourceSpec, adapter: Adapter) -> None:
    if source.format not in FORMATS:
        raise _error(source, f"unknown format {source.format!r}{nearest(str(source.format), FORMATS)}")
    if source.format not in adapter.formats:
        raise _error(source, f"adapter {source.adapter} does not read {source.format}, only {', '.join(adapter.formats)}")


def _check_options(source: SourceSpec, adapter: Adapter, formats: Iterable[str]) -> None:
    known: dict[str, tuple[type, ...]] = dict(adapter.options)
    for name in formats:
        known |= FORMATS[name].options
    choices: Mapping[str, tuple[str, ...]] = adapter.choices | {"split": ("file", "paragraph", "line")}
    for name, value in source.options.items():
        if name not in known:
            listed = f"; it has {', '.join(sorted(known))}" if known else "; it has none"
            raise _error(source, f"unknown option {name!r} of adapter {source.adapter}{nearest(name, known)}{listed}")
        _check_type(source, name, value, known)
        if name in choices and value not in choices[name]:
            raise _error(source, f"option {name!r} must be one of {', '.join(choices[name])}, got {value!r}")


def _check_type(source: SourceSpec, name: str, value: Any, known: OptionTypes) -> None:
    fits = isinstance(value, known[name]) and isinstance(value, bool) == (known[name] == (bool,))
    if isinstance(value, list):
        fits = fits and bool(value) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in value)
    if not fits:
        names = {bool: "true or false", str: "a text", int: "a column number", list: "a list of field names"}
        raise _error(source, f"option {name!r} must be {' or '.join(names[kind] for kind in known[name])}, got {value!r}")


def content_of(source: SourceSpec, data_dir: Path | None, hashes: "FileHashes") -> list[list[Any]]:
    """What determines a source's rows beside its settings: name, size and SHA-256 of every file (of the generator's, for own
    rows).
    """
    if adapter_of(source).formats:
        paths = [(file.name, file.path) for file, _ in files_of(source, data_dir)]
    else:
        from keural.data import microworld

        folder = Path(str(microworld.__file__)).parent
        paths = [(path.name, path) for path in sorted(folder.glob("*.py"))]
    return [[name, path.stat().st_size, hashes.of(path)] for name, path in paths]


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of change, so that big sources are hashed once."""

    def __init__(self, remembered: dict[str, list[Any]] | None = None) -> None:
        self.known = dict(remembered or {})
        self.changed = False

    def of(self, path: Path) -> str:
        """The hex digest of a file's bytes."""
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        entry = self.known.get(str(path))
        if entry is None or entry[:2] != state:
            with path.open("rb") as file:
                entry = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            self.known[str(path)] = entry
            self.changed = True
        return str(entry[2])


def _shown(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which part-2 comes before part-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix()) if part]


def _error(source: SourceSpec, message: str) -> UserError:
    return UserError(f"source {source.name!r}: {message}")
