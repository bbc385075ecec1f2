"""A file of a source, or a member of an archive, and the rows that are read from it.

In: paths, or members that an archive opens. Out: `DataFile`s, their bytes unpacked, and `Row`s with the place each came from.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from keural.data.readers.unpacking import unpack


@dataclass(frozen=True)
class FileShape:
    """What a file is. `problem` says why it cannot be read, and what to do; the other fields are what was found nevertheless."""

    format: str | None
    """Name of its format (`keural.data.readers.formats`), `zip` or `tar`; None where it is none that is read."""
    packing: str | None = None
    """What it is packed with: `gzip`, `bzip2`, `xz`, `Zstandard`, or None."""
    encoding: str | None = None
    """Python's name of the encoding; None for what is no text, and where the evidence does not decide."""
    shows: str | None = None
    """The format that the text shows by itself, whatever its name; None for prose and what is no text."""
    delimiter: str | None = None
    """What stands between the cells of a CSV or TSV file."""
    quote: str | None = None
    """What encloses them, or `none`."""
    evidence: tuple[str, ...] = ()
    """Why, a clause for each finding."""
    assumed: tuple[str, ...] = ()
    """What is not as the name and the custom say, to be said once: encodings other than UTF-8, other formats and delimiters."""
    problem: str | None = None
    has_sep_line: bool = False
    """The first line only says what stands between cells."""
    newline: str = "\n"
    """What ends a line, `\\r` in files of old Macintoshes."""


class DataFile(NamedTuple):
    """A file of a source, or a member of an archive, and its name in messages and tables (relative to the data directory)."""

    path: Path
    name: str
    parts: tuple[Path, ...] = ()
    """The files an archive is spread over, where it is."""
    open: Callable[[], IO[bytes]] | None = None
    """Opens a member of an archive; one of a stream can be opened once."""
    shape: FileShape | None = None
    """What it is, where that is known already."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files on disk."""
        return self.parts or (self.path,)


class Row(NamedTuple):
    """One row: its value as read, and where it is (`file:line`, `file#number` in an array, or the file)."""

    where: str
    value: Any


def open_bytes(file: DataFile) -> tuple[IO[bytes], str | None]:
    """What a file holds, unpacked while it is read, and what it is packed with (see `unpacking.packing_of`).

    Raises `OSError` where it cannot be opened; reading raises what `unpack` says.
    """
    return unpack(file.path.open("rb") if file.open is None else file.open(), file.name)


class Joined(io.RawIOBase):
    """What was read of a stream already, and the rest of it."""

    def __init__(self, start: bytes, rest: IO[bytes]) -> None:
        self._start: bytes | None = start
        self._rest = rest

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer."""
        if self._start is not None:
            size = min(len(buffer), len(self._start))
            buffer[:size] = self._start[:size]
            self._start = self._start[size:] or None
            return size
        piece = self._rest.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Close the stream."""
        self._rest.close()
        super().close()
