"""Files inside zip and tar archives, whole or in parts, read without unpacking them.

In: a `.zip`, the `.zip.partN` files of one in order, or a `.tar`, packed or not. Out: its members as `DataFile`s with readable
names. A member is decompressed while it is read, so neither the disk nor memory holds an archive. What cannot be a good archive
is a `UserError`: half of one, a missing part, a password, names that lead out of it, and members that unpack to far more than they
should (zip bombs).
"""

import gzip
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from keural.data.readers.datafile import DataFile, open_bytes
from keural.data.readers.formats import MAX_WHOLE_BYTES
from keural.data.readers.magic import TAR, ZIP
from keural.data.readers.unpacking import check_ratio
from keural.errors import UserError, quoted

ARCHIVE = ZIP
"""Name of the format whose files may lie in parts."""
ARCHIVES = (ZIP, TAR)
"""Names of the formats that hold files, beside those of `keural.data.readers.formats`."""
MAX_MEMBER_BYTES = MAX_WHOLE_BYTES
"""Largest unpacked size of one member."""
_PART = re.compile(r"(.+\.zip)\.part\d+", re.IGNORECASE)
_UTF8_NAME = 0x800
_ENCRYPTED = 0x1


def archive_of(path: Path) -> Path | None:
    """The archive that a file is, or is a part of; None for other files."""
    if match := _PART.fullmatch(path.name):
        return path.with_name(match[1])
    return path if path.suffix.lower() == ".zip" else None


def members(file: DataFile, wanted: Callable[[str], bool], format_name: str = ZIP) -> Iterator[DataFile]:
    """The members of an archive whose names (without a leading slash) are wanted, in the archive's order.

    They can be read, once, until the next one is asked for. Raises `UserError` for an archive that cannot be trusted or read.
    """
    yield from _tar_members(file, wanted) if format_name == TAR else _zip_members(file, wanted)


def _tar_members(file: DataFile, wanted: Callable[[str], bool]) -> Iterator[DataFile]:
    with ExitStack() as stack:
        opened, _ = open_bytes(file)
        stack.enter_context(opened)
        try:
            archive = stack.enter_context(tarfile.open(fileobj=opened, mode="r|"))
            for info in archive:
                _check_name(file, info.name)
                if not info.isreg() or info.issparse() or not wanted(info.name):
                    continue
                if info.size > MAX_MEMBER_BYTES:
                    raise UserError(f"{file.path}: member {quoted(info.name)} has {info.size:,} bytes; unpack the archive")
                yield DataFile(
                    file.path, f"{file.name}/{info.name.removeprefix('./').lstrip('/')}", open=partial(_extracted, archive, info)
                )
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UserError(f"{file.path}: not a whole tar archive ({error}); fetch it again") from error


def _extracted(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    extracted = archive.extractfile(info)
    assert extracted is not None, "only regular files are opened"
    return extracted


def _zip_members(file: DataFile, wanted: Callable[[str], bool]) -> Iterator[DataFile]:
    with ExitStack() as stack:
        try:
            joined = stack.enter_context(_Joined(file.paths)) if len(file.paths) > 1 else None
            archive = stack.enter_context(zipfile.ZipFile(joined or file.path))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(
                f"{file.path}: not a whole zip archive ({error}); fetch it, or the missing part of it, again"
            ) from error
        found = [(info, _name(info)) for info in archive.infolist() if not info.is_dir()]
        _check_archive(file, [info for info, _ in found])
        for info, name in found:
            _check_name(file, name)
            if wanted(name):
                _check_member(file, info, name)
                yield DataFile(file.path, f"{file.name}/{name.lstrip('/')}", open=partial(archive.open, info))


class _Joined(io.RawIOBase):
    """Several files as one that can be read and searched; they stay where they are."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._ends: list[int] = []
        for path in paths:
            self._ends.append((self._ends[-1] if self._ends else 0) + path.stat().st_size)
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes before the place that is read next."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as in any file."""
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1]}[whence]
        if place < 0:
            raise OSError("seek before the start")
        self._place = place
        return self._place

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, across the files' borders."""
        left = max(0, self._ends[-1] - self._place) if size is None or size < 0 else size
        pieces = []
        while left > 0 and self._place < self._ends[-1]:
            number = next(number for number, end in enumerate(self._ends) if self._place < end)
            start = self._ends[number - 1] if number else 0
            self._files[number].seek(self._place - start)
            piece = self._files[number].read(min(left, self._ends[number] - self._place))
            if not piece:
                break
            pieces.append(piece)
            self._place += len(piece)
            left -= len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()
        super().close()


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name; archives made on Korean Windows have CP949 without saying so, others UTF-8."""
    name = info.orig_filename
    if not info.flag_bits & _UTF8_NAME and not name.isascii():
        raw = name.encode("cp437")
        for encoding in ("utf-8", "cp949"):
            try:
                return raw.decode(encoding)
            except UnicodeDecodeError:
                continue
    return name


def _check_archive(file: DataFile, infos: Sequence[zipfile.ZipInfo]) -> None:
    if infos and min(info.header_offset for info in infos) < 0:
        raise UserError(f"{file.path}: a part of the archive is missing, or the parts do not belong together; fetch it again")
    size = sum(path.stat().st_size for path in file.paths)
    if sum(info.compress_size for info in infos) > size:
        raise UserError(f"{file.path}: its members overlap, as in a zip bomb; it is not read")


def _check_name(file: DataFile, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if ".." in path.parts or "\0" in name or re.match(r"/*[A-Za-z]:", name):
        raise UserError(f"{file.path}: member {name!r} leads out of the archive; it is not read")


def _check_member(file: DataFile, info: zipfile.ZipInfo, name: str) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise UserError(f"{file.path}: member {name!r} has a password; unpack the archive and give the directory")
    if info.file_size > MAX_MEMBER_BYTES:
        raise UserError(f"{file.path}: member {quoted(name)} unpacks to {info.file_size:,} bytes, as in a zip bomb; it is not read")
    check_ratio(f"{file.path}: member {quoted(name)}", info.file_size, info.compress_size)
