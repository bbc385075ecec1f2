"""What a file is: packing, format, encoding and what divides its cells, each with the evidence for it.

In: a file, or the first bytes of one. Out: its `FileShape`. Names are believed as far as the bytes agree: JSON lines in a `.json`
file are JSON lines, an archive called `.txt` is an archive, and what is neither text nor known is said to be so.
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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import IO, Any

from keural.data.readers.datafile import DataFile, FileShape, Joined, open_bytes
from keural.data.readers.dialects import DELIMITERS, DIALECTS, sniff_dialect
from keural.data.readers.encodings import guess_encoding
from keural.data.readers.magic import TAR, ZIP, content_of, content_of_zip
from keural.data.readers.unpacking import PACKED, packing_of
from keural.errors import UserError

SNIFFED_BYTES = 1 << 18
"""So much of a file's beginning is looked at."""
_SAMPLES, _SAMPLE_BYTES = 3, 1 << 14
"""Further in, so many pieces of this size are looked at where the beginning is ASCII."""
_CUT = 4096
"""An error so near the end of a beginning may be of the cut: in a long text or number."""
Options = Mapping[str, Any]
SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": (".txt", ".text"),
    "markdown": (".md", ".mdx", ".markdown"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "yaml": (".yml", ".yaml"),
    "parquet": (".parquet",),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "po": (".po",),
    "srt": (".srt", ".vtt"),
    "conllu": (".conllu",),
    ZIP: (".zip",),
    TAR: (".tar",),
}
"""Formats, and the suffixes that stand for them."""
_DATA = ("jsonl", "json", "yaml", "csv", "tsv", "po")
_MARKS = (
    ("po", re.compile(r"(?:\s*#.*\n)*\s*msgid \""), "it begins with a message of a catalogue"),
    ("srt", re.compile(r"(?:WEBVTT\b|\s*1\r?\n\d+:\d\d:\d\d,\d+ --> )"), "it begins with a cue of subtitles"),
    ("conllu", re.compile(r"(?:#.*\n)*1\t(?:[^\t\n]*\t){8}"), "it begins with an annotated sentence"),
)
"""How text begins that shows its format."""
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)
"""What reading a damaged packed file raises."""


def describe(path: Path) -> FileShape:
    """What a file on disk is. Raises `UserError` where it cannot be opened or is damaged."""
    return sniff(DataFile(path, path.name))


def sniff(file: DataFile, declared: str | None = None, options: Options | None = None) -> FileShape:
    """What a file is; `declared` is the format that a recipe gives, `options` may hold `encoding`, `delimiter` and `quote`.

    Raises `UserError` where it cannot be opened or is damaged.
    """
    opened = None
    try:
        opened, packing = open_bytes(file)
        with opened:
            start = read_start(opened)
            shape = sniff_start(start, file, packing, declared, options)
            if shape.format == ZIP and packing is None and file.open is None and len(file.paths) == 1:
                content = content_of_zip(opened)
                if content is not None:
                    return replace(shape, format=None, problem=f"is {content.name}; {content.remedy}")
        return shape
    except DAMAGE as error:
        raise damaged(file, error) from error
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error})") from error


def sniff_member(file: DataFile, options: Options) -> DataFile:
    """A member of an archive with its shape; it can be opened once. Raises `UserError` where it is damaged."""
    try:
        opened, packing = open_bytes(file)
        start = read_start(opened)
    except DAMAGE as error:
        raise damaged(file, error) from error
    shape = sniff_start(start, file, packing, None, options)
    joined: Any = io.BufferedReader(Joined(start, opened))
    return file._replace(open=lambda: joined, shape=shape)


def damaged(file: DataFile, error: Exception | str) -> UserError:
    """The refusal of a packed file, or a member of an archive, that is damaged."""
    what = f"{PACKED.get(file.path.suffix.lower(), 'packed')} file" if file.open is None else f"member {file.name}"
    return UserError(f"{file.path}: damaged {what} ({error}); fetch it again")


def read_start(opened: IO[bytes]) -> bytes:
    """The first `SNIFFED_BYTES` of a file, or all of a shorter one."""
    pieces, left = [], SNIFFED_BYTES
    while left and (piece := opened.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def format_of(path: PurePath) -> str | None:
    """The format that a file's suffix stands for, those of packing left aside; None for one that is not known."""
    name = path.name.lower()
    for packed, inside in ((".tgz", ".tar"), (".tbz2", ".tar"), (".txz", ".tar"), *((suffix, "") for suffix in PACKED)):
        if name.endswith(packed):
            name = name.removesuffix(packed) + inside
            break
    suffix = PurePath(name).suffix
    return next((format_name for format_name, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def sniff_start(
    start: bytes, file: DataFile, packing: str | None, declared: str | None, options: Options | None = None
) -> FileShape:
    """What a file is that begins with these bytes, unpacked."""
    options = options or {}
    named = format_of(PurePath(file.name if file.open else file.path))
    shape = _known_content(start, declared, named, packing)
    if shape is None:
        shape = _text_shape(start, file, declared or named, options)
        if declared is None and named is None:
            shape = replace(shape, evidence=("its suffix is of no known format", *shape.evidence))
        if declared is not None and shape.problem is None and shape.format != declared:
            shape = replace(shape, problem=f"{shape.evidence[0]}, not {declared}; leave format out, or give format: {shape.format}")
    named_packing = PACKED.get(PurePath(file.name).suffix.lower())
    if named_packing and packing != named_packing and len(file.paths) == 1:
        found = f"is packed with {packing}" if packing else "is not packed"
        if shape.problem and packing is None:
            raise damaged(file, f"it does not begin as one, and {shape.problem}")
        shape = replace(shape, assumed=(f"{found}, unlike its name says", *shape.assumed))
    packed = (f"it is packed with {packing}",) if packing else ()
    return replace(shape, packing=packing, evidence=packed + shape.evidence)


def _known_content(start: bytes, declared: str | None, named: str | None, packing: str | None) -> FileShape | None:
    """The shape of what is no text; None for text."""
    content = content_of(start)
    expected = declared or named
    if content is None:
        if expected in ("parquet", TAR) and start:
            return FileShape(None, problem=f"is not {_article(expected)}; fetch it again, or mend its name or format")
        return FileShape(expected) if expected == ZIP else None
    evidence = (f"it begins as {content.name}",)
    if content.format is None:
        return FileShape(None, evidence=evidence, problem=f"is {content.name}; {content.remedy}")
    if declared not in (None, content.format):
        inside = (
            "its files are then read by their own suffixes (others: option suffixes)"
            if content.format in (ZIP, TAR)
            else f"it is {content.format}"
        )
        return FileShape(
            content.format, evidence=evidence, problem=f"is {content.name}, not {declared}; leave format out: {inside}"
        )
    assumed = () if content.format == named else (f"is {content.name}, unlike its name says",)
    return FileShape(content.format, evidence=evidence, assumed=assumed)


def _article(format_name: str) -> str:
    return {"parquet": "a Parquet file", TAR: "a tar archive"}[format_name]


def _text_shape(start: bytes, file: DataFile, expected: str | None, options: Options) -> FileShape:
    """The shape of text: its encoding, its format if that is not known, and how a table is written."""
    complete = len(start) < SNIFFED_BYTES
    encoding, evidence = options.get("encoding"), "the recipe says how it is encoded"
    assumed: tuple[str, ...] = ()
    guess = guess_encoding(start + _further(file, start, complete), complete)
    if encoding is not None:
        if guess.encoding and _read_otherwise(start, encoding, guess.encoding):
            assumed = (f"read as {encoding}, as the recipe says, though it looks like {guess.encoding} ({guess.evidence})",)
    else:
        encoding, evidence = guess
        if encoding is None:
            problem = (
                f"it is not clear how it is encoded: {evidence}; give options: {{encoding: NAME}}, or leave out what is no text"
            )
            return FileShape(expected, None, None, evidence=(evidence,), problem=problem)
        if not encoding.startswith("utf-8"):
            assumed = (f"read as {encoding} ({evidence})",)
    try:
        text = codecs.getincrementaldecoder(codec_of(encoding, start))("replace").decode(start, complete)
    except UnicodeError as error:  # UTF-16 and UTF-32 that have to say their byte order, and do not
        problem = f"is not {encoding} ({error}); leave the option encoding out, or give the byte order: {encoding}-le"
        return FileShape(expected, None, None, evidence=(problem,), problem=problem)
    shape = FileShape(expected, None, encoding, evidence=(f"encoding {encoding}: {evidence}",), assumed=assumed)
    if "\r" in text and "\n" not in text:
        shape = replace(shape, newline="\r")
        text = text.replace("\r", "\n")
    return _text_format(shape, text.removeprefix("\ufeff"), complete, options)


def _read_otherwise(start: bytes, one: str, other: str) -> bool:
    """Whether two encodings make different texts of a beginning."""
    try:
        first, second = (codecs.getincrementaldecoder(codec_of(name, start))("replace").decode(start) for name in (one, other))
    except UnicodeError:  # it cannot be read in one of them
        return True
    return first[: len(second)] != second[: len(first)]


def codec_of(encoding: str, start: bytes) -> str:
    """The codec that reads text in an encoding and passes over a byte order mark, if it begins with one."""
    name = codecs.lookup(encoding).name
    if name == "utf-8":
        return "utf-8-sig"
    marks = {
        "utf-16-le": codecs.BOM_UTF16_LE,
        "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE,
        "utf-32-be": codecs.BOM_UTF32_BE,
    }
    return name[:6] if name in marks and start.startswith(marks[name]) else name


def _further(file: DataFile, start: bytes, complete: bool) -> bytes:
    """Lines from further in a large file that begins with ASCII only, where they cost nothing to reach."""
    if complete or not start.isascii() or b"\0" in start or file.open is not None or len(file.paths) > 1:
        return b""
    with file.path.open("rb") as opened:
        if packing_of(opened.read(16)):
            return b""
        size = opened.seek(0, io.SEEK_END)
        lines = []
        for number in range(1, _SAMPLES + 1):
            opened.seek(len(start) + (size - len(start)) * number // (_SAMPLES + 1))
            lines += opened.read(_SAMPLE_BYTES).split(b"\n")[1:-1]
    return b"".join(line + b"\n" for line in lines if not line.isascii())


def _text_format(shape: FileShape, text: str, complete: bool, options: Options) -> FileShape:
    """The shape with the format that the text is of, and the dialect of a table."""
    found, why = _format_in(text, complete)
    expected, shape = shape.format, replace(shape, shows=found)
    if expected in _DATA and re.match(r"\s*<(?:!doctype\s+html|html)\b", text, re.IGNORECASE):
        return replace(
            shape, format=None, problem=f"is an HTML page, not {expected}: perhaps an error in place of the file; fetch it again"
        )
    if expected is None:
        shape = replace(shape, format=found or "text", evidence=(why or "it is text", *shape.evidence))
    elif expected in ("json", "jsonl") and found in ("csv", "tsv") and not _begins_as_json(text):
        return replace(shape, problem=f"is no JSON: {why}; give format: {found}")
    elif expected in ("json", "jsonl", "csv", "tsv") and found in ("json", "jsonl") and expected != found:
        shape = replace(shape, format=found, evidence=(why, *shape.evidence), assumed=(*shape.assumed, f"read as {found}: {why}"))
    elif expected == "text" and found == "jsonl":
        shape = replace(shape, evidence=(*shape.evidence, why), assumed=(*shape.assumed, f"read as text, though {why}"))
    if shape.format not in DIALECTS:
        return shape
    given = options.get("delimiter")
    if given is not None and text.strip() and given not in text:
        return replace(shape, problem=f"option delimiter has no effect: its lines do not hold {given!r}")
    dialect = sniff_dialect(text, complete, shape.format, given, options.get("quote"))
    more = (dialect.evidence,) if dialect.evidence else ()
    return replace(
        shape,
        delimiter=dialect.delimiter,
        quote=dialect.quote,
        has_sep_line=dialect.sep_line,
        evidence=(*shape.evidence, *more),
        assumed=(*shape.assumed, *(f"read as {shape.format} in which {clause}" for clause in more)),
    )


def _format_in(text: str, complete: bool) -> tuple[str | None, str]:
    """The format that text shows by itself, and why; None for prose, and for what any format could hold."""
    if (kind := _json_kind(text, complete)) is not None:
        return kind, "each of its lines is a JSON value" if kind == "jsonl" else "it is one JSON value over all its lines"
    for name, pattern, why in _MARKS:
        if pattern.match(text):
            return name, why
    lines = text.split("\n", 20)[: 20 if not complete else None]
    for delimiter, name in (("\t", "tsv"), (",", "csv"), (";", "csv")):
        dialect = sniff_dialect(text, complete, name, delimiter=delimiter)
        if len(lines) > 2 and _divides(lines, dialect.delimiter):
            return name, f"{DELIMITERS[delimiter]} divide every line into as many cells"
    return None, ""


def _begins_as_json(text: str) -> bool:
    """Whether text begins as JSON does, if perhaps as broken JSON: its commas are those between the fields of objects."""
    first = text.lstrip().partition("\n")[0].strip().rstrip(",")
    if first.startswith(("{", "[")):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _divides(lines: Sequence[str], delimiter: str) -> bool:
    """Whether a delimiter divides lines into at least two cells, all alike, and the first looks like a header."""
    try:
        records = [record for record in csv.reader(lines[:-1], delimiter=delimiter) if record]
    except csv.Error:
        return False
    widths = {len(record) for record in records}
    short = bool(records) and all(0 < len(cell) <= 40 for cell in records[0])
    return len(records) > 1 and len(widths) == 1 and widths.pop() > 1 and (delimiter == "\t" or short)


def _json_kind(text: str, complete: bool) -> str | None:
    """`jsonl` where lines are JSON values, `json` where one value spans them; None where it is not clear, or no JSON."""
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return None
    first, _, rest = text.partition("\n")
    rest = rest.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        cut = not complete and error.pos >= len(text) - _CUT
        return "json" if cut and (rest or text.startswith("[")) else None
    except (ValueError, RecursionError):
        return None
    if end > len(first):
        return "json" if not text[end:].strip() else None
    if first[end:].strip():
        return None
    if rest:
        return "jsonl" if rest[0] in "{[" else None
    is_array = isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" not in item for item in value)
    return "json" if is_array else None
