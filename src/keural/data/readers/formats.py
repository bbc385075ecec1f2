"""Rows from files: text, Markdown, JSON lines, JSON, YAML, Parquet, CSV, TSV and gettext catalogues, all also as `.gz`, `.xz` and
`.zst`.

In: a `DataFile` and the options of its format. Out: `Row`s, each with the place it came from, or a `Drop` where a row or file
cannot be read. Text is decoded as UTF-8 (with or without byte order mark), UTF-16 or UTF-32 (with one) or CP949, whatever fits;
bytes that fit nothing become lone surrogates, which no adapter lets through. What a row means is the adapters' business.

A file may come from anybody: a packed one that unpacks to far more than it should is refused, a row that is too long is a drop and
is never held in memory, and what a parser cannot take (nesting, dates, numbers of a thousand digits) costs its row, or the file
where the file is one value.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple
from zoneinfo import ZoneInfo

from keural.data.readers.options import SWITCH, TEXT, Option, OptionTable
from keural.data.readers.po import PoError, parse_po
from keural.data.readers.unpacking import PACKED, check_ratio, unpack
from keural.data.records import Drop
from keural.errors import UserError, quoted
from keural.parsing import Malformed, holds_unreadable, parse_yaml_rows

Options = Mapping[str, Any]
SNIFFED_BYTES = 1 << 20
GUTENBERG_START = re.compile(r"^\s*\*{3}\s*START OF TH(?:E|IS) PROJECT GUTENBERG.*$", re.MULTILINE)
GUTENBERG_END = re.compile(
    r"^\s*(?:\*{3}\s*END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*$", re.MULTILINE
)
GUTENBERG_CREDITS = re.compile(r"\A\s*Produced by .*?\n\s*\n", re.DOTALL)

MAX_ROW_CHARACTERS = 1 << 26
"""Longest row, cell or paragraph; a longer one is dropped."""
MAX_WHOLE_BYTES = 8 << 30
"""Largest file, unpacked, of a format that is read as one value: JSON, YAML, catalogues, Markdown, text as one document."""
TOO_LONG = "row_too_long"
_UNDECODED = re.compile("[\udc80-\udcff]")

csv.field_size_limit(MAX_ROW_CHARACTERS)


def _as_surrogates(error: UnicodeError) -> tuple[str, int]:
    """Undecodable bytes as lone surrogates, in every encoding; Python's own handler knows bytes from 0x80 only."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("keural.surrogates", _as_surrogates)


class DataFile(NamedTuple):
    """A file of a source, or a member of an archive, and its name in messages and tables (relative to the data directory)."""

    path: Path
    name: str
    parts: tuple[Path, ...] = ()
    """The files an archive is spread over, where it is."""
    open: Callable[[], IO[bytes]] | None = None
    """Opens a member of an archive."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files on disk."""
        return self.parts or (self.path,)


class Row(NamedTuple):
    """One row: its value as read, and where it is (`file:line`, `file#number` in an array, or the file)."""

    where: str
    value: Any


Reader = Callable[[DataFile, Options], Iterator[Row | Drop]]


@dataclass(frozen=True)
class Format:
    """How files of some suffixes are read, and which options change that."""

    read: Reader
    suffixes: tuple[str, ...]
    options: OptionTable = field(default_factory=dict)


def read_rows(file: DataFile, format_name: str, options: Options) -> Iterator[Row | Drop]:
    """The rows of one file. Raises `UserError` when it cannot be opened or unpacked."""
    try:
        yield from FORMATS[format_name].read(file, options)
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        what = f"{PACKED.get(file.path.suffix, 'packed')} file" if file.open is None else f"member {file.name}"
        raise UserError(f"{file.path}: damaged {what} ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise UserError(f"{file.name}: too large for the memory there is; divide the file, or give it as JSON lines") from error


def format_of(path: PurePath) -> str | None:
    """The format that a file's suffix stands for, `.gz`, `.xz` and `.zst` left aside."""
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return next((name for name, known in FORMATS.items() if suffix.lower() in known.suffixes), None)


@contextmanager
def open_text(file: DataFile) -> Iterator[IO[str]]:
    """A file as text, unpacked and decoded; line ends stay as they are, undecodable bytes become lone surrogates."""
    with _open_bytes(file) as opened:
        encoding = sniff_encoding(opened.read(SNIFFED_BYTES))
    with _open_bytes(file) as opened, io.TextIOWrapper(opened, encoding, "keural.surrogates", newline="\n") as text:
        yield text


def _open_bytes(file: DataFile) -> IO[bytes]:
    opened = file.path.open("rb") if file.open is None else file.open()
    return unpack(opened, PurePath(file.name if file.open else file.path).suffix, file.name)


def sniff_encoding(start: bytes) -> str:
    """The encoding of text that starts with these bytes: utf-8-sig, utf-16, utf-32 or cp949."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    decoded = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(start)
    undecodable = len(_UNDECODED.findall(decoded)) if not decoded.isascii() else 0
    beyond_ascii = sum(byte >= 0x80 for byte in start) if undecodable else 0
    if 10 * undecodable <= beyond_ascii:  # a few bad bytes are damage, not another encoding
        return "utf-8-sig"
    try:
        codecs.getincrementaldecoder("cp949")().decode(start)
    except UnicodeDecodeError:
        return "utf-8-sig"
    return "cp949"


def _whole_text(file: DataFile) -> str:
    """All of a file that is one value. Raises `UserError` where it is too large for that."""
    if file.open is None and file.path.suffix not in PACKED and file.path.stat().st_size > MAX_WHOLE_BYTES:
        raise _too_large(file)
    pieces, left = [], MAX_WHOLE_BYTES
    with open_text(file) as text:
        while piece := text.read(1 << 24):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise _too_large(file)
    return "".join(pieces).replace("\r\n", "\n")


def _too_large(file: DataFile) -> UserError:
    return UserError(f"{file.name}: over {MAX_WHOLE_BYTES:,} bytes, which are read as one value; divide it, or use JSON lines")


def _lines(text: IO[str]) -> Iterator[tuple[int, str | None]]:
    """The lines of a text with their numbers; None for one that is too long, which is passed over without being held."""
    number = 0
    while line := text.readline(MAX_ROW_CHARACTERS + 1):
        number += 1
        if len(line) <= MAX_ROW_CHARACTERS:
            yield number, line
            continue
        while line and not line.endswith("\n"):
            line = text.readline(MAX_ROW_CHARACTERS)
        yield number, None


def _read_text(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    split = options.get("split", "file")
    if split != "file" and not options.get("gutenberg"):  # such files can be larger than memory
        with open_text(file) as lines:
            yield from _pieces(file, _lines(lines), split, options.get("prefix", ""))
        return
    text = _whole_text(file)
    if options.get("gutenberg"):
        start, end = GUTENBERG_START.search(text), GUTENBERG_END.search(text)
        if not start or not end or start.end() > end.start():
            yield Drop("no_gutenberg_markers", file.name)
            return
        text = GUTENBERG_CREDITS.sub("", text[start.end() : end.start()]).strip("\n") + "\n"
    if prefix := options.get("prefix"):
        text = "".join(line.removeprefix(prefix) + "\n" for line in text.split("\n") if line.startswith(prefix))
    if split == "file":
        yield Row(file.name, {"text": text})
    else:
        yield from _pieces(file, enumerate(text.splitlines(keepends=True), start=1), split, "")


def _pieces(file: DataFile, lines: Iterable[tuple[int, str | None]], split: str, prefix: str) -> Iterator[Row | Drop]:
    """Lines that hold something, or runs of them between empty ones, each with the number of its (first) line."""
    piece: list[str] = []
    start = size = 0

    def finished() -> Row | Drop:
        where = f"{file.name}:{start}"
        return Drop(TOO_LONG, where) if size > MAX_ROW_CHARACTERS else Row(where, {"text": "\n".join(piece)})

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
        size += MAX_ROW_CHARACTERS + 1 if line is None else len(line) + 1
        if line is None or size > MAX_ROW_CHARACTERS:
            piece = []
        else:
            piece.append(line)
    if start:
        yield finished()


def _read_markdown(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    yield Row(file.name, {"text": _whole_text(file)})


def _read_jsonl(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    with open_text(file) as text:
        for number, line in _lines(text):
            if line is None:
                yield Drop(TOO_LONG, f"{file.name}:{number}")
                continue
            if not line.strip():
                continue
            try:
                yield Row(f"{file.name}:{number}", json.loads(line))
            except (ValueError, RecursionError):  # ValueError: not JSON, or a number with too many digits
                yield Drop("malformed_row", f"{file.name}:{number}")


def _read_json(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    try:
        value = json.loads(_whole_text(file))
    except json.JSONDecodeError as error:
        yield Drop("malformed_file", f"{file.name}:{error.lineno}")
        return
    except (ValueError, RecursionError):  # a number with too many digits, brackets without end
        yield Drop("malformed_file", file.name)
        return
    yield from _items(file, value, options)


def _read_yaml(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    try:
        value, partly = parse_yaml_rows(_whole_text(file))
    except Malformed as error:
        yield Drop("malformed_file", f"{file.name}:{error.line}" if error.line else file.name)
        return
    for item in _items(file, value, options):
        bad = partly and isinstance(item, Row) and holds_unreadable(item.value)
        yield Drop("malformed_row", item.where) if bad else item


def _items(file: DataFile, value: Any, options: Options) -> Iterator[Row | Drop]:
    """A list's items are rows; option `rows` names the list inside an object; an object without it is one row."""
    for key in options["rows"].split(".") if "rows" in options else ():
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or (not isinstance(value, list) and "rows" in options):
        yield Drop("malformed_file", file.name)
    elif isinstance(value, list):
        yield from (Row(f"{file.name}#{number}", item) for number, item in enumerate(value, start=1))
    else:
        yield Row(file.name, value)


def _read_parquet(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{file.path}: reading Parquet needs pyarrow; install keural[data]") from error
    if file.open is not None or file.path.suffix in PACKED:
        raise UserError(f"{file.name}: Parquet is not read inside other packing; unpack it")
    try:
        with ParquetFile(file.path) as table:
            _check_parquet(file, table)
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for value in _parquet_rows(batch):
                    number += 1
                    where = f"{file.name}#{number}"
                    yield Drop("malformed_row", where) if value is None else Row(where, value)
    except MemoryError:
        raise
    except (ArrowException, *_BAD_CELL) as error:
        raise UserError(f"{file.path}: not a readable Parquet file ({error}); fetch it again") from error


_BAD_CELL = (ValueError, OverflowError, LookupError, TypeError)
"""What pyarrow and Python's dates raise of a cell: bytes that are no UTF-8, a day outside the calendar."""


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
    """Refuse a file whose columns are packed far too well, and one with a time zone that nobody knows."""
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


def _read_table(file: DataFile, options: Options, delimiter: str, quotes: bool) -> Iterator[Row | Drop]:
    header: list[str] | None = None
    with open_text(file) as text:
        for number, cells in _cells(text, delimiter, options.get("quotes", quotes)):
            if cells is None or (header is not None and len(cells) != len(header)):
                yield Drop("malformed_row", f"{file.name}:{number}")
                continue
            if not any(cells):
                continue
            if header is None and options.get("header", True):
                header = [cell.strip() for cell in cells]
                continue
            header = header or [str(column) for column in range(len(cells))]
            values = [_unescape(cell) for cell in cells] if options.get("unescape") else cells
            yield Row(f"{file.name}:{number}", dict(zip(header, values, strict=True)))


def _cells(text: IO[str], delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str] | None]]:
    """Line number and cells of every record; None where quotation is broken."""
    if not quotes:
        for number, line in _lines(text):
            yield number, None if line is None else line.rstrip("\r\n").split(delimiter)
        return
    lines = _CsvLines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield lines.number, None
        else:
            yield lines.number, cells


class _CsvLines:
    """The lines of a text for csv's reader, which begins a new record after an error. `number` is that of the latest."""

    def __init__(self, text: IO[str]) -> None:
        self._lines = _lines(text)
        self.number = 0

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        """The next line. Raises `csv.Error` for one that is too long."""
        self.number, line = next(self._lines)
        if line is None:
            raise csv.Error("a line is too long")
        return line


def _unescape(text: str) -> str:
    """Line ends, tabs and backslashes that are written out as `\\n`, `\\t` and `\\\\`."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def _read_csv(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    yield from _read_table(file, options, ",", quotes=True)


def _read_tsv(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    yield from _read_table(file, options, "\t", quotes=False)


def _read_po(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    try:
        yield Row(file.name, {"messages": parse_po(_whole_text(file))})
    except PoError as error:
        yield Drop("malformed_file", f"{file.name}:{error.line}")


def _quotes(default: bool) -> Option:
    return Option(SWITCH, "whether quotation marks enclose cells", default)


_TEXT_OPTIONS: OptionTable = {
    "split": Option(
        TEXT, "what becomes a row: the file, a run of lines between empty ones, or a line", "file", ("file", "paragraph", "line")
    ),
    "prefix": Option(TEXT, "only lines that begin so are read, and without it"),
    "gutenberg": Option(SWITCH, "only what stands between the markers of Project Gutenberg is read", False),
}
_ROWS: OptionTable = {"rows": Option(TEXT, "where the list of rows is inside the file's object: data.items")}
_TABLE_OPTIONS: OptionTable = {
    "header": Option(SWITCH, "whether the first line names the columns; without one they are called 0, 1, 2", True),
    "unescape": Option(SWITCH, r"cells hold \n, \t and \\ for a line end, a tab and a backslash", False),
}

FORMATS: dict[str, Format] = {
    "text": Format(_read_text, (".txt", ".text"), _TEXT_OPTIONS),
    "markdown": Format(_read_markdown, (".md", ".mdx", ".markdown")),
    "jsonl": Format(_read_jsonl, (".jsonl", ".ndjson")),
    "json": Format(_read_json, (".json",), _ROWS),
    "yaml": Format(_read_yaml, (".yml", ".yaml"), _ROWS),
    "parquet": Format(_read_parquet, (".parquet",)),
    "csv": Format(_read_csv, (".csv",), {**_TABLE_OPTIONS, "quotes": _quotes(True)}),
    "tsv": Format(_read_tsv, (".tsv",), {**_TABLE_OPTIONS, "quotes": _quotes(False)}),
    "po": Format(_read_po, (".po",)),
}
"""Formats by name."""
