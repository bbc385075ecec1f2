"""A source of a recipe, opened: its adapter is known, its options fit, its files are there; then the records that it gives.

In: `SourceSpec`s and the data directory. Out: `Source`s, and of each its records and drops in file order, row by row. What the
user can get wrong about a source (adapter, option, format, path) is found by `open_sources` before anything is read.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from keural.data.adapters import Adapter, adapter_of
from keural.data.adapters.base import lookup, scalar
from keural.data.field_use import FieldUse
from keural.data.readers.archives import ARCHIVE, archive_of, members
from keural.data.readers.formats import FORMATS, DataFile, Row, format_of, read_rows
from keural.data.readers.hub import check_hub, hub_content, hub_rows, is_hub
from keural.data.readers.options import Option
from keural.data.records import AnyRecord, Document, Drop, EvaluationItem, Kind, PreferencePair, Record
from keural.errors import UserError, nearest
from keural.files import FileHashes
from keural.recipe import SourceSpec

SourceFile = tuple[DataFile, str]
"""A file of a source and its format."""
ROW_NUMBER = "row_number"
"""The `id_field` of rows that have no id but stand in the same order as the set they translate."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Source:
    """A source that can be read: `open_source` has checked it. Plain data, which any process can be given.

    `files` are those that it is read from, in natural order of their names; there are none of a data set of a hub, and where the
    adapter makes the rows. `data_dir` is absolute.
    """

    spec: SourceSpec
    files: tuple[SourceFile, ...]
    data_dir: Path | None

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.spec.name

    @property
    def adapter(self) -> Adapter:
        """What turns its rows into records."""
        return adapter_of(self.spec)

    @property
    def kind(self) -> Kind:
        """What its records are."""
        return self.adapter.kind_of(self.spec)

    @property
    def needs_seed(self) -> bool:
        """Whether its rows depend on the seed: the adapter makes them."""
        return self.adapter.rows is not None

    def parts(self) -> list[SourceFile | None]:
        """What it can be read in apart from each other: its files; None for a source that is read whole."""
        return list(self.files) or [None]

    def read(self, seed: int, file: SourceFile | None = None, fields: FieldUse | None = None) -> Iterator[Record | Drop]:
        """Every row as a record or a drop, in file order; with `file` only the rows of that one. `fields` is shown every row."""
        for record in self.read_any(seed, file, fields):
            assert not isinstance(record, EvaluationItem), "kinds are checked at start-up"
            yield record

    def read_any(self, seed: int, file: SourceFile | None = None, fields: FieldUse | None = None) -> Iterator[AnyRecord | Drop]:
        """As `read`, for evaluation sets too."""
        spec, adapter = self.spec, self.adapter
        split, look = adapter.splitter(spec), (lambda value: None) if fields is None else fields.look
        for number, row in enumerate(self.rows(seed, file), start=1):
            if isinstance(row, Drop):
                yield row
            elif split is None:
                look(row.value)
                yield _identified(adapter(row.value, spec, row.where), row.value, spec, number)
            else:
                for place, value in enumerate(split(row.value, spec), start=1):
                    look(value)
                    yield _identified(adapter(value, spec, f"{row.where}#{place}"), value, spec, number, place)

    def rows(self, seed: int, file: SourceFile | None = None) -> Iterator[Row | Drop]:
        """Every row as it is read, before an adapter sees it; with `file` only those of that one."""
        spec, adapter = self.spec, self.adapter
        if is_hub(spec):
            yield from hub_rows(spec, self.data_dir)
        elif adapter.rows is not None:
            for number, value in enumerate(adapter.rows(spec.options, seed), start=1):
                yield Row(f"{spec.adapter}#{number}", value)
        else:
            for opened, format_name in self.files if file is None else [file]:
                yield from _file_rows(spec, adapter, opened, format_name)

    def content(self, hashes: "FileHashes") -> list[list[Any]]:
        """What determines the rows beside the settings: name, size and SHA-256 of every file (of the program's, where the adapter
        makes them).
        """
        fixed: list[list[Any]] = []
        if is_hub(self.spec):
            fixed, paths = hub_content(self.spec, self.data_dir)
        elif self.adapter.rows is not None:
            paths = [(path.name, path) for path in self.adapter.content()]
        else:
            paths = [(file.name, path) for file, _ in self.files for path in file.paths]
        return fixed + [[name, path.stat().st_size, hashes.of(path)] for name, path in paths]


def open_sources(specs: Iterable[SourceSpec], data_dir: Path | None) -> list[Source]:
    """The sources of these settings. Raises `UserError` as `open_source` does."""
    return [open_source(spec, data_dir) for spec in specs]


def open_source(spec: SourceSpec, data_dir: Path | None) -> Source:
    """The source, if it can be read.

    Raises `UserError` for an unknown adapter, format or option (naming the nearest), an option of a wrong type, a path that
    does not exist or holds no file that the adapter reads, and an empty file.
    """
    adapter = adapter_of(spec)
    files: list[SourceFile] = []
    if is_hub(spec):
        if spec.format is not None:
            raise _error(spec, "format is for files; datasets knows those of a hub")
        _check_options(spec, adapter, ())
        check_hub(spec, data_dir)
    else:
        _check_hub_keys(spec)
        if adapter.rows is None:
            files = _files(spec, adapter, data_dir)
            _check_options(spec, adapter, {format_name for _, format_name in files})
        elif spec.path or spec.format:
            raise _error(spec, f"adapter {spec.adapter} makes its own rows; leave path and format out")
        else:
            adapter.rows(spec.options, 0)
    return Source(spec, tuple(files), None if data_dir is None else data_dir.absolute())


def _check_hub_keys(spec: SourceSpec) -> None:
    if given := [name for name in ("config", "split") if getattr(spec, name) is not None]:
        raise _error(spec, f"{given[0]} is for sources that are read from a hub, and this one has a path; leave it or the path out")
    if spec.revision is not None and spec.hub is None:
        raise _error(spec, "revision is of a hub's data set; give hub, too")


def _identified(record: AnyRecord | Drop, value: Any, spec: SourceSpec, number: int, place: int | None = None) -> AnyRecord | Drop:
    """The record with the id that its row has, where the recipe names the field; pairs of one row are told apart by their place."""
    if spec.id_field is None or isinstance(record, Drop | Document | EvaluationItem):
        return record
    found = str(number) if spec.id_field == ROW_NUMBER else scalar(lookup(value, spec.id_field))
    several = found is not None and place is not None and isinstance(record, PreferencePair)
    return replace(record, id=f"{found}#{place}" if several else found)


def _file_rows(spec: SourceSpec, adapter: Adapter, file: DataFile, format_name: str) -> Iterator[Row | Drop]:
    """The rows of a file; of an archive those of the members that the adapter reads."""
    if format_name == ARCHIVE:
        for member in members(file, lambda name: _reads(spec, adapter, f"{file.name}/{name}")):
            yield from _file_rows(spec, adapter, member, str(format_of(PurePosixPath(member.name))))
        return
    wanted = adapter.reading | spec.options
    options = {name: value for name, value in wanted.items() if name in FORMATS[format_name].options}
    yield from read_rows(file, format_name, options)


def _reads(spec: SourceSpec, adapter: Adapter, name: str) -> bool:
    """Whether a member of an archive is read: its suffix is of a format the adapter reads, and the adapter wants it."""
    kind = format_of(PurePosixPath(name))
    return kind in adapter.formats and kind != ARCHIVE and (adapter.selects is None or adapter.selects(name, spec))


def _files(spec: SourceSpec, adapter: Adapter, data_dir: Path | None) -> list[SourceFile]:
    """The files of a source with their formats, in natural order of their names.

    A directory stands for all files below it whose suffix the adapter reads (or, with `format`, whose suffix is of that
    format); a glob for all files it matches. Raises `UserError` when there are none, or when one is empty.
    """
    if spec.format is not None:
        _check_format(spec, adapter)
    if not spec.path:
        raise _error(spec, f"adapter {spec.adapter} needs a path")
    pattern = Path(spec.path).expanduser()
    if data_dir is None and not pattern.is_absolute():
        raise _error(spec, f"path {spec.path!r} is relative to the data directory; give data=DIR")
    base = (data_dir or Path()).absolute()
    found = _find(spec, adapter, base / pattern)
    files = [(file, spec.format or _kind_of(file.path)) for file in _grouped(sorted(found, key=_natural), base)]
    return [(file, _checked(spec, adapter, file, name)) for file, name in files]


def _kind_of(path: Path) -> str | None:
    return ARCHIVE if archive_of(path) else format_of(path)


def _grouped(paths: list[Path], base: Path) -> list[DataFile]:
    """The files, the parts of an archive as one."""
    files = []
    for whole, group in groupby(paths, key=lambda path: archive_of(path) or path):
        parts = tuple(group)
        files.append(DataFile(parts[0], _shown(whole, base), parts if parts != (whole,) else ()))
    return files


def _find(spec: SourceSpec, adapter: Adapter, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        wanted = (spec.format,) if spec.format else adapter.formats
        found = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path) and _kind_of(file) in wanted]
        if not found:
            raise _error(spec, f"{path} holds no {' or '.join(wanted)} file; name the files by a glob and give their format")
        return _selected(spec, adapter, found, path)
    if ARCHIVE in adapter.formats and (parts := list(path.parent.glob(f"{path.name}.part*"))):
        return parts
    anchor = Path(path.anchor)
    found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
    if not found:
        hub = f" (from {spec.hub})" if spec.hub else ""
        raise _error(spec, f"no such file or directory: {path}{hub}; check data=DIR and the path {spec.path!r}")
    return found


def _selected(spec: SourceSpec, adapter: Adapter, found: list[Path], below: Path) -> list[Path]:
    """The files of a directory that the adapter wants; what an archive's own name leaves open, its members' names say."""
    if adapter.selects is None:
        return found
    selected = [file for file in found if adapter.selects(file.relative_to(below.parent).as_posix(), spec)]
    if not selected:
        part = spec.options.get("part", "training")
        raise _error(
            spec, f"{below}: none of its {len(found)} files is labelled data of part {part}; check the path and option part"
        )
    return selected


def _checked(spec: SourceSpec, adapter: Adapter, file: DataFile, format_name: str | None) -> str:
    """The file's format, if the adapter can read it and it is not empty."""
    if format_name is None:
        raise _error(spec, f"{file.path}: its suffix is of no known format; give format: {', '.join(adapter.formats)}")
    if format_name not in adapter.formats:
        raise _error(spec, f"{file.path}: adapter {spec.adapter} does not read {format_name}, only {', '.join(adapter.formats)}")
    for path in file.paths:
        if path.stat().st_size == 0:
            raise _error(spec, f"{path}: the file is empty; fetch it again or leave it out")
    with file.path.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise _error(spec, f"{file.path}: is a Git LFS pointer, not the data; fetch it with git lfs pull")
    return format_name


def _check_format(spec: SourceSpec, adapter: Adapter) -> None:
    if spec.format not in (*FORMATS, ARCHIVE):
        raise _error(spec, f"unknown format {spec.format!r}{nearest(str(spec.format), FORMATS)}")
    if spec.format not in adapter.formats:
        raise _error(spec, f"adapter {spec.adapter} does not read {spec.format}, only {', '.join(adapter.formats)}")


def _check_options(spec: SourceSpec, adapter: Adapter, formats: Iterable[str]) -> None:
    known: dict[str, Option] = dict(adapter.options)
    for name in set(formats) - {ARCHIVE}:
        known |= FORMATS[name].options
    for name, value in spec.options.items():
        if name not in known:
            listed = f"; it has {', '.join(sorted(known))}" if known else "; it has none"
            raise _error(spec, f"unknown option {name!r} of adapter {spec.adapter}{nearest(name, known)}{listed}")
        if problem := known[name].problem(value):
            raise _error(spec, f"option {name!r} {problem}")
    if adapter.check is not None and (problem := adapter.check(spec)):
        raise _error(spec, problem)


def _shown(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which part-2 comes before part-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix()) if part]


def _error(spec: SourceSpec, message: str) -> UserError:
    return UserError(f"source {spec.name!r}: {message}")


def schema_error(spec: SourceSpec, drop: Drop) -> UserError:
    """The refusal of a source that begins with a row its adapter is not for."""
    return _error(spec, f"{drop.where}: adapter {spec.adapter}: {drop.detail}")
