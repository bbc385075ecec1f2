"""Rows from files: text, Markdown, JSON lines, JSON, YAML, Parquet, CSV, TSV, gettext catalogues, subtitles and CoNLL-U, all but
Parquet also packed by gzip, bzip2, xz and Zstandard.

In: a `DataFile` and the options of its format. Out: `Row`s, each with the place it came from, or a `Drop` where a row or file
cannot be read. How text is encoded and a table divided is found out (`sniff`) or given; bytes that are no text in that
encoding become lone surrogates, which no adapter lets through. What a row means is the adapters' business.

A file may come from anybody: a packed one that unpacks to far more than it should is refused, a row that is too long is a drop and
is never held in memory, and what a parser cannot take (nesting, dates, numbers of a thousand digits) costs its row, or the file
where the file is one value.
"""

import codecs
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any
from zoneinfo import ZoneInfo

from keural.data.readers import lines as lines_of
from keural.data.readers.datafile import DataFile, FileShape, Joined, Row, open_bytes
from keural.data.readers.lines import numbered_lines
from keural.data.readers.notes import ReadingNotes
from keural.data.readers.options import LIST, SWITCH, TEXT, Option, OptionTable
from keural.data.readers.po import PoError, parse_po
from keural.data.readers.sentences import Sentence, cues, sentences
from keural.data.readers.sniff import DAMAGE, SUFFIXES, codec_of, damaged, format_of, read_start, sniff_start
from keural.data.readers.tables import read_table
from keural.data.readers.unpacking import PACKED, check_ratio
from keural.data.records import Drop
from keural.errors import UserError, quoted
from keural.parsing import Malformed, holds_unreadable, parse_yaml_rows

__all__ = ["FORMATS", "DataFile", "Format", "Options", "Row", "format_of", "open_text", "read_rows"]

Options = Mapping[str, Any]
GUTENBERG_START = re.compile(r"^\s*\*{3}\s*START OF TH(?:E|IS) PROJECT GUTENBERG.*$", re.MULTILINE)
GUTENBERG_END = re.compile(
    r"^\s*(?:\*{3}\s*END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*$", re.MULTILINE
)
GUTENBERG_CREDITS = re.compile(r"\A\s*Produced by .*?\n\s*\n", re.DOTALL)

MAX_WHOLE_BYTES = 8 << 30
"""Largest file, unpacked, of a format that is read as one value: JSON, YAML, catalogues, Markdown, text as one document."""
SECTION = 6000
"""Characters that a section of a text has at least, but for the last."""
TOO_LONG = "row_too_long"
REPEATED = "repeated_key"
"""Reason of JSON objects that say two things under one name."""
_DECODING = threading.local()
"""The stream that this thread decodes at the moment."""


def _as_surrogates(error: UnicodeError) -> tuple[str, int]:
    """Undecodable bytes as lone surrogates, in every encoding; Python's own handler knows bytes from 0x80 only."""
    assert isinstance(error, UnicodeDecodeError)
    _DECODING.stream.undecodable(error)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("keural.surrogates", _as_surrogates)


class _Undecoded(io.BufferedReader):
    """The bytes of a text, counted, so that the place of the first that cannot be decoded is known."""

    def __init__(self, raw: IO[bytes], encoding: str, notes: ReadingNotes) -> None:
        super().__init__(raw, 1 << 16)  # type: ignore[arg-type]
        self._encoding, self._notes = encoding, notes
        self._count = 0
        self._is_damaged = False

    def read1(self, size: int = -1, /) -> bytes:
        """The next bytes, which are decoded at once."""
        piece = super().read1(size)
        self._count += len(piece)
        _DECODING.stream = self
        return piece

    def undecodable(self, error: UnicodeDecodeError) -> None:
        """Take note of the first bytes that are no text; those given last end where the file has been read to."""
        if not self._is_damaged:
            self._is_damaged = True
            offset = self._count - len(error.object) + error.start
            found = error.object[error.start : error.end].hex(" ")
            self._notes.undecodable = f"the bytes {found} at offset {offset:,} are not {self._encoding}"


Reader = Callable[["_Opened"], Iterator[Row | Drop]]


@dataclass(frozen=True)
class Format:
    """How files of some suffixes are read, and which options change that."""

    read: Reader
    suffixes: tuple[str, ...]
    options: OptionTable = field(default_factory=dict)


def read_rows(file: DataFile, format_name: str, options: Options, notes: ReadingNotes | None = None) -> Iterator[Row | Drop]:
    """The rows of one file; what was assumed of it goes into `notes`.

    Raises `UserError` when it cannot be opened, unpacked or understood.
    """
    try:
        yield from FORMATS[format_name].read(_Opened(file, format_name, options, notes or ReadingNotes()))
    except DAMAGE as error:
        raise damaged(file, error) from error
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise UserError(f"{file.name}: too large for the memory there is; divide the file, or give it as JSON lines") from error


@dataclass
class _Opened:
    """A file while a reader reads it."""

    file: DataFile
    format_name: str
    options: Options
    notes: ReadingNotes

    @property
    def name(self) -> str:
        """What the file is called in messages and places."""
        return self.file.name

    @contextmanager
    def text(self) -> Iterator[tuple[IO[str], FileShape]]:
        """The file as text, unpacked and decoded, and its shape; line ends stay as they are."""
        opened, packing = open_bytes(self.file)
        with opened:
            shape, start = self.file.shape, b""
            if shape is None:
                start = read_start(opened)
                shape = sniff_start(start, self.file, packing, None, self.options)
            self.notes.file(self.name, shape)
            if shape.problem or shape.encoding is None:
                raise UserError(f"{self.name}: {shape.problem or 'is no text'}")
            codec = codec_of(shape.encoding, start or opened.peek(4))  # type: ignore[attr-defined]
            joined: Any = Joined(start, opened) if start else opened
            counted = _Undecoded(joined, shape.encoding, self.notes)
            with io.TextIOWrapper(counted, codec, "keural.surrogates", newline=None if shape.newline == "\r" else "\n") as text:
                yield text, shape


@contextmanager
def open_text(file: DataFile) -> Iterator[IO[str]]:
    """A file as text, unpacked and decoded; line ends stay as they are, undecodable bytes become lone surrogates."""
    with _Opened(file, "text", {}, ReadingNotes()).text() as (text, _):
        yield text


def _whole_text(opened: _Opened) -> str:
    """All of a file that is one value. Raises `UserError` where it is too large for that."""
    file = opened.file
    pieces, left = [], MAX_WHOLE_BYTES
    with opened.text() as (text, shape):
        if file.open is None and shape.packing is None and file.path.stat().st_size > MAX_WHOLE_BYTES:
            raise _too_large(file)
        while piece := text.read(1 << 24):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise _too_large(file)
    return "".join(pieces).replace("\r\n", "\n")


def _too_large(file: DataFile) -> UserError:
    return UserError(f"{file.name}: over {MAX_WHOLE_BYTES:,} bytes, which are read as one value; divide it, or use JSON lines")


def _read_text(opened: _Opened) -> Iterator[Row | Drop]:
    options, name = opened.options, opened.name
    split = options.get("split", "file")
    if split != "file" and not options.get("gutenberg"):  # such files can be larger than memory
        with opened.text() as (lines, _):
            yield from _split(name, numbered_lines(lines), split, options.get("prefix", ""))
        return
    text = _whole_text(opened)
    if options.get("gutenberg"):
        start, end = GUTENBERG_START.search(text), GUTENBERG_END.search(text)
        if not start or not end or start.end() > end.start():
            yield Drop("no_gutenberg_markers", name)
            return
        text = GUTENBERG_CREDITS.sub("", text[start.end() : end.start()]).strip("\n") + "\n"
    if prefix := options.get("prefix"):
        text = "".join(line.removeprefix(prefix) + "\n" for line in text.split("\n") if line.startswith(prefix))
    if split == "file":
        yield Row(name, {"text": text})
    else:
        yield from _split(name, enumerate(text.splitlines(keepends=True), start=1), split, "")


def _split(name: str, lines: Iterable[tuple[int, str | None]], split: str, prefix: str) -> Iterator[Row | Drop]:
    """Lines, paragraphs, or sections: paragraphs with an empty line between them, until they have `SECTION` characters."""
    if split != "section":
        yield from _pieces(name, lines, split, prefix)
        return
    section: list[Row] = []
    for piece in _pieces(name, lines, "paragraph", prefix):
        if isinstance(piece, Drop):
            yield piece
            continue
        section.append(piece)
        if sum(len(row.value["text"]) for row in section) >= SECTION:
            yield _section(section)
            section = []
    if section:
        yield _section(section)


def _section(paragraphs: list[Row]) -> Row:
    return Row(paragraphs[0].where, {"text": "\n\n".join(row.value["text"] for row in paragraphs)})


def _pieces(name: str, lines: Iterable[tuple[int, str | None]], split: str, prefix: str) -> Iterator[Row | Drop]:
    """Lines that hold something, or runs of them between empty ones, each with the number of its (first) line."""
    piece: list[str] = []
    start = size = 0
    longest = lines_of.MAX_ROW_CHARACTERS

    def finished() -> Row | Drop:
        where = f"{name}:{start}"
        return Drop(TOO_LONG, where) if size > longest else Row(where, {"text": "\n".join(piece)})

    for number, raw in lines:
        line = None if raw is None else raw.removesuffix("\n").removesuffix("\r")
        if line is not None and not line.startswith(prefix):
            continue
        line = None if line is None else line.removeprefix(prefix)
        empty = line is not None and not line.strip()
        if start and (split == "line" or empty):
            yield finished()
            piece, start, size = [], 0, 0
        if empty:
            continue
        start = start or number
        size += longest + 1 if line is None else len(line) + 1
        if line is None or size > longest:
            piece = []
        else:
            piece.append(line)
    if start:
        yield finished()


def _read_markdown(opened: _Opened) -> Iterator[Row | Drop]:
    yield Row(opened.name, {"text": _whole_text(opened)})


class _Repeated(ValueError):
    """An object has two values under one name."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises `_Repeated` where it says two things under one name: a row could keep only one."""
    value = dict(pairs)
    if len(value) < len(pairs) and any(value[key] != given for key, given in pairs):
        names = Counter(key for key, _ in pairs)
        raise _Repeated(next(key for key, given in pairs if names[key] > 1 and value[key] != given))
    return value


def _read_jsonl(opened: _Opened) -> Iterator[Row | Drop]:
    name = opened.name
    loads = json.JSONDecoder(object_pairs_hook=_once).decode
    with opened.text() as (text, _):
        for number, line in numbered_lines(text):
            if line is None:
                yield Drop(TOO_LONG, f"{name}:{number}")
                continue
            if not line.strip():
                continue
            try:
                yield Row(f"{name}:{number}", loads(line.removeprefix("\ufeff")))  # files that were put together begin so again
            except json.JSONDecodeError as error:
                yield Drop("malformed_row", f"{name}:{number}", _place(error))
            except _Repeated as error:
                yield Drop(REPEATED, f"{name}:{number}", str(error))
            except RecursionError:
                yield Drop("malformed_row", f"{name}:{number}", "brackets without end")
            except ValueError:
                yield Drop("malformed_row", f"{name}:{number}", "a number has too many digits")


def _place(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON, in words that are the same for every row with the same fault."""
    return "no JSON object or list" if error.pos == 0 else error.msg.removesuffix(":").lower()


def _read_json(opened: _Opened) -> Iterator[Row | Drop]:
    text = _whole_text(opened)
    if not text.strip():
        return
    try:
        value = json.loads(text, object_pairs_hook=_once_in_file)
    except json.JSONDecodeError as error:
        several = "several values one after another; one a line is jsonl" if error.msg == "Extra data" else _place(error)
        yield Drop("malformed_file", f"{opened.name}:{error.lineno}", several)
        return
    except RecursionError:
        yield Drop("malformed_file", opened.name, "brackets without end")
        return
    except ValueError:
        yield Drop("malformed_file", opened.name, "a number has too many digits")
        return
    for item in _items(opened, value):
        twice = isinstance(item, Row) and _repeated_in(item.value)
        yield Drop(REPEATED, item.where, twice) if twice else item


class _RepeatedIn(dict[str, Any]):
    """An object inside a file of JSON that has two values under one name; its row is dropped."""

    key = ""


def _once_in_file(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return _once(pairs)
    except _Repeated as error:
        bad = _RepeatedIn(pairs)
        bad.key = str(error)
        return bad


def _repeated_in(value: Any) -> str:
    """The name that an object inside `value` has twice; empty where none has."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, _RepeatedIn):
            return part.key
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return ""


def _read_yaml(opened: _Opened) -> Iterator[Row | Drop]:
    text = _whole_text(opened)
    if not text.strip():
        return
    try:
        value, partly = parse_yaml_rows(text)
    except Malformed as error:
        yield Drop("malformed_file", f"{opened.name}:{error.line}" if error.line else opened.name)
        return
    if value is None and "rows" not in opened.options:
        return
    for item in _items(opened, value):
        bad = partly and isinstance(item, Row) and holds_unreadable(item.value)
        yield Drop("malformed_row", item.where) if bad else item


def _items(opened: _Opened, value: Any) -> Iterator[Row | Drop]:
    """A list's items are rows; option `rows` names the list inside an object; an object without it is one row."""
    name, options = opened.name, opened.options
    for key in options["rows"].split(".") if "rows" in options else ():
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or (not isinstance(value, list) and "rows" in options):
        yield Drop("malformed_file", name, f"no list under {options['rows']}" if "rows" in options else "no value")
    elif isinstance(value, list):
        yield from (Row(f"{name}#{number}", item) for number, item in enumerate(value, start=1))
    else:
        yield Row(name, value)


def _read_parquet(opened: _Opened) -> Iterator[Row | Drop]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{opened.file.path}: reading Parquet needs pyarrow; install keural[data]") from error
    file = opened.file
    packing = file.shape.packing if file.shape else None
    if file.open is not None or packing or file.path.suffix.lower() in PACKED:
        raise UserError(f"{file.name}: Parquet is not read inside other packing; unpack it")
    opened.notes.file(file.name, file.shape)
    try:
        with ParquetFile(file.path) as table:
            _check_parquet(file, table)
            whole = _whole_columns(table)
            if whole:
                opened.notes.assume(
                    file.name, f"holds whole numbers and empty cells as floats, read as whole numbers: {', '.join(whole)}"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for value in _parquet_rows(_with_whole(batch, whole)):
                    number += 1
                    where = f"{file.name}#{number}"
                    yield Drop("malformed_row", where) if value is None else Row(where, value)
    except MemoryError:
        raise
    except (ArrowException, *_BAD_CELL) as error:
        raise UserError(f"{file.path}: not a readable Parquet file ({error}); fetch it again") from error


_BAD_CELL = (ValueError, OverflowError, LookupError, TypeError)
"""What pyarrow and Python's dates raise of a cell: bytes that are no UTF-8, a day outside the calendar."""


_MOST_WHOLE = 2.0**53
"""Below it a float says every whole number exactly."""


def _whole_columns(table: Any) -> list[str]:
    """Columns of floats that hold whole numbers and nulls only: whole numbers, as pandas keeps them where some are missing."""
    import pyarrow.compute as compute
    from pyarrow import types

    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    found = []
    for place in range(table.metadata.num_columns if groups else 0):
        name = groups[0].column(place).path_in_schema
        statistics = [group.column(place).statistics for group in groups]
        nulls = sum(part.null_count or 0 for part in statistics if part is not None)
        if not nulls or name not in table.schema_arrow.names or not types.is_floating(table.schema_arrow.field(name).type):
            continue
        parts = [batch.column(0) for batch in table.iter_batches(batch_size=1 << 16, columns=[name])]
        are_whole = [compute.all(compute.equal(compute.floor(part), part)).as_py() is not False for part in parts]
        are_small = [compute.all(compute.less(compute.abs(part), _MOST_WHOLE)).as_py() is not False for part in parts]
        if all(are_whole) and all(are_small) and nulls < table.metadata.num_rows:
            found.append(name)
    return found


def _with_whole(batch: Any, names: list[str]) -> Any:
    """A batch with these columns as whole numbers."""
    for name in names:
        place = batch.schema.get_field_index(name)
        batch = batch.set_column(place, name, batch.column(place).cast("int64"))
    return batch


def _parquet_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one with a cell that cannot be read."""
    try:
        yield from batch.to_pylist()
        return
    except _BAD_CELL:
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except _BAD_CELL:
            yield None


def _check_parquet(file: DataFile, table: Any) -> None:
    """Refuse a file whose columns are packed far too well, with two of one name, or with a time zone that nobody knows."""
    names = Counter(table.schema_arrow.names)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"{file.name}: {names[twice[0]]} columns are called {quoted(twice[0])}, and a row would keep only one; rename them"
        )
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        unpacked = sum(column.total_uncompressed_size for column in columns)
        check_ratio(file.name, unpacked, sum(column.total_compressed_size for column in columns))
    for name, zone in _zones(table.schema_arrow):
        try:
            ZoneInfo(zone)
        except (ValueError, LookupError, OSError) as error:
            if not re.fullmatch(r"[+-]\d\d:\d\d", zone):
                raise UserError(f"{file.name}: column {name!r} has the time zone {quoted(zone)}, which nobody knows") from error


def _zones(fields: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Columns of a schema, or fields inside one, that hold times with a zone."""
    for number in range(len(fields) if hasattr(fields, "names") else fields.num_fields):
        field = fields.field(number)
        if zone := getattr(field.type, "tz", None):
            yield prefix + field.name, zone
        if getattr(field.type, "num_fields", 0):
            yield from _zones(field.type, f"{prefix}{field.name}.")


def _read_table(opened: _Opened) -> Iterator[Row | Drop]:
    with opened.text() as (text, shape):
        yield from read_table(opened.name, text, shape, opened.options)


def _read_po(opened: _Opened) -> Iterator[Row | Drop]:
    try:
        yield Row(opened.name, {"messages": parse_po(_whole_text(opened))})
    except PoError as error:
        yield Drop("malformed_file", f"{opened.name}:{error.line}")


def _reader_of(parse: Callable[[Iterable[tuple[int, str | None]]], Iterator[Sentence]]) -> Reader:
    """The reader of a format whose text stands in sentences or cues: a document each, or all of a file's in their order."""

    def read(opened: _Opened) -> Iterator[Row | Drop]:
        name = opened.name
        by_line = opened.options.get("split", "file") == "line"
        document: list[str] = []
        start = 0
        with opened.text() as (text, _):
            for sentence in parse(numbered_lines(text)):
                where = f"{name}:{sentence.line}"
                if sentence.problem:
                    yield Drop("malformed_row", where, sentence.problem)
                elif by_line:
                    yield Row(where, {"text": sentence.text})
                else:
                    if sentence.begins_document and document:
                        yield Row(f"{name}:{start}", {"text": "\n".join(document)})
                        document = []
                    start = start if document else sentence.line
                    document.append(sentence.text)
        if document:
            yield Row(f"{name}:{start}", {"text": "\n".join(document)})

    return read


_ENCODING: OptionTable = {
    "encoding": Option(
        TEXT, "how the text is encoded (cp949, utf-16-le); not given: it is found out, and said where it is not UTF-8"
    )
}
_PIECES: OptionTable = {
    "split": Option(
        TEXT,
        "what becomes a row: the file, a run of lines between empty ones, several of these together (about 6,000 characters), or a "
        "line",
        "file",
        ("file", "paragraph", "section", "line"),
    ),
    "prefix": Option(TEXT, "only lines that begin so are read, and without it"),
    "gutenberg": Option(SWITCH, "only what stands between the markers of Project Gutenberg is read", False),
}
_SENTENCES: OptionTable = {
    "split": Option(
        TEXT, "what becomes a row: all that a file (or document in it) says, or each cue or sentence", "file", ("file", "line")
    )
}
_ROWS: OptionTable = {"rows": Option(TEXT, "where the list of rows is inside the file's object: data.items")}
_TABLE: OptionTable = {
    "header": Option(SWITCH, "whether the first line names the columns; without one they are called 0, 1, 2", True),
    "delimiter": Option(TEXT, "the character between cells; not given: it is found out, and said where it is not the usual one"),
    "quote": Option(TEXT, "the character around cells, or none; not given: it is found out"),
    "unescape": Option(SWITCH, r"cells hold \n, \t and \\ for a line end, a tab and a backslash", False),
}
FORMATS: dict[str, Format] = {
    "text": Format(_read_text, SUFFIXES["text"], {**_ENCODING, **_PIECES}),
    "markdown": Format(_read_markdown, SUFFIXES["markdown"], _ENCODING),
    "jsonl": Format(_read_jsonl, SUFFIXES["jsonl"], _ENCODING),
    "json": Format(_read_json, SUFFIXES["json"], {**_ENCODING, **_ROWS}),
    "yaml": Format(_read_yaml, SUFFIXES["yaml"], {**_ENCODING, **_ROWS}),
    "parquet": Format(_read_parquet, SUFFIXES["parquet"]),
    "csv": Format(_read_table, SUFFIXES["csv"], {**_ENCODING, **_TABLE}),
    "tsv": Format(_read_table, SUFFIXES["tsv"], {**_ENCODING, **_TABLE}),
    "po": Format(_read_po, SUFFIXES["po"], _ENCODING),
    "srt": Format(_reader_of(cues), SUFFIXES["srt"], {**_ENCODING, **_SENTENCES}),
    "conllu": Format(_reader_of(sentences), SUFFIXES["conllu"], {**_ENCODING, **_SENTENCES}),
}
"""Formats by name."""
FILE_OPTIONS: OptionTable = {
    "suffixes": Option(LIST, "only files whose names end so are read ([.py, .md]), those of no known format as text")
}
"""Options of sources that are read from several files, whatever their format."""
