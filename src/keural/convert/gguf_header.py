"""A look at the header of a GGUF file before a reader that trusts it gets it.

In: a file. Out: nothing, or `UserError`: a header may promise more values than the file has bytes, and reading them takes forever.
The layout is that of version 2 and 3: magic, version, numbers of tensors and of entries, then entries of key, type and value.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from keural.errors import UserError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the value types of fixed size; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


def check_header(file: Path) -> None:
    """Walk over all entries without keeping them. Raises `UserError` when the file is not GGUF or ends before its header does."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            magic, version, tensors, entries = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in (2, 3) or tensors > size or entries > size:
                raise ValueError("no GGUF header")
            for _ in range(entries):
                _skip(stream, size, _STRING)
                _skip(stream, size, *struct.unpack("<I", stream.read(4)))
    except (struct.error, ValueError) as error:
        raise UserError(f"{file}: is damaged or not GGUF ({error}); copy or export it again") from error


def _skip(stream: BinaryIO, size: int, kind: int) -> None:
    """Move behind one value. Raises ValueError when that is behind the end of the file."""
    if kind == _STRING:
        (length,) = struct.unpack("<Q", stream.read(8))
    elif kind == _ARRAY:
        element, count = struct.unpack("<IQ", stream.read(12))
        if count > size:
            raise ValueError("an array longer than the file")
        if element not in _SIZES:
            for _ in range(count):
                _skip(stream, size, element)
            return
        length = count * _SIZES[element]
    elif kind in _SIZES:
        length = _SIZES[kind]
    else:
        raise ValueError(f"unknown type {kind}")
    if stream.tell() + length > size:
        raise ValueError("a value that ends behind the file")
    stream.seek(length, 1)
