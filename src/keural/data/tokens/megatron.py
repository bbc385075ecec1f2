"""Megatron's indexed data set, `NAME.bin` and `NAME.idx`: read into documents, and written from a token store.

`.bin` holds token ids and nothing else. `.idx`, little-endian: "MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences
u64, number of document boundaries u64, then the sequences' lengths (i32), their byte offsets in `.bin` (i64), and the boundaries
(i64, from 0: document d is sequences boundary[d]..boundary[d+1]-1). (Megatron-Core, `core/datasets/indexed_dataset.py`; GPT-NeoX
and NeMo read the same.)

Nothing is added or removed: documents of ours are `[BOS] ids [EOS]`, those of others often only `ids [EOS]`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import atomic_directory, check_new

MAGIC = b"MMIDIDX\0\0"
HEAD = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
UINT16_VOCABULARY = 65_500
"""Megatron writes vocabularies below this size as uint16, others as int32."""
BLOCK_TOKENS = 1 << 22
NAME = "documents"


@dataclass(frozen=True)
class IndexedDataset:
    """A checked data set, memory-mapped: tokens ``[n]`` and where each document ends among them ``[documents]``."""

    path: Path
    tokens: NDArray[np.integer]
    ends: NDArray[np.int64]
    sequences: int


def find_datasets(source: Path) -> list[Path]:
    """The `.bin` files of a directory in the order of their names, or one file (`.bin`, `.idx`, or the name without either)."""
    if source.is_dir():
        if found := sorted(source.glob("*.bin")):
            return found
        raise UserError(f"{source}: holds no .bin file; give the directory or the name of a Megatron data set")
    path = source if source.suffix == ".bin" else source.with_suffix(".bin") if source.suffix == ".idx" else Path(f"{source}.bin")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the directory or the name of a Megatron data set")
    return [path]


def open_dataset(path: Path) -> IndexedDataset:
    """Open `path` (the `.bin`) and check it against its `.idx`. Raises `UserError` where they disagree."""
    index = path.with_suffix(".idx")
    for needed in (path, index):
        if not needed.is_file():
            raise UserError(f"{needed}: is missing; fetch the data set again")
    with index.open("rb") as file:
        head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise UserError(f"{index}: does not start like a Megatron index (magic MMIDIDX); give --format, or fetch it again")
    _, version, code, sequences, boundaries = HEAD.unpack(head)
    if version != 1:
        raise UserError(f"{index}: version {version} of the format is not known, only 1")
    dtype = np.dtype(DTYPES.get(code, "<f4"))
    if dtype.kind not in "iu":
        raise UserError(f"{index}: dtype code {code} is not one of integers ({', '.join(map(str, DTYPES))} are known)")
    size, expected = index.stat().st_size, HEAD.size + 12 * sequences + 8 * boundaries
    if size != expected:
        raise UserError(
            f"{index}: has {size} bytes, {sequences} sequences and {boundaries} document boundaries take {expected} "
            "(multimodal sets have a mode for each sequence and are not read); fetch the data set again"
        )
    if not sequences or not boundaries:
        raise UserError(f"{index}: holds no documents; leave it out")
    lengths = np.memmap(index, dtype="<i4", mode="r", offset=HEAD.size, shape=(sequences,))
    pointers = np.memmap(index, dtype="<i8", mode="r", offset=HEAD.size + 4 * sequences, shape=(sequences,))
    documents = np.memmap(index, dtype="<i8", mode="r", offset=HEAD.size + 12 * sequences, shape=(boundaries,))
    if int(lengths.min()) < 0:
        raise UserError(f"{index}: sequence {int(np.argmin(lengths))} has a negative length; fetch the data set again")
    ends = np.cumsum(lengths, dtype=np.int64)
    if path.stat().st_size != int(ends[-1]) * dtype.itemsize:
        raise UserError(
            f"{path}: has {path.stat().st_size} bytes, its index says {int(ends[-1])} tokens of {dtype.itemsize}; "
            "fetch the data set again"
        )
    wrong = np.flatnonzero(pointers != (ends - lengths) * dtype.itemsize)
    if wrong.size:
        raise UserError(
            f"{index}: sequence {int(wrong[0])} does not stand right after the one before it; write the set again in order"
        )
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise UserError(f"{index}: document boundaries do not rise from 0 to {sequences}; fetch the data set again")
    at = np.concatenate([np.zeros(1, dtype=np.int64), ends])[np.unique(documents)]
    at = np.unique(at)[1:]  # documents without a token are none
    if not at.size:
        raise UserError(f"{path}: holds no tokens; leave it out")
    return IndexedDataset(path, np.memmap(path, dtype=dtype, mode="r"), at, sequences)


def read_documents(paths: list[Path], vocab_size: int) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """The documents of all data sets, block by block: tokens ``[n]`` and the lengths of the documents in them.

    Raises `UserError` for what `open_dataset` refuses, and for ids that the tokenizer does not have.
    """
    for path in paths:
        dataset = open_dataset(path)
        first, start = 0, 0
        while first < dataset.ends.size:
            last = max(first + 1, int(np.searchsorted(dataset.ends, start + BLOCK_TOKENS, side="right")))
            stop = int(dataset.ends[last - 1])
            tokens = dataset.tokens[start:stop]
            if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
                place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
                raise UserError(
                    f"{path}: token {start + place} is id {int(tokens[place])}, outside the tokenizer's {vocab_size}; "
                    "give the right tokenizer"
                )
            yield tokens.astype(np.uint32), np.diff(dataset.ends[first:last], prepend=start)
            first, start = last, stop


def export_store(store: TokenStore, out: Path) -> None:
    """Write a store of documents as `out/documents.bin` and `.idx`, each document one sequence.

    Raises `UserError` for other kinds: the format has no place for a loss mask.
    """
    if store.kind != "documents":
        raise UserError(f"{store.directory}: holds {store.kind}; only documents can be exported, the format has no loss mask")
    dtype = np.dtype("<u2" if store.vocab_size < UINT16_VOCABULARY else "<i4")
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    check_new(out, store.num_tokens * dtype.itemsize + 20 * store.num_sequences)
    with atomic_directory(out) as directory:
        with (directory / f"{NAME}.bin").open("wb") as file:
            for start in range(0, store.num_tokens, BLOCK_TOKENS):
                file.write(store.read(start, start + BLOCK_TOKENS).astype(dtype).tobytes())
        with (directory / f"{NAME}.idx").open("wb") as file:
            file.write(HEAD.pack(MAGIC, 1, code, store.num_sequences, store.num_sequences + 1))
            ends = 0
            for lengths in store.iter_lengths():
                file.write(lengths.astype("<i4").tobytes())
            for lengths in store.iter_lengths():
                pointers = ends + np.cumsum(lengths) - lengths
                file.write((pointers * dtype.itemsize).astype("<i8").tobytes())
                ends += int(lengths.sum())
            file.write(np.arange(store.num_sequences + 1, dtype="<i8").tobytes())
