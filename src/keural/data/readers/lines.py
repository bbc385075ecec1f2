"""The lines of a text, numbered; what is too long is passed over without being held."""

from collections.abc import Iterator
from typing import IO

MAX_ROW_CHARACTERS = 1 << 26
"""Longest row, cell or paragraph; a longer one is dropped."""


def numbered_lines(text: IO[str]) -> Iterator[tuple[int, str | None]]:
    """The lines of a text with their numbers; None for one that is too long."""
    number = 0
    while line := text.readline(MAX_ROW_CHARACTERS + 1):
        number += 1
        if len(line) <= MAX_ROW_CHARACTERS:
            yield number, line
            continue
        while line and not line.endswith("\n"):
            line = text.readline(MAX_ROW_CHARACTERS)
        yield number, None
