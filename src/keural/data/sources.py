"""A source of a recipe, opened: its adapter is known, its options fit, its files are there; then the records that it gives.

In: `SourceSpec`s and the data directory. Out: `Source`s, and of each its records and drops in file order, row by row. What the
user can get wrong about a source (adapter, option, format, path) is found by `open_sources` before anything is read.
"""

import codecs
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from keural.data.adapters import Adapter, adapter_of
from keural.data.adapters.base import BadRow, lookup, scalar
from keural.data.adapters.composition import composed
from keural.data.field_use import ROW_NUMBER, FieldUse
from keural.data.readers.archives import ARCHIVE, ARCHIVES, archive_of, members
from keural.data.readers.datafile import DataFile, FileShape, Row
from keural.data.readers.dialects import NO_QUOTE
from keural.data.readers.formats import FILE_OPTIONS, FORMATS, format_of, read_rows
from keural.data.readers.hub import check_hub, hub_content, hub_rows, is_hub
from keural.data.readers.notes import ReadingNotes
from keural.data.readers.options import Option
from keural.data.readers.sniff import sniff, sniff_member
from keural.data.readers.tables import COLUMNS
from keural.data.readers.unpacking import PACKED
from keural.data.records import AnyRecord, Conversation, Document, Drop, EvaluationItem, Kind, PreferencePair, Record, answers_of
from keural.errors import UserError, for_all, nearest
from keural.files import FileHashes
from keural.recipe import SourceSpec

T = TypeVar("T")
SourceFile = tuple[DataFile, str]
"""A file of a source and its format."""
SUFFIXES = "suffixes"
"""Option with the ends of the names that are read, of a directory or an archive."""
PROSE = ("text", "markdown", "srt", "conllu")
"""Formats whose files are documents; those of the others hold rows."""
INVALID = "invalid_unicode"
_HOW_TEXT_IS_READ = ("encoding", "delimiter", "quote")


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
        return "answers" if self.spec.as_labels else self.adapter.kind_of(self.spec)

    @property
    def needs_seed(self) -> bool:
        """Whether its rows depend on the seed: the adapter makes them."""
        return self.adapter.rows is not None

    def parts(self) -> list[SourceFile | None]:
        """What it can be read in apart from each other: its files; None for a source that is read whole."""
        return list(self.files) or [None]

    def read(
        self, seed: int, file: SourceFile | None = None, fields: FieldUse | None = None, notes: ReadingNotes | None = None
    ) -> Iterator[Record | Drop]:
        """Every row as a record or a drop, in file order; with `file` only the rows of that one.

        `fields` is shown every row, `notes` is told what is assumed of files and changed in texts.
        """
        for record in self.read_any(seed, file, fields, notes):
            assert not isinstance(record, EvaluationItem), "kinds are checked at start-up"
            yield record

    def read_any(
        self, seed: int, file: SourceFile | None = None, fields: FieldUse | None = None, notes: ReadingNotes | None = None
    ) -> Iterator[AnyRecord | Drop]:
        """As `read`, for evaluation sets too."""
        notes, fields = notes or ReadingNotes(), fields or FieldUse(self.adapter, self.spec)
        for value, record in self.records(self.rows(seed, file, notes), fields, notes):
            if isinstance(record, Drop):
                fields.dropped(record, value)
            yield record

    def records(self, rows: Iterable[Row | Drop], fields: FieldUse, notes: ReadingNotes) -> Iterator[tuple[Any, AnyRecord | Drop]]:
        """What rows of it become, each with the value that it was made of; None for a row that could not be read."""
        for value, record in self._records(rows, fields, notes):
            if self.spec.as_labels and isinstance(record, PreferencePair):
                yield from ((value, answer) for answer in answers_of(record))
            elif self.spec.as_labels and isinstance(record, Conversation) and record.good is None:
                yield value, Drop("missing_label", record.where)
            else:
                yield value, record

    def _records(self, rows: Iterable[Row | Drop], fields: FieldUse, notes: ReadingNotes) -> Iterator[tuple[Any, AnyRecord | Drop]]:
        """What its adapter makes of rows."""
        spec, adapter = self.spec, self.adapter
        split = adapter.splitter(spec)
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Drop):
                yield None, row
            elif split is None:
                fields.look(row.value)
                yield row.value, _finished(adapter(row.value, spec, row.where), row.value, spec, number, notes)
            else:
                fields.see(row.value)
                for place, value in enumerate(split(row.value, spec), start=1):
                    whole = row.value if isinstance(value, BadRow) else value  # what could not be taken apart
                    fields.look(whole)
                    where = f"{row.where}#{place}"
                    yield whole, _finished(adapter(value, spec, where), whole, spec, number, notes, place)

    def rows(self, seed: int, file: SourceFile | None = None, notes: ReadingNotes | None = None) -> Iterator[Row | Drop]:
        """Every row as it is read, before an adapter sees it; with `file` only those of that one."""
        notes = notes or ReadingNotes()
        spec, adapter = self.spec, self.adapter
        if is_hub(spec):
            yield from hub_rows(spec, self.data_dir)
        elif adapter.rows is not None:
            for number, value in enumerate(adapter.rows(spec.options, seed), start=1):
                yield Row(f"{spec.adapter}#{number}", value)
        else:
            for opened, format_name in self.files if file is None else [file]:
                yield from _file_rows(spec, adapter, opened, format_name, notes, is_one_of_many=len(self.files) > 1)

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


def lacks_directory(specs: Iterable[SourceSpec], data_dir: Path | None) -> bool:
    """Whether a path of some sources is relative to a data directory that is not given."""
    paths = [Path(spec.path).expanduser() for spec in specs if spec.path]
    return data_dir is None and not all(path.is_absolute() for path in paths)


def open_sources(specs: Iterable[SourceSpec], data_dir: Path | None) -> list[Source]:
    """The sources of these settings. Raises `UserError` as `open_source` does, for all that cannot be read at once."""
    return for_all(specs, lambda spec: open_source(spec, data_dir))


def open_source(spec: SourceSpec, data_dir: Path | None) -> Source:
    """The source, if it can be read.

    Raises `UserError` for an unknown adapter, format or option (naming the nearest), an option of a wrong type, a path that
    does not exist or holds no file that the adapter reads, and an empty file.
    """
    adapter = adapter_of(spec)
    _check_reader_options(spec)
    if spec.as_labels and (kind := adapter.kind_of(spec)) not in ("conversations", "pairs"):
        raise _error(spec, f"as_labels is of conversations and pairs; adapter {spec.adapter} gives {kind}")
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


def _finished(
    record: AnyRecord | Drop, value: Any, spec: SourceSpec, number: int, notes: ReadingNotes, place: int | None = None
) -> AnyRecord | Drop:
    """The record with the id that its row has, where the recipe names the field (pairs of one row are told apart by their place),
    and its Hangul composed; or the drop.
    """
    if isinstance(record, Drop):
        is_bare = record.reason == INVALID and not record.detail
        return replace(record, detail=notes.undecodable) if is_bare and notes.undecodable else record
    record = composed(record, notes)
    if spec.id_field is None or isinstance(record, Document | EvaluationItem):
        return record
    found = str(number) if spec.id_field == ROW_NUMBER else scalar(lookup(value, spec.id_field))
    several = found is not None and place is not None and isinstance(record, PreferencePair)
    return replace(record, id=f"{found}#{place}" if several else found)


def _file_rows(
    spec: SourceSpec, adapter: Adapter, file: DataFile, format_name: str, notes: ReadingNotes, is_one_of_many: bool
) -> Iterator[Row | Drop]:
    """The rows of a file; of an archive those of the members that the adapter reads.

    Raises `UserError` where there are none; a member without rows is a drop, and so is one of many files without a line that begins
    as the option `prefix` says: that chooses among files, too.
    """
    if format_name in ARCHIVES:
        yield from _archive_rows(spec, adapter, file, format_name, notes)
        return
    options = _reader_options(spec, adapter, format_name)
    number = 0
    for number, row in enumerate(_refusing(spec, read_rows(file, format_name, options, notes)), start=1):  # noqa: B007
        yield row
    if not number and file.open is None and not (options.get("prefix") and is_one_of_many):
        raise _error(spec, f"{file.name} holds no rows{_why_none(file, options)}; fetch it again or leave it out")
    if not number:
        yield Drop("no_rows", file.name)


def _refusing(spec: SourceSpec, items: Iterator[T]) -> Iterator[T]:
    """The items; a `UserError` while they are made names the source. What becomes of an item is not looked at."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except UserError as error:
            raise _error(spec, str(error)) from error
        yield item


def _why_none(file: DataFile, options: Mapping[str, Any]) -> str:
    if options.get("prefix"):
        return f": no line begins with {options['prefix']!r}"
    return ": a header and nothing below it, or only empty lines" if file.shape and file.shape.delimiter else ""


def _reader_options(spec: SourceSpec, adapter: Adapter, format_name: str) -> dict[str, Any]:
    """Options of the reader, and the columns that the recipe names by number."""
    wanted = adapter.reading | spec.options
    options = {name: value for name, value in wanted.items() if name in FORMATS[format_name].options}
    given = [value for name, value in spec.options.items() if name in adapter.options and adapter.options[name].names_fields]
    named = [item for value in given for item in (value if isinstance(value, list) else [value])]
    return options | {COLUMNS: [name for name in named if isinstance(name, int)]}


def _archive_rows(
    spec: SourceSpec, adapter: Adapter, file: DataFile, format_name: str, notes: ReadingNotes
) -> Iterator[Row | Drop]:
    others: Counter[str] = Counter()
    seen: dict[str, str] = {}

    def wanted(name: str) -> bool:
        reads = _reads(spec, adapter, f"{file.name}/{name}")
        if not reads:
            others[PurePosixPath(name).suffix or "without suffix"] += 1
        return reads

    for packed in _refusing(spec, members(file, wanted, format_name)):
        member = sniff_member(packed, adapter.reading | spec.options)
        shape = member.shape
        assert shape is not None, "sniff_member gives it"
        named = format_of(PurePosixPath(member.name))
        kind = _readable(spec, adapter, member.name, shape, named)
        if kind in ARCHIVES:
            raise _error(spec, f"{member.name} is an archive inside an archive; unpack {file.path.name} and give the directory")
        if named is not None:
            seen.setdefault(kind, member.name)
            _check_mixture(spec, adapter, file.name, seen)
        yield from _file_rows(spec, adapter, member, kind, notes, is_one_of_many=True)
        seen.setdefault(kind, member.name)
    if not seen:
        raise _error(spec, f"{file.path} holds no file that adapter {spec.adapter} reads{_listed(others)}")


def _reads(spec: SourceSpec, adapter: Adapter, name: str) -> bool:
    """Whether a member of an archive is read: its suffix is of a format the adapter reads, and the adapter wants it."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return False
    return _is_wanted(spec, adapter, path) and (adapter.selects is None or adapter.selects(name, spec))


def _is_wanted(spec: SourceSpec, adapter: Adapter, path: PurePath) -> bool:
    """Whether the name of a file in a directory or an archive is of those that are read."""
    if suffixes := _suffixes(spec):
        return path.name.lower().endswith(suffixes)
    if archive_of(Path(path)) and isinstance(path, Path):
        return ARCHIVE in ((spec.format,) if spec.format else adapter.formats)
    return format_of(path) in ((spec.format,) if spec.format else adapter.directory or adapter.formats)


def _suffixes(spec: SourceSpec) -> tuple[str, ...]:
    given = spec.options.get(SUFFIXES, [])
    return tuple(str(suffix).lower() for suffix in (given if isinstance(given, list) else [given]))


def _files(spec: SourceSpec, adapter: Adapter, data_dir: Path | None) -> list[SourceFile]:
    """The files of a source with their formats, in natural order of their names.

    A directory stands for all files below it whose suffix the adapter reads (or, with `format`, whose suffix is of that
    format; with option `suffixes`, whose name ends so); a glob for all files it matches. Raises `UserError` when there are none,
    when one is empty or is not what its name or the recipe says, and when running text and tables are mixed.
    """
    if spec.format is not None:
        _check_format(spec, adapter)
    if not spec.path:
        raise _error(spec, f"adapter {spec.adapter} needs a path")
    pattern = Path(spec.path).expanduser()
    if data_dir is None and not pattern.is_absolute():
        raise _error(spec, f"path {spec.path!r} is relative to the data directory; give data=DIR")
    base = (data_dir or Path()).absolute()
    if not (base / pattern).exists() and not spec.path.isascii():  # files from a Mac may be named letter by letter
        forms = [Path(unicodedata.normalize(form, str(pattern))) for form in ("NFC", "NFD")]
        pattern = next((form for form in forms if (base / form).exists()), pattern)
    found = _find(spec, adapter, base / pattern)
    if not (base / pattern).is_file():
        _check_mixture(spec, adapter, str(base / pattern), _first_of_format(found))
    return [_checked(spec, adapter, file) for file in _grouped(sorted(found, key=_natural), base)]


def _first_of_format(paths: Sequence[Path]) -> dict[str, str]:
    """The first file of each format, by its suffix."""
    first: dict[str, str] = {}
    for path in sorted(paths, key=_natural):
        if (kind := format_of(path)) is not None:
            first.setdefault(kind, path.name)
    return first


def _check_mixture(spec: SourceSpec, adapter: Adapter, place: str, seen: Mapping[str, str]) -> None:
    """Refuse running text beside tables: the settings of a repository are no rows of a set, and its prose is no table."""
    prose = [name for name in PROSE if name in seen]
    tables = [name for name in seen if name in FORMATS and name not in PROSE]
    if spec.format or SUFFIXES in spec.options or not prose or not tables:
        return
    named = ", ".join(f"{name} (first {seen[name]})" for name in (*prose, *tables))
    raise _error(
        spec,
        f"{place} holds running text and tables: {named}; say which with format: {prose[0]} or {tables[0]}, or with "
        f"options: {{suffixes: [{PurePath(seen[prose[0]]).suffix}]}}",
    )


def _listed(suffixes: Mapping[str, int]) -> str:
    """What was found instead, and what to do."""
    if not suffixes:
        return ""
    named = ", ".join(f"{suffix} ({count:,})" for suffix, count in Counter(suffixes).most_common(6))
    packed = next((suffix for suffix in suffixes if format_of(PurePath(f"a{suffix}")) in ARCHIVES or suffix in PACKED), None)
    example = next((suffix for suffix in suffixes if suffix.startswith(".")), None)
    if packed:
        return f", but {named}; name an archive by its own path"
    return f", but {named}" + (f"; name those to read: options: {{suffixes: [{example}]}}" if example else "; give format")


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
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)]
        found = [file for file in files if _is_wanted(spec, adapter, file)]
        if not found:
            wanted = " or ".join(_suffixes(spec) or ((spec.format,) if spec.format else adapter.directory or adapter.formats))
            others = Counter(file.suffix or "without suffix" for file in files)
            raise _error(spec, f"{path} holds no {wanted} file{_listed(others)}")
        return _selected(spec, adapter, found, path)
    if path.suffix.lower() == ".zip" and (parts := list(path.parent.glob(f"{path.name}.part*"))):
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


def _checked(spec: SourceSpec, adapter: Adapter, file: DataFile) -> SourceFile:
    """The file and its format, if the adapter can read it and it is not empty."""
    for path in file.paths:
        if path.stat().st_size == 0:
            raise _error(spec, f"{path}: the file is empty; fetch it again or leave it out")
    if file.parts:
        return file, ARCHIVE
    options = adapter.reading | spec.options
    try:
        given = [options.get(name) for name in _HOW_TEXT_IS_READ]
        shape = _shape(file, file.path.stat(), spec.format, *(value if isinstance(value, str) else None for value in given))
    except UserError as error:
        raise _error(spec, str(error)) from error
    kind = _readable(spec, adapter, str(file.path), shape, spec.format or format_of(file.path))
    return file._replace(shape=shape), kind


def _shape(file: DataFile, stat: os.stat_result, declared: str | None, *dialect: str | None) -> FileShape:
    """What a file is; it is not looked at again as long as its size and time stay."""
    return _shape_at(file, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino), declared, dialect)


@lru_cache(maxsize=1 << 14)
def _shape_at(file: DataFile, version: tuple[int, ...], declared: str | None, dialect: tuple[str | None, ...]) -> FileShape:
    given = zip(_HOW_TEXT_IS_READ, dialect, strict=True)
    return sniff(file, declared, {name: value for name, value in given if value is not None})


def _readable(spec: SourceSpec, adapter: Adapter, name: str, shape: FileShape, named: str | None) -> str:
    """The format as which a file is read. Raises `UserError` where the adapter cannot read it."""
    if shape.problem is not None:
        raise _error(spec, f"{name}: {shape.problem}")
    kind = shape.format
    if named is None and kind not in (*ARCHIVES, "parquet"):
        if _suffixes(spec) and "text" in adapter.formats:
            return "text"
        if not _suffixes(spec) or kind not in adapter.formats:
            looks = f"; it looks like {shape.shows}" if shape.shows in adapter.formats else ""
            advice = shape.shows if looks else ", ".join(adapter.formats)
            raise _error(spec, f"{name}: its suffix is of no known format{looks}; give format: {advice}")
    if kind in ARCHIVES or kind in adapter.formats:
        return str(kind)
    looks = f"; it looks like {shape.shows}: give format: {shape.shows}" if shape.shows in adapter.formats else ""
    raise _error(spec, f"{name}: adapter {spec.adapter} does not read {kind}, only {', '.join(adapter.formats)}{looks}")


def _check_format(spec: SourceSpec, adapter: Adapter) -> None:
    if spec.format not in (*FORMATS, *ARCHIVES):
        raise _error(spec, f"unknown format {spec.format!r}{nearest(str(spec.format), FORMATS)}")
    if spec.format not in (*adapter.formats, *ARCHIVES):
        raise _error(spec, f"adapter {spec.adapter} does not read {spec.format}, only {', '.join(adapter.formats)}")


def _check_options(spec: SourceSpec, adapter: Adapter, formats: Iterable[str]) -> None:
    known: dict[str, Option] = dict(adapter.options)
    read = set(formats)
    for name in set(adapter.formats) & FORMATS.keys() if read & {*ARCHIVES} else read:
        known |= FORMATS[name].options
    if read:
        known |= FILE_OPTIONS
    for name, value in spec.options.items():
        if name not in known:
            listed = f"; it has {', '.join(sorted(known))}" if known else "; it has none"
            raise _error(spec, f"unknown option {name!r} of adapter {spec.adapter}{nearest(name, known)}{listed}")
        if problem := known[name].problem(value):
            raise _error(spec, f"option {name!r} {problem}")
    if adapter.check is not None and (problem := adapter.check(spec)):
        raise _error(spec, problem)


def _check_reader_options(spec: SourceSpec) -> None:
    """Refuse an encoding that Python does not know, and delimiters and quotation marks that are no character."""
    options = {name: value for name, value in spec.options.items() if isinstance(value, str)}  # other types are refused later
    if spec.options.get("encoding") is not None and "encoding" not in options:
        raise _error(spec, f"option 'encoding' must be a text, got {spec.options['encoding']!r}")
    if (encoding := options.get("encoding")) is not None:
        try:
            is_text = codecs.lookup(encoding)._is_text_encoding and encoding.lower() not in ("idna", "punycode", "undefined")
        except (LookupError, ValueError):
            is_text = False
        if not is_text:
            known = (
                "utf-8",
                "utf-16",
                "utf-16-le",
                "utf-32",
                "cp949",
                "euc-kr",
                "cp1252",
                "latin-1",
                "gb18030",
                "big5",
                "shift_jis",
            )
            raise _error(spec, f"unknown encoding {encoding!r}{nearest(encoding, known)}")
    for name in ("delimiter", "quote"):
        value = options.get(name)
        if value is not None and (len(value) != 1 or value in "\r\n") and (name, value) != ("quote", NO_QUOTE):
            other = f", or {NO_QUOTE}" if name == "quote" else ""
            raise _error(spec, f"option {name!r} must be one character{other}, got {value!r}")


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
