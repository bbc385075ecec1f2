"""What of a checkpoint's tensors a rank writes, and the files that it writes them to.

In: tensors by name, plain or sharded. Out: safetensors files whose headers say where in its tensor each piece belongs, and the
SHA-256 of each, taken while it is written. torch's `HuggingFaceStorageReader` reads them on any number of ranks.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from keural.pretrained.safetensors import DTYPES
from keural.pretrained.weights import data_bytes
from keural.train.processes.modes import part_of

FILE_BYTES = 1 << 30
"""About so many bytes of pieces go into one file."""
BLOCK_BYTES = 1 << 24
"""So much is hashed and written at a time."""
TYPES = DTYPES | {torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where torch's reader looks in a header for the places of pieces."""


class Piece(NamedTuple):
    """A rank's part of a tensor: its name, where in the tensor it begins, and its values, which share the tensor's memory."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor


def pieces_of(state: Mapping[str, Tensor], is_main: bool) -> list[Piece]:
    """What this rank writes: its part of every sharded tensor, where there are copies of it some of them, and on the main rank what
    is not sharded. Nothing is written twice, and parts without elements are not written.
    """
    found = []
    for number, (name, tensor) in enumerate(state.items()):
        if not isinstance(tensor, DTensor):
            if is_main:
                found.append(Piece(name, (0,) * tensor.ndim, tensor.detach()))
            continue
        region, copy, copies = _place(tensor)
        values = tensor.to_local().detach()
        assert list(values.shape) == [part.stop - part.start for part in region], name
        if number % copies == copy and values.numel():
            found.append(Piece(name, tuple(part.start for part in region), values))
    return found


def _place(tensor: DTensor) -> tuple[tuple[slice, ...], int, int]:
    """Where in its tensor this rank's part lies; which copy of it this is, of how many."""
    region, copy, copies = [slice(0, size) for size in tensor.shape], 0, 1
    for dimension, placement in enumerate(tensor.placements):
        rank, size = tensor.device_mesh.get_local_rank(dimension), tensor.device_mesh.size(dimension)
        if isinstance(placement, Shard):
            assert region[placement.dim] == slice(0, tensor.shape[placement.dim]), "a dimension is divided once"
            region[placement.dim] = part_of(tensor.shape, rank, size, placement.dim)[placement.dim]
        else:
            assert isinstance(placement, Replicate)
            copy, copies = copy * size + rank, copies * size
    return tuple(region), copy, copies


def in_files(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in groups of about `FILE_BYTES`."""
    groups: list[list[Piece]] = []
    size = FILE_BYTES
    for piece in pieces:
        if size >= FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.values.nbytes
    return groups


def file_name(rank: int, number: int, of: int) -> str:
    """Of a rank's `number`-th file, both counted from 0."""
    return f"shard-{rank + 1:05d}-model-{number + 1:05d}-of-{of:05d}.safetensors"


def write_file(path: Path, pieces: Sequence[Piece], go_on: Callable[[], None]) -> str:
    """Write pieces to a file, which is on the disk then; returns its SHA-256. `go_on` is called in between, and may raise."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (memoryview(_header(pieces)), *(data_bytes(piece.values) for piece in pieces)):
            for start in range(0, len(block), BLOCK_BYTES):
                go_on()
                part = block[start : start + BLOCK_BYTES]
                digest.update(part)
                file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(pieces: Sequence[Piece]) -> bytes:
    """Length and JSON of a safetensors header; padded with spaces, so that values begin at a multiple of 8."""
    places = {piece.name: {OFFSETS: piece.offsets} for piece in pieces}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", PLACES: json.dumps(places)}}
    offset = 0
    for piece in pieces:
        end = offset + piece.values.nbytes
        entries[piece.name] = {
            "dtype": TYPES[piece.values.dtype], "shape": list(piece.values.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
