"""Safetensors files written and read tensor by tensor.

In: `Weights`. Out: `model.safetensors`, or numbered shards with an index, and the checksum of each file; and the places of the
tensors in files of any size. The library's own writer wants a whole file in memory, and its reader maps one, which fails for files
larger than the memory; the format is an 8-byte length, a JSON header and the values one after the other, so that names and shapes
are enough to begin.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from keural.errors import UserError, quoted
from keural.files import read_object, write_json
from keural.parsing import parse_json
from keural.pretrained.weights import TensorInfo, Weights, data_bytes, read_tensor

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The format's names of the dtypes that weights may have."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


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


def read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Every tensor of a safetensors file and the byte where its values begin, in the order of the values.

    Raises ValueError when the file is cut off or its header does not describe it, and for types other than `DTYPES`.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("the header is longer than the file")
        entries = parse_json(stream.read(length), unique=True)
    if not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    tensors = {name: _entry(name, entry) for name, entry in entries.items() if name != "__metadata__"}
    end = 0
    for name, (info, start) in sorted(tensors.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if start != end:
            raise ValueError(f"the values of {quoted(name)} do not begin where the ones before end")
        end = start + info.nbytes
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes instead of {8 + length + end}")
    placed = sorted(tensors.items(), key=lambda item: item[1][1])
    return {name: (info, 8 + length + start) for name, (info, start) in placed}


def _entry(name: str, entry: Any) -> tuple[TensorInfo, int]:
    """One entry of a header: what the tensor is, and where its values begin behind the header. Raises ValueError."""
    shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "data_offsets"))
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the entry of {quoted(name)} is not understood")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BY_NAME:
        raise ValueError(f"tensor {quoted(name)} is of type {quoted(dtype)}; only {', '.join(_BY_NAME)} can be read")
    info = TensorInfo(tuple(shape), _BY_NAME[dtype])
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(
            f"{quoted(name)} has {quoted(offsets[1] - offsets[0])} bytes, its shape {quoted(shape)} wants {quoted(info.nbytes)}"
        )
    return info, offsets[0]


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of whole numbers that are not negative; Python counts truth values as such."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


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


def open_safetensors(files: Sequence[Path]) -> Weights:
    """The tensors of safetensors files, in the order of the files and of their headers.

    Raises `UserError` when a file is missing or damaged, a name occurs twice, or a tensor is not of a floating-point type.
    """
    infos: dict[str, TensorInfo] = {}
    places: dict[str, tuple[Path, int]] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; the weights are incomplete, copy or train the model again")
        try:
            tensors = read_header(file)
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{file}: is damaged ({error}); copy or train the model again") from error
        for name, (info, offset) in tensors.items():
            if name in infos:
                raise UserError(f"{file}: tensor {name} is in another file of the checkpoint, too; remove the files left over")
            infos[name], places[name] = info, (file, offset)
    return Weights(infos, lambda name: read_tensor(*places[name], infos[name]))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those of its index where there is one, else all.

    Raises `UserError` when there is none, or when others lie beside those of the index: it would be a guess which are meant.
    """
    present = sorted(file.name for file in directory.glob("*.safetensors") if not file.name.startswith("."))
    index = directory / INDEX
    if index.exists() or index.is_symlink():
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{index}: names no files (weight_map); copy the checkpoint again")
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index}: names {name!r}, which is not a file beside it; copy the checkpoint again")
        for name in present:
            if name not in names:
                raise UserError(
                    f"{directory / name}: lies beside the weights that {INDEX} names and is not one of them; move away what is not "
                    "meant"
                )
        return [directory / name for name in names]
    if not present:
        raise UserError(f"{directory}: no *.safetensors file; the weights are missing, copy or train the model again")
    return [directory / name for name in present]
