"""What programs that pack files make of a text: the bits per byte that a model must beat.

In: texts. Out: bits per byte. They have seen no other text, but all of this one.
"""

import lzma
from collections.abc import Sequence

from keural.errors import UserError


def packed_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """Bits per byte of the texts written one after the other, by packer: `xz_9`, and `zstd_19` where a library has it.

    Raises `UserError` when there is no text.
    """
    data = "".join(texts).encode("utf-8", "surrogatepass")
    if not data:
        raise UserError("xz: no text to measure; hold out more documents")
    sizes = {"xz_9": len(lzma.compress(data, preset=9)), "zstd_19": _zstd(data)}
    return {name: 8 * size / len(data) for name, size in sizes.items() if size is not None}


def _zstd(data: bytes) -> int | None:
    """Bytes that `zstd -19` needs; None where no library that is there has it."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        return None
    if not pyarrow.Codec.is_available("zstd"):
        return None
    return len(pyarrow.Codec("zstd", compression_level=19).compress(data))
