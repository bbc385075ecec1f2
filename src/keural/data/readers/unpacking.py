"""Packed files as streams that cannot unpack to anything: gzip, bzip2, xz, Zstandard.

In: an open file. Out: an open file with what is packed in it, as its first bytes say, whatever its name is. A stream that gives
more than `MAX_RATIO` times the bytes that were read for it is a bomb, and a `UserError`; zip archives have the same bound.
"""

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import IO, Any

from keural.errors import UserError

PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
"""Suffixes of packed files, and what they are packed with."""
_FIRST_BYTES = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "Zstandard": b"\x28\xb5\x2f\xfd"}
_MAX_LAYERS = 3
"""A file may be packed several times over, by accident."""
MAX_RATIO = 200
"""Largest unpacked size against the packed one; text is near 3 to 30, the formats allow a thousand and more."""
SMALL_BYTES = 1 << 20
"""So much may be unpacked at any ratio."""
FREE_BYTES = 1 << 26
"""So much of a stream may be unpacked before its ratio is looked at: a long run of the same does not make a bomb."""
_BLOCK = 1 << 16


def packing_of(start: bytes) -> str | None:
    """What a file that begins with these bytes is packed with: `gzip`, `bzip2`, `xz`, `Zstandard`, or None."""
    if start.startswith(b"BZh") and not re.match(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", start):
        return None
    return next((name for name, first in _FIRST_BYTES.items() if start.startswith(first)), None)


def unpack(opened: IO[bytes], name: str) -> tuple[IO[bytes], str | None]:
    """The content of an open file, called `name` in messages, and what it is packed with: unpacked while it is read, or as it is.

    Closing it closes `opened`. Reading raises what the format's library raises of damage, `EOFError` for one that is cut off,
    and `UserError` where it unpacks to far too much.
    """
    packing = None
    for _ in range(_MAX_LAYERS):
        peekable: Any = opened if hasattr(opened, "peek") else io.BufferedReader(opened)
        layer = packing_of(peekable.peek(16)[:16])
        if layer is None:
            return peekable, packing
        packing = packing or layer
        packed = _Counted(peekable)
        opened = io.BufferedReader(_Limited(_STREAMS[layer](packed, name), packed, name), _BLOCK)
    return opened, packing


def check_ratio(name: str, unpacked: int, packed: int) -> None:
    """Raise `UserError` unless so many unpacked bytes may come out of so many packed ones."""
    if unpacked > SMALL_BYTES and unpacked > MAX_RATIO * max(packed, 1):
        raise UserError(
            f"{name} unpacks to {unpacked:,} bytes, over {MAX_RATIO} times the {packed:,} that were read of it, as in a zip bomb; "
            "it is not read"
        )


class _Counted(io.RawIOBase):
    """A file that counts what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, as in any file."""
        piece = self._file.read(-1 if size is None else size)
        self.count += len(piece)
        return piece

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class _Limited(io.RawIOBase):
    """What a packed file holds, up to the bound of what it may hold."""

    def __init__(self, stream: Any, packed: _Counted, name: str) -> None:
        self._stream, self._packed, self._name = stream, packed, name
        self._count = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer. Raises `UserError` where the file unpacks to far too much."""
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        self._count += len(piece)
        if self._count > FREE_BYTES:
            check_ratio(self._name, self._count, self._packed.count)
        return len(piece)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._packed.close()
        super().close()


class _Bzip2(bz2.BZ2File):
    """bzip2, whose damage is no error of the operating system."""

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes. Raises `EOFError` where the file is damaged."""
        try:
            return super().read(-1 if size is None else size)
        except OSError as error:
            raise EOFError(str(error)) from error


def _zstandard(packed: _Counted, name: str) -> io.RawIOBase:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{name}: reading Zstandard files needs zstandard; install keural[data]") from error
    return _Zstandard(packed, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)


class _Zstandard(io.RawIOBase):
    """A Zstandard file of one or several frames, unpacked while it is read; one cut off does not pass for a shorter one."""

    def __init__(self, file: _Counted, new_frame: Callable[[], Any], damage: type[Exception]) -> None:
        self._file = file
        self._new_frame, self._damage = new_frame, damage
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")  # up to 32 megabytes, of which no copies are made

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer. Raises `EOFError` where the file is damaged or ends in the middle of a frame."""
        while not self._ready and (self._packed or self._more()):
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
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
        self._packed = self._file.read(1 << 10)  # may become 32 megabytes, which are there at once
        return bool(self._packed)


_STREAMS: dict[str, Callable[[_Counted, str], Any]] = {
    "gzip": lambda packed, name: gzip.GzipFile(fileobj=packed),
    "bzip2": lambda packed, name: _Bzip2(packed),
    "xz": lambda packed, name: lzma.LZMAFile(packed),  # type: ignore[arg-type]  # noqa: SIM115
    "Zstandard": _zstandard,
}
