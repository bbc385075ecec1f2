"""Weights that are read one tensor at a time, so that a model larger than the memory can be copied, checked and converted.

In: files, a state dict or a rule. Out: `Weights`: what there is (names, shapes, dtypes, known beforehand) and a function that reads
one tensor. Every importer, exporter and writer of this room takes and gives these.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from keural.errors import UserError
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.tensor_names import HEAD


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


def read_tensor(file: Path, offset: int, info: TensorInfo) -> Tensor:
    """The values that begin at byte `offset` of `file`, in row-major order.

    The file is read and not mapped: a mapping that PyTorch may write to counts as memory, so that a checkpoint larger than the
    memory could not be opened, and pages that were read stay resident. Raises `UserError` when the file ends too early.
    """
    data = bytearray(info.nbytes)
    with file.open("rb") as stream:
        stream.seek(offset)
        if stream.readinto(data) != len(data):
            raise UserError(f"{file}: is damaged (it ends within a tensor); copy it again")
    return torch.frombuffer(data, dtype=info.dtype).view(info.shape) if data else torch.empty(info.shape, dtype=info.dtype)


def data_bytes(tensor: Tensor) -> memoryview:
    """The values of a CPU tensor as little-endian bytes, in row-major order; a view where the tensor is contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
