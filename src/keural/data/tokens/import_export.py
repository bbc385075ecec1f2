"""Tokenised data of other formats into a token store, and out of one.

A format is one entry of `FORMATS`: it gives documents block by block and says what it found. The store's manifest keeps that
beside format, source and licence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keural.data.tokens import megatron, published_format
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError, nearest
from keural.files import atomic_directory, check_new
from keural.tokenizer.load import KeuralTokenizer

Blocks = Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]


@dataclass(frozen=True)
class ImportOptions:
    """`restore_lost`: published shards only, give a shard's lost first token back as BOS. `license` goes into the manifest."""

    restore_lost: bool = True
    license: str | None = None


def import_tokens(
    source: Path,
    out: Path,
    format_name: str,
    tokenizer: KeuralTokenizer,
    options: ImportOptions | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, int]:
    """Write the documents of `source` as the token store `out`, in their order; the counts of what was found.

    `advance` is told of bytes as they are written. Raises `UserError` for an unknown format, an `out` that is not new, and
    whatever the format refuses; nothing is left of `out` then.
    """
    check_format(format_name)
    options = options or ImportOptions()
    paths = FORMATS[format_name].find(source)
    check_new(out, sum(path.stat().st_size for path in paths if path.is_file()))
    counts: dict[str, int] = {}
    row = {"source": source.name, "adapter": format_name, "license": options.license}
    meta: dict[str, Any] = {"sources": [row], "imported": counts}
    with atomic_directory(out) as directory:
        writer = StoreWriter(directory, tokenizer.sha256, tokenizer.vocab_size, "documents", meta)
        with writer:
            for tokens, lengths in FORMATS[format_name].read(paths, tokenizer.vocab_size, options, counts):
                writer.add_many(tokens, lengths)
                advance(tokens.nbytes)
            writer.close()
    return counts


def export_tokens(store: TokenStore, out: Path, format_name: str) -> None:
    """Write a store of documents in another format. Raises `UserError` for a format that is only read."""
    check_format(format_name)
    write = FORMATS[format_name].write
    if write is None:
        raise UserError(f"format {format_name} is only read; it would lose documents again; use --format megatron")
    write(store, out)


def check_format(name: str) -> None:
    """Raise `UserError` for a format that is not known."""
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown{nearest(name, FORMATS)}; known are {', '.join(FORMATS)}")


def _published(paths: list[Path], vocab_size: int, options: ImportOptions, counts: dict[str, int]) -> Blocks:
    for tokens, lengths, so_far in published_format.read_documents(paths, vocab_size, options.restore_lost):
        counts.update(so_far.table())
        yield tokens, lengths


def _megatron(paths: list[Path], vocab_size: int, options: ImportOptions, counts: dict[str, int]) -> Blocks:
    counts.update(files=len(paths), documents=0, tokens=0, start_with_bos=0, end_with_eos=0)
    for tokens, lengths in megatron.read_documents(paths, vocab_size):
        ends = np.cumsum(lengths)
        counts["documents"] += lengths.size
        counts["tokens"] += tokens.size
        counts["start_with_bos"] += int((tokens[ends - lengths] == KeuralTokenizer.bos_id).sum())
        counts["end_with_eos"] += int((tokens[ends - 1] == KeuralTokenizer.eos_id).sum())
        yield tokens, lengths


@dataclass(frozen=True)
class Format:
    """How a format's files are found, read, and written (if they are)."""

    find: Callable[[Path], list[Path]]
    read: Callable[[list[Path], int, ImportOptions, dict[str, int]], Blocks]
    write: Callable[[TokenStore, Path], None] | None = None


FORMATS = {
    "published": Format(published_format.find_shards, _published),
    "megatron": Format(megatron.find_datasets, _megatron, megatron.export_store),
}
