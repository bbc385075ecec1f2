"""The published pretraining shards, `keural_NNN.bin/.idx/.meta`, as they really are.

In: a directory of shards. Out: their documents, for a token store, and a count of what is there, what is padding and what was
lost when they were made. Little-endian:

- `.bin`: "KEURAL\\0\\0", version u32 = 1, number of sequences u64, sequence length u64, then the low half of a u64 of padding. The
  writer reserved 32 bytes for this header and wrote 36, so the high half lies on the first token of the first sequence, which is
  lost (always 0). The sequences, u32 tokens, stand from byte 32 on.
- `.idx`: number of sequences u32, sequence length u32, then for each sequence its byte offset u64 and its length u32.
- `.meta`: JSON with num_sequences, seq_length, dtype, file_size_bytes.

A sequence holds whole documents, each `[BOS] ids [EOS]`, then 0 as padding; what was longer than the sequence was cut and got an
EOS as its last token. So every sequence starts with a BOS, the one whose first token is lost included.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keural.errors import UserError
from keural.files import read_json
from keural.tokenizer.model_file import BOS_ID, EOS_ID, PAD_ID

MAGIC = b"KEURAL\0\0"
HEADER = struct.Struct("<8sIQQII")
BODY = 32
ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4")])
TOKEN = np.dtype("<u4")
BLOCK_TOKENS = 1 << 22
"""Sequences are read in blocks of about so many tokens (16 MB)."""


@dataclass(frozen=True)
class PublishedShard:
    """One checked shard; `tokens` is memory-mapped ``[num_sequences, length]``, `first_lost` where the header lies on a token."""

    path: Path
    tokens: NDArray[np.uint32]
    first_lost: bool


def find_shards(source: Path) -> list[Path]:
    """The `.bin` files of a directory in the order of their names, or the one file. Raises `UserError` when there are none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or directory; give the directory with keural_NNN.bin, .idx and .meta")
    found = {path.with_suffix(".bin") for suffix in ("bin", "idx", "meta") for path in source.glob(f"keural_*.{suffix}")}
    if not found:
        raise UserError(f"{source}: holds no keural_NNN.bin; give the directory with the published shards")
    return sorted(found)


def open_shard(path: Path) -> PublishedShard:
    """Open a shard and check its three files against each other. Raises `UserError` where they disagree."""
    for needed in (path, path.with_suffix(".idx"), path.with_suffix(".meta")):
        if not needed.is_file():
            raise UserError(f"{needed}: is missing; fetch the shard again")
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size or not start.startswith(MAGIC):
        raise UserError(f"{path}: does not start like a published shard (magic KEURAL); give --format, or fetch it again")
    _, version, sequences, length, low, first = HEADER.unpack(start)
    if version != 1:
        raise UserError(f"{path}: version {version} of the format is not known, only 1")
    if low != 0 or first not in (0, BOS_ID):
        raise UserError(f"{path}: header is damaged (bytes 28 to 35 are {low}, {first}, not 0, 0); fetch the shard again")
    if not sequences or length < 2:
        raise UserError(f"{path}: holds {sequences} sequences of {length} tokens; fetch the shard again or leave it out")
    expected, size = BODY + sequences * length * TOKEN.itemsize, path.stat().st_size
    if size != expected:
        raise UserError(
            f"{path}: has {size} bytes, its header says {sequences} sequences of {length} ({expected} bytes); fetch it again"
        )
    _check_index(path.with_suffix(".idx"), sequences, length)
    _check_meta(path.with_suffix(".meta"), sequences, length, size)
    tokens = np.memmap(path, dtype=TOKEN, mode="r", offset=BODY, shape=(sequences, length))
    return PublishedShard(path, tokens, first_lost=first == 0)


def _check_index(path: Path, sequences: int, length: int) -> None:
    size, expected = path.stat().st_size, 8 + sequences * ENTRY.itemsize
    head = np.fromfile(path, dtype="<u4", count=2).tolist()
    if head != [sequences, length]:
        said = " sequences of ".join(map(str, head))
        raise UserError(f"{path}: says {said}, the .bin beside it {sequences} of {length}; fetch the shard again")
    if size != expected:
        raise UserError(f"{path}: has {size} bytes, {sequences} sequences take {expected}; fetch the shard again")
    entries = np.memmap(path, dtype=ENTRY, mode="r", offset=8)
    offsets = BODY + np.arange(sequences, dtype=np.uint64) * np.uint64(length * TOKEN.itemsize)
    wrong = np.flatnonzero((entries["offset"] != offsets) | (entries["length"] != length))
    if wrong.size:
        offset, found = entries[wrong[0]].tolist()
        raise UserError(
            f"{path}: sequence {wrong[0]} is at byte {offset} with {found} tokens, the .bin beside it has it at "
            f"{int(offsets[wrong[0]])} with {length}; fetch the shard again"
        )


def _check_meta(path: Path, sequences: int, length: int, size: int) -> None:
    meta = read_json(path)
    expected = {"num_sequences": sequences, "seq_length": length, "dtype": "uint32", "file_size_bytes": size}
    for key, value in expected.items():
        found = meta.get(key) if isinstance(meta, dict) else None
        if found != value:
            raise UserError(f"{path}: {key} is {found!r}, the .bin beside it has {value!r}; fetch the shard again")


@dataclass
class Counts:
    """What shards hold. `positions` is the sum of `padding`, `stray` (marks that a cut left without a document), the positions
    that stay lost, and the tokens of the documents.

    `cut_long` sequences are filled by one document (of at least the sequence's length, cut there or already at 5,000);
    `cut_last` ones are full with several, so that the last document was cut unless it ended exactly there.
    """

    shards: int = 0
    sequences: int = 0
    positions: int = 0
    documents: int = 0
    tokens: int = 0
    padding: int = 0
    stray: int = 0
    cut_long: int = 0
    cut_last: int = 0
    lost: int = 0
    restored: int = 0

    def table(self) -> dict[str, int]:
        """The counts by name."""
        return dict(vars(self))


def read_documents(
    paths: list[Path], vocab_size: int, restore: bool = True
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64], Counts]]:
    """The documents of all shards, block by block: tokens ``[n]``, lengths of the documents in them, and the counts so far.

    The lost first token of a shard comes back as BOS, which it was by the packing rule; without `restore` its document starts
    with the next token. Raises `UserError` for what `open_shard` refuses, ids that the tokenizer does not have, and sequences
    that are not packed by the published rule.
    """
    counts = Counts()
    for path in paths:
        shard = open_shard(path)
        counts.shards += 1
        rows = max(1, BLOCK_TOKENS // shard.tokens.shape[1])
        for start in range(0, len(shard.tokens), rows):
            block = np.array(shard.tokens[start : start + rows])
            lost = shard.first_lost and start == 0
            if lost:
                block[0, 0] = BOS_ID
            tokens, lengths = _block(block, f"{path}: sequence", start, vocab_size, counts)
            if lost:
                counts.lost += 1
                counts.restored += restore
                if not restore:
                    tokens, lengths[0] = tokens[1:], lengths[0] - 1
                    counts.tokens -= 1
            yield tokens, lengths, counts


def _block(
    rows: NDArray[np.uint32], where: str, first: int, vocab_size: int, counts: Counts
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The documents of some sequences ``[rows, length]``, as their tokens and lengths; what else there is is counted."""
    non_padding, starts = layout(rows, where, first, vocab_size, counts)
    tokens = rows[non_padding]
    return tokens, np.diff(np.flatnonzero(starts[non_padding]), append=tokens.size)


def layout(
    rows: NDArray[np.uint32], where: str, first: int, vocab_size: int, counts: Counts
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the documents of some sequences ``[rows, length]`` are, and where each starts; what else there is is counted.

    Raises `UserError`, with `where` and the sequence's number counted from `first`, for ids outside the vocabulary and for
    sequences that are not packed by the published rule.
    """
    length = rows.shape[1]
    _refuse(rows >= vocab_size, where, first, f"has a token id outside the tokenizer's {vocab_size}; give the right tokenizer")
    _refuse(rows[:, :1] != BOS_ID, where, first, "does not start with BOS; it is not packed by the published rule")
    used = length - np.argmax(rows[:, ::-1] != PAD_ID, axis=1)
    full, ends = used == length, rows == EOS_ID
    counts.sequences += len(rows)
    counts.positions += rows.size
    counts.padding += rows.size - int(used.sum())
    # what a cut right after a document, or right after the next one's BOS, leaves behind
    after_end = full & ends[:, -1] & ends[:, -2]
    after_begin = full & ends[:, -1] & (rows[:, -2] == BOS_ID) & (length > 2)
    counts.stray += int(after_end.sum() + 2 * after_begin.sum())
    used = used - after_end - 2 * after_begin
    non_padding = np.arange(length) < used[:, None]
    starts = (rows == BOS_ID) & non_padding
    ends &= non_padding
    _refuse((rows == PAD_ID) & non_padding, where, first, "has padding inside; it is not packed by the published rule")
    expected = np.zeros_like(starts)
    expected[:, :-1] = starts[:, 1:]
    expected[np.arange(len(rows)), used - 1] = True
    _refuse(expected != ends, where, first, "has a document without its end; it is not packed by the published rule")
    many = starts.sum(axis=1) > 1
    counts.cut_long += int((full & ~many & (used == length)).sum())
    counts.cut_last += int((full & (many | (used < length))).sum())
    counts.documents += int(starts.sum())
    counts.tokens += int(non_padding.sum())
    return non_padding, starts


def _refuse(wrong: NDArray[np.bool_], where: str, first: int, what: str) -> None:
    """Raise `UserError` for the first row ``[rows, ..]`` that has something wrong."""
    if wrong.any():
        row = int(np.argmax(wrong.any(axis=1)))
        raise UserError(f"{where} {first + row} {what}")
