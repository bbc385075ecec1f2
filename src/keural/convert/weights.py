"""Weights that are read one tensor at a time, so that a model larger than the memory can be copied, checked and converted.

In: files, a state dict or a rule. Out: `Weights`: what there is (names, shapes, dtypes, known beforehand) and a function that reads
one tensor. Every importer, exporter and writer of this room takes and gives these.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from keural.convert.names import HEAD
from keural.errors import UserError
from keural.model import KeuralConfig, KeuralMoECausalLM


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """Tensors by name, in the order in which they are written; `read` gives one."""

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(info.nbytes for info in self.infos.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.infos)

    def watched(self, advance: Callable[[int], None]) -> "Weights":
        """The same weights; `advance` is told the bytes of every tensor that was read."""

        def read(name: str) -> Tensor:
            tensor = self.read(name)
            advance(self.infos[name].nbytes)
            return tensor

        return replace(self, read=read)


def state_dict_weights(state_dict: Mapping[str, Tensor]) -> Weights:
    """Tensors in memory under their stored names: fused experts become one matrix each, views of the same memory."""
    tensors = {name: tensor for fused, whole in state_dict.items() for name, tensor in unfused(fused, whole)}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Weights(infos, tensors.__getitem__)


def unfused(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors that one tensor of the network is: each expert of `[E, 2I, H]` (gate rows first) or `[E, H, I]` apart."""
    block, _, kind = name.rpartition(".")
    if tensor.ndim != 3 or kind not in {"gate_up_proj", "down_proj"}:
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        if kind == "down_proj":
            yield f"{block}.{expert}.down_proj.weight", matrix
        else:
            gate, up = matrix.chunk(2)
            yield f"{block}.{expert}.gate_proj.weight", gate
            yield f"{block}.{expert}.up_proj.weight", up


def stored_tensors(config: KeuralConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model directory: one matrix per expert, a head only where it is not tied."""
    with torch.device("meta"):
        weights = state_dict_weights(KeuralMoECausalLM(config).state_dict())
    return {name: info.shape for name, info in weights.infos.items() if not (name == HEAD and config.tie_word_embeddings)}


def expected_tensors(where: Path, config: KeuralConfig, weights: Weights) -> dict[str, tuple[int, ...]]:
    """`stored_tensors` of a configuration that comes from a file.

    Raises `UserError` when it has more layers or experts than there are tensors, or when transformers cannot build the network.
    """
    for name in ("num_hidden_layers", "num_local_experts"):
        if getattr(config, name) > len(weights.infos):
            raise UserError(
                f"{where}: the configuration says {name} {getattr(config, name)}, but there are only {len(weights.infos)} tensors; "
                "they do not belong together"
            )
    try:
        return stored_tensors(config)
    except Exception as error:  # whatever transformers makes of values that only it knows
        raise UserError(f"{where}: no network can be built from its configuration ({str(error).splitlines()[0]})") from error


def finite(where: Path, weights: Weights) -> Weights:
    """The same weights; reading a tensor with an infinity or NaN raises `UserError`."""

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: tensor {name} has values that are not finite; the model is unusable")
        return tensor

    return replace(weights, read=read)


def taken(mapped: Tensor) -> Tensor:
    """A copy in memory of a tensor that maps a file, whose pages the system may then forget.

    Without forgetting them the resident memory of a process that reads through a large file grows to the size of the file.
    `mapped` must be a mapping of a file, unchanged since: anonymous memory would lose its values.
    """
    copy = mapped.clone(memory_format=torch.contiguous_format)
    start, length = mapped.data_ptr(), mapped.numel() * mapped.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and mapped.is_contiguous():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
    return copy


def data_bytes(tensor: Tensor) -> memoryview:
    """The values of a CPU tensor as little-endian bytes, in row-major order; a view where the tensor is contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
