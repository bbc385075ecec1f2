"""How a tokenizer fares on texts: compression, round trip, byte fallback.

In: a tokenizer and text files. Out: one row of figures per file and one for all together, and the same as a table for the terminal.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.tokenizer.load import KeuralTokenizer
from keural.tokenizer.model_file import FIRST_BYTE_ID

COLUMNS = (
    "file",
    "characters",
    "tokens",
    "characters_per_token",
    "tokens_per_word",
    "bytes_per_token",
    "round_trip",
    "byte_fallback",
)


@dataclass
class _Counts:
    """What is added up over lines. Lines end at a newline and are encoded without it."""

    lines: int = 0
    characters: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    restored: int = 0

    def add(self, tokenizer: KeuralTokenizer, text: str, threads: int) -> None:
        lines = text.split("\n")
        for line, ids in zip(lines, tokenizer.encode_batch(lines, threads), strict=True):
            self.lines += 1
            self.characters += len(line)
            self.bytes += len(line.encode("utf-8"))
            self.words += len(line.split())
            self.tokens += len(ids)
            self.byte_tokens += sum(FIRST_BYTE_ID <= token_id < FIRST_BYTE_ID + 256 for token_id in ids)
            self.restored += tokenizer.decode(ids) == line

    def row(self, file: str) -> dict[str, Any]:
        tokens, words, lines = max(self.tokens, 1), max(self.words, 1), max(self.lines, 1)
        return {
            "file": file,
            "characters": self.characters,
            "tokens": self.tokens,
            "characters_per_token": round(self.characters / tokens, 3),
            "tokens_per_word": round(self.tokens / words, 3),
            "bytes_per_token": round(self.bytes / tokens, 3),
            "round_trip": round(self.restored / lines, 4),
            "byte_fallback": round(self.byte_tokens / tokens, 4),
        }


def tokenizer_report(tokenizer: KeuralTokenizer, files: Iterable[str | Path], threads: int = 1) -> dict[str, Any]:
    """Figures of `tokenizer` on each of `files` (UTF-8 text) and on all together.

    Returns `kind`, `vocab_size`, `sha256`, `rows` (a dict with the keys of `COLUMNS` for each file) and `total` (the same for all).
    A word is what white space separates; `round_trip` is the share of lines that decode to themselves, `byte_fallback` the share of
    tokens that are single bytes. Raises `UserError` for a file that is missing or not UTF-8.
    """
    total, rows = _Counts(), []
    for file in files:
        text = _read(Path(file))
        counts = _Counts()
        counts.add(tokenizer, text, threads)
        rows.append(counts.row(str(file)))
        total = _Counts(**{name: value + getattr(counts, name) for name, value in asdict(total).items()})
    if not rows:
        raise UserError("no files to report on; name at least one text file")
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "rows": rows,
        "total": total.row("total"),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as plain lines: a heading, then one aligned line per file and the total."""
    rows = [list(COLUMNS)] + [[str(row[name]) for name in COLUMNS] for row in [*report["rows"], report["total"]]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    head = f"{report['kind']} tokenizer, {report['vocab_size']} ids, sha256 {report['sha256'][:12]}"
    return "\n".join([head, *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)])


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
