"""Rows of CSV and TSV: cells, a header, and what becomes of lines that do not fit.

In: the text of a table and its dialect. Out: a dict per row, or a counted drop. A quotation mark that never closes would swallow
the rest of the file; its lines are looked at again, and each of them is a row or a drop. Names that stand twice in a header are
refused, since a row could keep only one of their cells.
"""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from keural.data.readers.datafile import FileShape, Row
from keural.data.readers.dialects import NO_QUOTE
from keural.data.readers.lines import MAX_ROW_CHARACTERS, numbered_lines
from keural.data.records import Drop
from keural.errors import UserError, quoted

RAGGED, UNCLOSED = "ragged_row", "unclosed_quote"
"""Reasons of lines with more or fewer cells than the header, and of those that a quotation mark without end holds."""
REPEATED_HEADER = "repeated_header"
"""Reason of a line that is the header once more, as where tables were put together."""
COLUMNS = "columns"
"""Key among a reader's options: numbers of columns that a recipe names; no option of a recipe."""
_MIN_LINES = 10
"""So many lines that look like rows inside one cell are rows: the mark before them was not meant to enclose a cell."""
_MAX_HELD = 1 << 22
"""Characters of one record that are kept to be looked at again."""
_Record = tuple[int, list[str] | Drop]
"""The line in which a record ends and its cells, or why it has none; a drop's place is only the line."""

csv.field_size_limit(MAX_ROW_CHARACTERS)


def read_table(name: str, text: IO[str], shape: FileShape, options: Mapping[str, Any]) -> Iterator[Row | Drop]:
    """The rows of a table, a dict each by its header, or by column numbers without one (`header: false`).

    Raises `UserError` for a header that names two columns alike.
    """
    header: list[str] | None = None
    names: list[str] = []
    with_header = options.get("header", True)
    unescape = options.get("unescape", False)
    for number, cells in _records(text, shape):
        if isinstance(cells, Drop):
            yield Drop(cells.reason, f"{name}:{cells.where}", cells.detail)
            continue
        if not any(cells):
            continue
        if header is None:
            header = _header(name, number, cells, options.get(COLUMNS, ())) if with_header else list(map(str, range(len(cells))))
            if with_header:
                names = cells
                continue
        if names and cells[0].endswith(names[0]) and [cells[0].removeprefix("\ufeff"), *cells[1:]] == names:
            yield Drop(REPEATED_HEADER, f"{name}:{number}")
            continue
        if len(cells) != len(header):
            if len(cells) < len(header) or any(cells[len(header) :]):
                yield Drop(RAGGED, f"{name}:{number}", f"{len(cells)} cells, not {len(header)}")
                continue
            cells = cells[: len(header)]
        values = [_unescape(cell) for cell in cells] if unescape else cells
        yield Row(f"{name}:{number}", dict(zip(header, values, strict=True)))


def _header(name: str, number: int, cells: Sequence[str], columns: Sequence[int]) -> list[str]:
    """Names of columns: those of the header, but for columns that a recipe names by number, unless a name is such a number."""
    names = [unicodedata.normalize("NFC", cell.strip()) for cell in cells]
    numbered = {column: str(column) for column in columns if str(column) not in names}
    header = [numbered.get(column, title) for column, title in enumerate(names)]
    counts = Counter(header)
    if twice := [title for title in names if title and counts[title] > 1]:
        places = ", ".join(str(column) for column, title in enumerate(header) if title == twice[0])
        raise UserError(
            f"{name}:{number}: columns {places} are all called {quoted(twice[0])}, and a row would keep only one; "
            "rename them, or name each by its number in the adapter's options"
        )
    return [title or str(column) for column, title in enumerate(header)] if counts[""] > 1 else header


def _records(text: IO[str], shape: FileShape) -> Iterator[_Record]:
    """Line number and cells of every record."""
    delimiter, quote = shape.delimiter or ",", shape.quote or NO_QUOTE
    lines = numbered_lines(text)
    if shape.has_sep_line:
        next(lines, None)
    if quote != NO_QUOTE:
        yield from _quoted_records(_Lines(lines), delimiter, quote)
        return
    for number, line in lines:
        yield number, _too_long(number) if line is None else line.rstrip("\r\n").split(delimiter)


def _too_long(number: int) -> Drop:
    return Drop("row_too_long", str(number))


class _Lines:
    """The lines of a text for csv's reader, which begins a new record after an error; those of the present record are held."""

    def __init__(self, lines: Iterator[tuple[int, str | None]]) -> None:
        self._lines = lines
        self._again: list[tuple[int, str]] = []
        self.number = 0
        """Of the latest line."""
        self.held: list[tuple[int, str]] = []
        """Lines of the present record with their numbers; emptied where they are too much to be kept."""
        self.first = 0
        self.count = self._size = 0

    def __iter__(self) -> "_Lines":
        return self

    def begin(self) -> None:
        """The next line begins a record."""
        self.held.clear()
        self.count = self._size = 0

    def look_again_at(self, lines: list[tuple[int, str]]) -> None:
        """Give these lines before those that follow."""
        self._again += reversed(lines)

    def __next__(self) -> str:
        """The next line. Raises `csv.Error` for one that is too long."""
        self.number, line = self._again.pop() if self._again else next(self._lines)
        self.count += 1
        if self.count == 1:
            self.first = self.number
        if line is None:
            raise csv.Error("a line is too long")
        self._size += len(line)
        if self._size <= _MAX_HELD:
            self.held.append((self.number, line))
        elif self.held:
            self.held.clear()
        return line


def _quoted_records(lines: _Lines, delimiter: str, quote: str) -> Iterator[_Record]:
    reader = csv.reader(lines, delimiter=delimiter, quotechar=quote, strict=True)
    width = 0

    def look_like_rows(inside: Sequence[tuple[int, str]]) -> bool:
        alone = csv.reader((line for _, line in inside), delimiter=delimiter, quotechar=quote, strict=True)
        try:
            return len(inside) >= _MIN_LINES and width > 1 and all(len(record) == width for record in alone)
        except csv.Error:
            return False

    while True:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.count == 1:
                reason = "row_too_long" if "too long" in str(error) or "larger than" in str(error) else "malformed_row"
                yield lines.number, Drop(reason, str(lines.number), str(error) if reason == "malformed_row" else "")
            elif lines.held and look_like_rows(lines.held[1:-1]):
                yield lines.first, Drop(UNCLOSED, str(lines.first))
                lines.look_again_at(lines.held[1:])
            else:
                yield from _swallowed(lines)
        else:
            if lines.count > _MIN_LINES and lines.held and look_like_rows(lines.held[1:-1]):
                yield from _swallowed(lines)
                continue
            width = width or len(cells)
            if lines.count > 1:
                cells = [cell.replace("\r\n", "\n") for cell in cells]
            yield lines.number, cells


def _swallowed(lines: _Lines) -> Iterator[_Record]:
    """A drop for every line that a quotation mark holds."""
    first, last = lines.first, lines.number
    for number in range(first, last + 1):
        yield number, Drop(UNCLOSED, str(number), f"line {first:,} opens a cell that goes on to line {last:,}")


def _unescape(text: str) -> str:
    """Line ends, tabs and backslashes that are written out as `\\n`, `\\t` and `\\\\`."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)
