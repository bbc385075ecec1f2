"""What a file is by its first bytes, where that is not text: archives, tables, documents of office programs, images.

In: the first bytes of a file, unpacked. Out: its `Content`: a format that is read, or what to do about one that is not.
"""

import zipfile
from typing import IO, NamedTuple

TAR, ZIP = "tar", "zip"
"""Archives that are read, beside the formats of `keural.data.readers.formats`."""
_TAR_MARK = slice(257, 262)


class Content(NamedTuple):
    """What begins with some bytes: `format` where it is read, else `remedy` says what to do."""

    name: str
    format: str | None = None
    remedy: str = ""


_EXPORT = "export it as CSV with UTF-8"
_TEXT = "extract its text first"
_TABLE = "convert it to Parquet or JSON lines"
_LEAVE = "leave it out"
_UNPACK = "unpack it and give the directory"
_FIRST_BYTES: tuple[tuple[bytes, Content], ...] = (
    (b"PK\x03\x04", Content("a zip archive", ZIP)),
    (b"PK\x05\x06", Content("an empty zip archive", ZIP)),
    (b"PAR1", Content("a Parquet file", "parquet")),
    (b"ARROW1", Content("an Arrow file", None, _TABLE)),
    (b"\xff\xff\xff\xff", Content("an Arrow stream", None, _TABLE)),
    (b"version https://git-lfs.github.com/spec/", Content("a Git LFS pointer, not the data", None, "fetch it with git lfs pull")),
    (b"SQLite format 3\0", Content("an SQLite data base", None, "export the table as CSV or JSON lines")),
    (b"%PDF-", Content("a PDF document", None, _TEXT)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Content("an old office document (.xls, .doc, .hwp)", None, f"{_EXPORT}, or {_TEXT}")),
    (b"{\\rtf", Content("a rich text document", None, _TEXT)),
    (b"7z\xbc\xaf\x27\x1c", Content("a 7-Zip archive", None, _UNPACK)),
    (b"Rar!\x1a\x07", Content("a RAR archive", None, _UNPACK)),
    (b"\x04\x22\x4d\x18", Content("an LZ4 file", None, "unpack it")),
    (b"\x1f\x9d", Content("a compress (.Z) file", None, "unpack it")),
    (b"Obj\x01", Content("an Avro file", None, _TABLE)),
    (b"ORC", Content("an ORC file", None, _TABLE)),
    (b"\x89HDF\r\n\x1a\n", Content("an HDF5 file", None, _TABLE)),
    (b"\x93NUMPY", Content("a NumPy array", None, _TABLE)),
    (b"\x80\x04\x95", Content("a Python pickle", None, f"{_TABLE} where you trust it")),
    (b"\x80\x02}", Content("a Python pickle", None, f"{_TABLE} where you trust it")),
    (b"GGUF", Content("a GGUF model", None, _LEAVE)),
    (b"\x89PNG\r\n\x1a\n", Content("an image", None, _LEAVE)),
    (b"\xff\xd8\xff", Content("an image", None, _LEAVE)),
    (b"GIF8", Content("an image", None, _LEAVE)),
    (b"\x7fELF", Content("a program", None, _LEAVE)),
)
_IN_ZIP = (
    ("xl/", Content("an Excel workbook", None, _EXPORT)),
    ("word/", Content("a Word document", None, _TEXT)),
    ("ppt/", Content("a PowerPoint document", None, _TEXT)),
    ("META-INF/container.xml", Content("an EPUB book", None, _TEXT)),
    ("Contents/section0.xml", Content("a Hangul document (.hwpx)", None, _TEXT)),
    ("content.xml", Content("an OpenDocument file", None, f"{_EXPORT}, or {_TEXT}")),
)


def content_of(start: bytes) -> Content | None:
    """What a file is that begins with these bytes; None for text and what is not known."""
    if start[_TAR_MARK] == b"ustar":
        return Content("a tar archive", TAR)
    if start[:4] in (b"RIFF", b"OggS", b"ID3\x03", b"fLaC") and b"\0" in start[:64]:
        return Content("sound or an image", None, _LEAVE)
    found = next((content for first, content in _FIRST_BYTES if start.startswith(first)), None)
    if found and found.name == "an ORC file" and start[3:4].isalnum():
        return None  # a word
    return found


def content_of_zip(opened: IO[bytes]) -> Content | None:
    """What a zip archive is that no one means as one: an office document, a book; None for other archives and damaged ones."""
    try:
        names = zipfile.ZipFile(opened).namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    return next((content for inside, content in _IN_ZIP if any(name.startswith(inside) for name in names)), None)
