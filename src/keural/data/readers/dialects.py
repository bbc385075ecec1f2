"""What stands between the cells of a table in text, and around them, by the lines that it begins with.

In: the beginning of a CSV or TSV file. Out: its `Dialect`, with the evidence where that is not what its name says.
"""

import csv
from collections.abc import Sequence
from typing import NamedTuple

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What is looked for between cells, in this order."""
NO_QUOTE = "none"
"""Value of option `quote` where quotation marks are ordinary characters."""
_MAX_LINES = 200
_AGREE = 0.9
"""Share of records that must be as wide as the header."""


class Dialect(NamedTuple):
    """How a table is written; `evidence` says what differs from its format, `sep_line` whether it begins with Excel's `sep=;`."""

    delimiter: str
    quote: str
    evidence: str = ""
    sep_line: bool = False


DIALECTS = {"csv": Dialect(",", '"'), "tsv": Dialect("\t", NO_QUOTE)}


def sniff_dialect(start: str, complete: bool, format_name: str, delimiter: str | None = None, quote: str | None = None) -> Dialect:
    """The dialect of a table of `format_name` that begins with this text; `delimiter` and `quote` are not looked for if given."""
    usual = DIALECTS[format_name]
    lines = [line.rstrip("\r\n") for line in start.split("\n")[: _MAX_LINES + 1]]
    if len(lines) > 1 and (not complete or not lines[-1]):
        lines.pop()
    sep_line = len(lines[0]) == 5 and lines[0].lower().startswith("sep=")
    if sep_line and delimiter is None:
        delimiter = lines[0][4]
    lines = lines[1:] if sep_line else lines
    found, evidence = _delimiter(lines, usual) if delimiter is None else (delimiter, "")
    if sep_line:
        evidence = f"{DELIMITERS.get(found, repr(found))} stand between cells, as its first line says"
    if quote is None:
        quote = _quote(lines, found, usual)
        if quote != usual.quote:
            evidence = "; ".join(filter(None, (evidence, "quotation marks enclose cells")))
    return Dialect(found, quote, evidence, sep_line)


def _delimiter(lines: Sequence[str], usual: Dialect) -> tuple[str, str]:
    """What divides the header and the lines below it alike."""
    width, agree = _widths(lines, usual.delimiter)
    if width > 1 and agree > 0.5:
        return usual.delimiter, ""
    others = []
    for delimiter in DELIMITERS:
        width, agree = _widths(lines, delimiter)
        if delimiter != usual.delimiter and width > 1 and agree >= _AGREE:
            others.append((agree, width, delimiter))
    if not others:
        return usual.delimiter, ""
    _, width, delimiter = max(others, key=lambda other: other[:2])
    return delimiter, f"{DELIMITERS[delimiter]} divide the lines into {width} cells, and {DELIMITERS[usual.delimiter]} do not"


def _widths(lines: Sequence[str], delimiter: str) -> tuple[int, float]:
    """Cells of the header, and the share of records that have as many."""
    try:
        records = [record for record in csv.reader(lines, delimiter=delimiter) if record]
    except csv.Error:
        return 0, 0.0
    if not records:
        return 0, 0.0
    width = len(records[0])
    return width, sum(len(record) == width for record in records) / len(records)


def _quote(lines: Sequence[str], delimiter: str, usual: Dialect) -> str:
    """Whether quotation marks enclose cells. In CSV they do; elsewhere every cell that begins with one must end with one, those
    inside must be doubled, and a cell must need them or a whole column have them: else they are somebody's speech.
    """
    if usual.quote != NO_QUOTE or delimiter == ",":
        return '"'
    rows = [line.split(delimiter) for line in lines if line]
    cells = [cell for row in rows for cell in row if cell.startswith('"') or cell.endswith('"')]
    if not cells or not all(_is_quoted(cell) for cell in cells):
        return NO_QUOTE
    if any('""' in cell[1:-1] for cell in cells):
        return '"'
    columns = zip(*rows, strict=False)
    return '"' if len(rows) > 2 and any(all(_is_quoted(cell) for cell in column) for column in columns) else NO_QUOTE


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
