"""The weights a stage starts from on one of several ranks: its parts alone, so that no rank ever holds the whole model.

In: what `initial_model` takes, and which parts are this rank's. Out: a network without memory, to be sharded, and the values that
its parts have then; the same bits as those of `initial_model`. One tensor is whole at a time: as it is drawn, or as it lies in a
file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from keural.model import KeuralConfig, KeuralMoECausalLM, with_mean_rows
from keural.pretrained.stored_model import StoredNetwork, build_without_values
from keural.pretrained.weights import unfused
from keural.train.processes.modes import share_of

_ATEN = torch.ops.aten
_DRAWS = {_ATEN.normal_.default, _ATEN.uniform_.default, _ATEN.fill_.Scalar, _ATEN.zero_.default}
"""Operations by which a network gets its first values."""
Parts = dict[str, Tensor]
"""Values by the parameter's name, float32 on the CPU."""


@dataclass(frozen=True)
class Share:
    """Which parts are a rank's: the `index`-th of `number`, see `share_of`."""

    index: int
    number: int
    expert_parallel: int = 1

    def region(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where in a parameter the part lies."""
        return share_of(shape, self.index, self.number, self.expert_parallel)

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor, a view."""
        return tensor[self.region(tensor.shape)]


class _Drawing(TorchDispatchMode):
    """Lets a network be made as always, with the same numbers drawn in the same order, and keeps of every tensor that it draws one
    part: tensors that are made empty have no memory, and what is drawn into one is drawn into memory that is given back.
    """

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share
        self.drawn: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is _ATEN.empty.memory_format:
            return torch.empty(*args, **kwargs | {"device": "meta"})
        if function in _DRAWS and args[0].is_meta:
            whole = torch.empty(args[0].shape, dtype=args[0].dtype)
            function(whole, *args[1:], **kwargs)
            self.drawn[_memory(args[0])] = self.share.of(whole).clone()
            return args[0]
        return function(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    """Tells tensors apart by the memory that they have, or would have."""
    return int(tensor.untyped_storage()._cdata)


def drawn_parts(config: KeuralConfig, seed: int, share: Share) -> tuple[KeuralMoECausalLM, Parts]:
    """A network of random weights without memory, and this share of the weights that `seed` draws."""
    with torch.random.fork_rng(devices=[]), _Drawing(share) as drawing:
        torch.manual_seed(seed)
        model = KeuralMoECausalLM(config)
    parts = {
        name: drawing.drawn[_memory(parameter)] if parameter.is_meta else share.of(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                setattr(module, name, nn.Parameter(parameter.detach().to("meta")))
    model.tie_weights()
    return model, parts


def read_parts(stored: StoredNetwork, config: KeuralConfig, share: Share) -> tuple[KeuralMoECausalLM, Parts]:
    """The network of `config` without memory, and this share of the stored weights. Rows of the vocabulary that are not stored are
    the mean of those that are.
    """
    model = build_without_values(stored, config)
    return model, {name: _read_part(stored, name, parameter, share) for name, parameter in model.named_parameters()}


def _read_part(stored: StoredNetwork, name: str, parameter: nn.Parameter, share: Share) -> Tensor:
    """A part of a parameter, from those of its stored tensors that have something of it."""
    region = share.region(parameter.shape)
    part = torch.empty([piece.stop - piece.start for piece in region])
    for stored_name, place in unfused(name, parameter.detach()):
        begins = [int(index) for index in np.unravel_index(int(place.storage_offset()), parameter.shape)]
        sizes = [1] * (parameter.ndim - place.ndim) + list(place.shape)
        within = list(_overlap(region, begins, sizes))
        if part.numel() == 0 or any(target.start >= target.stop for target, _ in within):
            continue
        values = stored.weights.read(stored_name).float()
        values = with_mean_rows(values, place.shape[0] - values.shape[0]).view(sizes)  # of a vocabulary that grows
        part[tuple(target for target, _ in within)] = values[tuple(source for _, source in within)]
    return part


def _overlap(region: tuple[slice, ...], begins: list[int], sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """In each dimension what a region and a tensor that begins there share: as a place in the region, and one in the tensor."""
    for piece, begin, size in zip(region, begins, sizes, strict=True):
        first, last = max(piece.start, begin), min(piece.stop, begin + size)
        yield slice(first - piece.start, last - piece.start), slice(first - begin, last - begin)


def fill(policy: nn.Module, model: nn.Module, parts: Parts, device: torch.device) -> None:
    """Give a sharded `policy` around `model` memory on `device`, and its parameters their values; `parts` is empty afterwards."""
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in policy.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            local: Any = parameter
            part = parts.pop(name)
            assert local.to_local().numel() == part.numel() == prod(part.shape), name
            local.to_local().copy_(part)
