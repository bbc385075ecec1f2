"""Sources of a recipe: which files they are, whether they can be read at all, and the records they give.

In: `SourceSpec`s and the data directory. Out: records and drops in file order, row by row. Everything the user can get wrong
about a source (adapter, option, format, path) is found by `check_sources` before anything is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from keural.data.adapters import ADAPTERS, Adapter, evaluation
from keural.data.adapters.base import lookup, scalar
from keural.data.filtering.gates import GATES
from keural.data.readers.archives import ARCHIVE, archive_of, members
from keural.data.readers.formats import FORMATS, DataFile, OptionTypes, Row, format_of, read_rows
from keural.data.readers.hub import check_hub, hub_content, hub_rows, is_hub
from keural.data.records import AnyRecord, Document, Drop, EvaluationItem, Record
from keural.errors import UserError, nearest
from keural.files import FileHashes
from keural.recipe import SourceSpec

Part = tuple[DataFile, str] | None
"""A file of a source and its format, or the whole source."""
ROW_NUMBER = "row_number"
"""The `id_field` of rows that have no id but stand in the same order as the set they translate."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_sources(sources: Iterable[SourceSpec], data_dir: Path | None) -> None:
    """Refuse sources that cannot be read.

    Raises `UserError` for an unknown adapter, format or option (naming the nearest), an option of a wrong type, a path that
    does not exist or holds no file that the adapter reads, and an empty file.
    """
    for source in sources:
        adapter = adapter_of(source)
        if not is_hub(source):
            _check_hub_keys(source)
        if is_hub(source):
            if source.format is not None:
                raise _error(source, "format is for files; datasets knows those of a hub")
            _check_options(source, adapter, ())
            check_hub(source, data_dir)
        elif adapter.formats:
            formats = {format_name for _, format_name in files_of(source, data_dir)}
            _check_options(source, adapter, formats)
        else:
            _own_rows(source, seed=0)
        _check_gates(source, adapter)


def _check_hub_keys(source: SourceSpec) -> None:
    if given := [name for name in ("config", "split") if getattr(source, name) is not None]:
        raise _error(
            source, f"{given[0]} is for sources that are read from a hub, and this one has a path; leave it or the path out"
        )
    if source.revision is not None and source.hub is None:
        raise _error(source, "revision is of a hub's data set; give hub, too")


def adapter_of(source: SourceSpec) -> Adapter:
    """The adapter of a source. Raises `UserError` naming the nearest one."""
    known = ADAPTERS | evaluation.ADAPTERS
    if source.adapter not in known:
        raise _error(source, f"unknown adapter {source.adapter!r}{nearest(source.adapter, known)}")
    return known[source.adapter]


def read_source(source: SourceSpec, data_dir: Path | None, seed: int, part: Part = None) -> Iterator[Record | Drop]:
    """Every row of a source as a record or a drop, in file order; with `part` only those of one of `parts_of`.

    `seed` is for sources that make their own rows.
    """
    for record in read_any(source, data_dir, seed, part):
        assert not isinstance(record, EvaluationItem), "kinds are checked at start-up"
        yield record


def parts_of(source: SourceSpec, data_dir: Path | None) -> list[Part]:
    """What a source can be read in apart from each other: its files with their formats; None for one that is read whole."""
    return [None] if is_hub(source) or not adapter_of(source).formats else list(files_of(source, data_dir))


def read_any(source: SourceSpec, data_dir: Path | None, seed: int, part: Part = None) -> Iterator[AnyRecord | Drop]:
    """As `read_source`, for evaluation sets too."""
    adapter = adapter_of(source)
    for number, row in enumerate(_rows(source, adapter, data_dir, seed, part), start=1):
        if isinstance(row, Drop):
            yield row
        elif adapter.split is None:
            yield _identified(adapter(row.value, source, row.where), row.value, source, number)
        else:
            for place, part in enumerate(adapter.split(row.value, source), start=1):
                yield _identified(adapter(part, source, f"{row.where}#{place}"), part, source, number)


def _identified(record: AnyRecord | Drop, value: Any, source: SourceSpec, number: int) -> AnyRecord | Drop:
    """The record with the id that its row has, where the recipe names the field."""
    if source.id_field is None or isinstance(record, Drop | Document | EvaluationItem):
        return record
    return replace(record, id=str(number) if source.id_field == ROW_NUMBER else scalar(lookup(value, source.id_field)))


def _rows(source: SourceSpec, adapter: Adapter, data_dir: Path | None, seed: int, part: Part) -> Iterator[Row | Drop]:
    if is_hub(source):
        yield from hub_rows(source, data_dir)
        return
    if not adapter.formats:
        rows = enumerate(_own_rows(source, seed), start=1)
        yield from (Row(f"{source.adapter}#{number}", value) for number, value in rows)
        return
    for file, format_name in files_of(source, data_dir) if part is None else [part]:
        if format_name == ARCHIVE:
            for member in members(file, lambda name, file=file: _reads(adapter, source, f"{file.name}/{name}")):  # type: ignore[misc]
                yield from _file_rows(member, str(format_of(PurePosixPath(member.name))), source)
        else:
            yield from _file_rows(file, format_name, source)


def _file_rows(file: DataFile, format_name: str, source: SourceSpec) -> Iterator[Row | Drop]:
    wanted = adapter_of(source).reading | source.options
    options = {name: value for name, value in wanted.items() if name in FORMATS[format_name].options}
    yield from read_rows(file, format_name, options)


def _reads(adapter: Adapter, source: SourceSpec, name: str) -> bool:
    """Whether a member of an archive is read: its suffix is of a format the adapter reads, and the adapter wants it."""
    kind = format_of(PurePosixPath(name))
    return kind in adapter.formats and kind != ARCHIVE and (adapter.selects is None or adapter.selects(name, source))


def _own_rows(source: SourceSpec, seed: int) -> Iterator[dict[str, Any]]:
    from keural import microworld

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
    files = [(file, source.format or _kind_of(file.path)) for file in _grouped(sorted(found, key=_natural), base)]
    return [(file, _checked(source, adapter, file, name)) for file, name in files]


def _kind_of(path: Path) -> str | None:
    return ARCHIVE if archive_of(path) else format_of(path)


def _grouped(paths: list[Path], base: Path) -> list[DataFile]:
    """The files, the parts of an archive as one."""
    files = []
    for whole, group in groupby(paths, key=lambda path: archive_of(path) or path):
        parts = tuple(group)
        files.append(DataFile(parts[0], _shown(whole, base), parts if parts != (whole,) else ()))
    return files


def _find(source: SourceSpec, adapter: Adapter, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        wanted = (source.format,) if source.format else adapter.formats
        found = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path) and _kind_of(file) in wanted]
        if not found:
            raise _error(source, f"{path} holds no {' or '.join(wanted)} file; name the files by a glob and give their format")
        return _selected(source, adapter, found, path)
    if ARCHIVE in adapter.formats and (parts := list(path.parent.glob(f"{path.name}.part*"))):
        return parts
    anchor = Path(path.anchor)
    found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
    if not found:
        hub = f" (from {source.hub})" if source.hub else ""
        raise _error(source, f"no such file or directory: {path}{hub}; check data=DIR and the path {source.path!r}")
    return found


def _selected(source: SourceSpec, adapter: Adapter, found: list[Path], below: Path) -> list[Path]:
    """The files of a directory that the adapter wants; what an archive's own name leaves open, its members' names say."""
    if adapter.selects is None:
        return found
    selected = [file for file in found if adapter.selects(file.relative_to(below.parent).as_posix(), source)]
    if not selected:
        part = source.options.get("part", "training")
        raise _error(
            source, f"{below}: none of its {len(found)} files is labelled data of part {part}; check the path and option part"
        )
    return selected


def _checked(source: SourceSpec, adapter: Adapter, file: DataFile, format_name: str | None) -> str:
    """The file's format, if the adapter can read it and it is not empty."""
    if format_name is None:
        raise _error(source, f"{file.path}: its suffix is of no known format; give format: {', '.join(adapter.formats)}")
    if format_name not in adapter.formats:
        raise _error(
            source, f"{file.path}: adapter {source.adapter} does not read {format_name}, only {', '.join(adapter.formats)}"
        )
    for path in file.paths:
        if path.stat().st_size == 0:
            raise _error(source, f"{path}: the file is empty; fetch it again or leave it out")
    with file.path.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise _error(source, f"{file.path}: is a Git LFS pointer, not the data; fetch it with git lfs pull")
    return format_name


def _check_format(source: SourceSpec, adapter: Adapter) -> None:
    if source.format not in (*FORMATS, ARCHIVE):
        raise _error(source, f"unknown format {source.format!r}{nearest(str(source.format), FORMATS)}")
    if source.format not in adapter.formats:
        raise _error(source, f"adapter {source.adapter} does not read {source.format}, only {', '.join(adapter.formats)}")


def _check_options(source: SourceSpec, adapter: Adapter, formats: Iterable[str]) -> None:
    known: dict[str, tuple[type, ...]] = dict(adapter.options)
    for name in set(formats) - {ARCHIVE}:
        known |= FORMATS[name].options
    choices: Mapping[str, tuple[str, ...]] = adapter.choices | {"split": ("file", "paragraph", "line")}
    for name, value in source.options.items():
        if name not in known:
            listed = f"; it has {', '.join(sorted(known))}" if known else "; it has none"
            raise _error(source, f"unknown option {name!r} of adapter {source.adapter}{nearest(name, known)}{listed}")
        _check_type(source, name, value, known)
        if name in choices and value not in choices[name]:
            raise _error(source, f"option {name!r} must be one of {', '.join(choices[name])}, got {value!r}")


def _check_gates(source: SourceSpec, adapter: Adapter) -> None:
    for name in source.gates:
        if name not in GATES:
            raise _error(source, f"unknown gate {name!r}{nearest(name, GATES)}; there are {', '.join(sorted(GATES))}")
    if source.gates.get("duplicate_prompts") == "count":
        raise _error(source, "gate duplicate_prompts can drop or skip, but not count")
    if source.id_space is not None and source.id_field is None:
        raise _error(source, "id_space needs id_field, the field that holds the id")
    settings = {
        "gates": source.gates.keys() - {"contaminated"},
        "min_characters": source.min_characters,
        "max_characters": source.max_characters,
        "max_length_ratio": source.max_length_ratio,
        "id_field": source.id_field,
    }
    if adapter.kind_of(source) == "documents" and (given := [name for name, value in settings.items() if value]):
        raise _error(source, f"{given[0]} is for conversations and pairs; adapter {source.adapter} gives documents")
    if adapter.kind_of(source) == "conversations" and source.max_length_ratio is not None:
        raise _error(source, f"max_length_ratio is for pairs; adapter {source.adapter} gives conversations")


def _check_type(source: SourceSpec, name: str, value: Any, known: OptionTypes) -> None:
    fits = isinstance(value, known[name]) and isinstance(value, bool) == (known[name] == (bool,))
    if isinstance(value, list):
        fits = fits and bool(value) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in value)
    if not fits:
        names = {bool: "true or false", str: "a text", int: "a column number", list: "a list of names", float: "a number"}
        raise _error(source, f"option {name!r} must be {' or '.join(names[kind] for kind in known[name])}, got {value!r}")


def content_of(source: SourceSpec, data_dir: Path | None, hashes: FileHashes) -> list[list[Any]]:
    """What determines a source's rows beside its settings: name, size and SHA-256 of every file (of the generator's, for own
    rows).
    """
    fixed: list[list[Any]] = []
    if is_hub(source):
        fixed, paths = hub_content(source, data_dir)
    elif adapter_of(source).formats:
        paths = [(file.name, path) for file, _ in files_of(source, data_dir) for path in file.paths]
    else:
        from keural import microworld

        folder = Path(str(microworld.__file__)).parent
        paths = [(path.name, path) for path in sorted(folder.glob("*.py"))]
    return fixed + [[name, path.stat().st_size, hashes.of(path)] for name, path in paths]


def _shown(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which part-2 comes before part-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix()) if part]


def _error(source: SourceSpec, message: str) -> UserError:
    return UserError(f"source {source.name!r}: {message}")
