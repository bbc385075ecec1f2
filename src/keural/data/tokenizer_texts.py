"""Texts for training a tokenizer: what the sources say, thinned out evenly to a number of bytes.

In: sources. Out: texts, in file order. When there is more than wanted, texts are cut into pieces of a few kilobytes at line
ends and pieces are taken at even distances, so that every source and every long document is there in proportion.
"""

from collections.abc import Iterator, Sequence

from keural.data.permutation import Permutation
from keural.data.records import Drop
from keural.data.sources import Source
from keural.data.tokens.encode import texts_of
from keural.errors import UserError

PIECE_BYTES = 4096


def iter_texts(sources: Sequence[Source], max_bytes: int, seed: int) -> Iterator[str]:
    """Texts of all sources (contents of messages, for conversations and pairs), at most `max_bytes` of UTF-8 in all.

    Raises `UserError` when a source gives nothing.
    """
    sizes = [sum(len(text.encode("utf-8")) for text in _texts(source, seed)) for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        if size == 0:
            raise UserError(f"source {source.name!r}: gives no text for the tokenizer; check its path and options")
    texts = (text for source in sources for text in _texts(source, seed))
    if sum(sizes) <= max_bytes:
        yield from texts
    else:
        yield from _thinned(texts, sum(sizes), max_bytes, seed)


def _texts(source: Source, seed: int) -> Iterator[str]:
    kept = 0
    for record in source.read(seed):
        if isinstance(record, Drop):
            continue
        for text in texts_of(record):
            yield from [text] * source.spec.repeat
        kept += 1
        if kept == source.spec.limit:
            return


def _thinned(texts: Iterator[str], total: int, max_bytes: int, seed: int) -> Iterator[str]:
    """Pieces taken whenever less than their share of what went by has been taken."""
    share = max(0, max_bytes - PIECE_BYTES) / total
    passed, taken = float(Permutation(PIECE_BYTES, seed)[0]), 0
    for text in texts:
        for piece in pieces(text, PIECE_BYTES):
            size = len(piece.encode("utf-8"))
            if taken <= share * passed and taken + size <= max_bytes:
                taken += size
                yield piece
            passed += size


def pieces(text: str, size: int) -> Iterator[str]:
    """A text in pieces of whole lines of about `size` bytes; together they are the text."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line.encode("utf-8"))
        if length >= size:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)
