"""Rows from files: text, Markdown, JSON lines, JSON, YAML, Parquet, CSV, TSV and gettext catalogues, all also as `.gz`, `.xz` and
`.zst`.

In: a `DataFile` and the options of its format. Out: `Row`s, each with the place it came from, or a `Drop` where a row or file
cannot be read. Text is decoded as UTF-8 (with or without byte order mark), UTF-16 (with one) or CP949, whatever fits; bytes
that fit nothing become lone surrogates, which no adapter lets through. What a row means is the adapters' business.
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

import yaml

from keural.data.readers.po import PoError, parse_po
from keural.data.records import Drop
from keural.errors import UserError

Options = Mapping[str, Any]
OptionTypes = Mapping[str, tuple[type, ...]]
SNIFFED_BYTES = 1 << 20
GUTENBERG_START = re.compile(r"^\s*\*{3}\s*START OF TH(?:E|IS) PROJECT GUTENBERG.*$", re.MULTILINE)
GUTENBERG_END = re.compile(
    r"^\s*(?:\*{3}\s*END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*$", re.MULTILINE
)
GUTENBERG_CREDITS = re.compile(r"\A\s*Produced by .*?\n\s*\n", re.DOTALL)

PACKED = {".gz": "gzip", ".xz": "xz", ".zst": "Zstandard"}
"""Suffixes of packed files."""
_UNDECODED = re.compile("[\udc80-\udcff]")

csv.field_size_limit(1 << 30)


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
    options: OptionTypes = field(default_factory=dict)


def read_rows(file: DataFile, format_name: str, options: Options) -> Iterator[Row | Drop]:
    """The rows of one file. Raises `UserError` when it cannot be opened or unpacked."""
    try:
        yield from FORMATS[format_name].read(file, options)
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        what = f"{PACKED.get(file.path.suffix, 'packed')} file" if file.open is None else f"member {file.name}"
        raise UserError(f"{file.path}: damaged {what} ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error})") from error


def format_of(path: PurePath) -> str | None:
    """The format that a file's suffix stands for, `.gz`, `.xz` and `.zst` left aside."""
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return next((name for name, known in FORMATS.items() if suffix.lower() in known.suffixes), None)


@contextmanager
def open_text(file: DataFile) -> Iterator[IO[str]]:
    """A file as text, unpacked and decoded; line ends stay as they are, undecodable bytes become lone surrogates."""
    with _open_bytes(file) as opened:
        encoding = sniff_encoding(opened.read(SNIFFED_BYTES))
    with _open_bytes(file) as opened, io.TextIOWrapper(opened, encoding, "surrogateescape", newline="\n") as text:
        yield text


def _open_bytes(file: DataFile) -> IO[bytes]:
    if file.open is not None:
        return file.open()
    if file.path.suffix == ".gz":
        return gzip.open(file.path)  # type: ignore[return-value]
    if file.path.suffix == ".xz":
        return lzma.open(file.path)
    return _open_zstandard(file.path) if file.path.suffix == ".zst" else file.path.open("rb")


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading Zstandard files needs zstandard; install keural[data]") from error
    return io.BufferedReader(_Zstandard(path, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError))


class _Zstandard(io.RawIOBase):
    """A Zstandard file of one or several frames, unpacked while it is read; one cut off does not pass for a shorter one."""

    def __init__(self, path: Path, new_frame: Callable[[], Any], damage: type[Exception]) -> None:
        self._file = path.open("rb")
        self._new_frame, self._damage = new_frame, damage
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer. Raises `EOFError` where the file is damaged or ends in the middle of a frame."""
        while not self._ready and (self._packed or self._more()):
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._damage as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        if not self._ready and self._frame is not None:
            raise EOFError("it ends in the middle of a frame")
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def _more(self) -> bool:
        self._packed = self._file.read(1 << 16)
        return bool(self._packed)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def sniff_encoding(start: bytes) -> str:
    """The encoding of text that starts with these bytes: utf-8-sig, utf-16 or cp949."""
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
    with open_text(file) as text:
        return text.read().replace("\r\n", "\n")


def _read_text(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    split = options.get("split", "file")
    if split != "file" and not options.get("gutenberg"):  # such files can be larger than memory
        with open_text(file) as lines:
            yield from _pieces(file, lines, split, options.get("prefix", ""))
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
        yield from _pieces(file, text.splitlines(keepends=True), split, "")


def _pieces(file: DataFile, lines: Iterable[str], split: str, prefix: str) -> Iterator[Row]:
    """Lines that hold something, or runs of them between empty ones, each with the number of its (first) line."""
    piece: list[str] = []
    start = 0
    for number, raw in enumerate(lines, start=1):
        line = raw.removesuffix("\n").removesuffix("\r")
        if not line.startswith(prefix):
            continue
        line = line.removeprefix(prefix)
        if piece and (split == "line" or not line.strip()):
            yield Row(f"{file.name}:{start}", {"text": "\n".join(piece)})
            piece = []
        if line.strip():
            start = start if piece else number
            piece.append(line)
    if piece:
        yield Row(f"{file.name}:{start}", {"text": "\n".join(piece)})


def _read_markdown(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    yield Row(file.name, {"text": _whole_text(file)})


def _read_jsonl(file: DataFile, options: Options) -> Iterator[Row | Drop]:
    with open_text(file) as text:
        for number, line in enumerate(text, start=1):
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
        value = yaml.load(_whole_text(file), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        yield Drop("malformed_file", f"{file.name}:{mark.line + 1}" if mark else file.name)
        return
    yield from _items(file, value, options)


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
    try:
        with ParquetFile(file.path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{file.name}#{number}", value)
    except ArrowException as error:
        raise UserError(f"{file.path}: not a readable Parquet file ({error}); fetch it again") from error


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
        for number, line in enumerate(text, start=1):
            yield number, line.rstrip("\r\n").split(delimiter)
        return
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield reader.line_num, None
        else:
            yield reader.line_num, cells


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


_TABLE_OPTIONS: OptionTypes = {"header": (bool,), "quotes": (bool,), "unescape": (bool,)}
FORMATS: dict[str, Format] = {
    "text": Format(_read_text, (".txt", ".text"), {"split": (str,), "prefix": (str,), "gutenberg": (bool,)}),
    "markdown": Format(_read_markdown, (".md", ".mdx", ".markdown")),
    "jsonl": Format(_read_jsonl, (".jsonl", ".ndjson")),
    "json": Format(_read_json, (".json",), {"rows": (str,)}),
    "yaml": Format(_read_yaml, (".yml", ".yaml"), {"rows": (str,)}),
    "parquet": Format(_read_parquet, (".parquet",)),
    "csv": Format(_read_csv, (".csv",), _TABLE_OPTIONS),
    "tsv": Format(_read_tsv, (".tsv",), _TABLE_OPTIONS),
    "po": Format(_read_po, (".po",)),
}
"""Formats by name. Options: `split` (file, paragraph, line), `prefix` (keep only lines that start so, without it), `gutenberg`
(only what stands between the Project Gutenberg markers); `rows` (where the list is); `header` (false: columns are called 0, 1,
..), `quotes`
(whether quotation marks enclose cells), `unescape` (cells hold `\\n` for a line end)."""
