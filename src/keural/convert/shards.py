"""Safetensors files written tensor by tensor.

In: `Weights`. Out: `model.safetensors`, or numbered shards with an index, and the checksum of each file. The library's own writer
wants a whole file in memory; the format is an 8-byte length, a JSON header and the values one after the other, so that names and
shapes are enough to begin.
"""

import hashlib
import json
from pathlib import Path

import torch

from keural.convert.weights import TensorInfo, Weights, data_bytes
from keural.files import write_json

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The format's names of the dtypes that weights may have."""


def write_shards(directory: Path, weights: Weights, shard_bytes: int) -> dict[str, str]:
    """Write all tensors into `directory`; returns the SHA-256 of every file by name.

    A file holds at most `shard_bytes` bytes of values unless a single tensor is larger. At most one tensor is in memory.
    """
    shards = _divided(weights, shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: _write(directory / SINGLE_FILE, weights, shards[0])}
    sums: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sums[file] = _write(directory / file, weights, names)
        places |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": weights.nbytes}, "weight_map": places})
    return sums


def _divided(weights: Weights, shard_bytes: int) -> list[list[str]]:
    """Names in their order, cut wherever the next tensor would make a file too large."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in weights.infos.items():
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards


def _write(path: Path, weights: Weights, names: list[str]) -> str:
    """One file; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header({name: weights.infos[name] for name in names})
        digest.update(header)
        file.write(header)
        for name in names:
            tensor = weights.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == weights.infos[name], f"{name}: not as announced"
            data = data_bytes(tensor)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _header(infos: dict[str, TensorInfo]) -> bytes:
    """Length and JSON of the header; padded with spaces, so that values begin at a multiple of 8 as the format wants."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.nbytes
        entries[name] = {"dtype": DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
