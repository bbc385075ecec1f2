"""A sharded model's weights, whole again one at a time: for whoever writes them on rank 0, without all of them in its memory.

In: a model, and what writes its weights. Out: what that gives. The other ranks take part in the gathering, tensor by tensor in the
model's order, and hold nothing of it.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keural.pretrained.weights import TensorInfo, Weights, unfused
from keural.train.processes.parallel import reshard
from keural.train.processes.ranks import Ranks

T = TypeVar("T")


def with_gathered(model: nn.Module, ranks: Ranks, write: Callable[[Weights], T]) -> T:
    """Call `write` on rank 0 with the model's weights as a model directory names them, to be read in their order, and give its
    (picklable) result, or its `UserError`, to every rank. Every rank must call it.
    """
    reshard(model)
    gathering = _Gathering(model)
    if not ranks.is_main:
        gathering.rest()

    def written() -> T:
        try:
            return write(gathering.weights)
        finally:
            gathering.rest()  # the others wait in it

    return ranks.on_main(written)


class _Gathering:
    """Where in a model's parameters the ranks are."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.named_parameters())  # a tied head, being the embedding again, is not among them
        self._at = 0
        self._held: dict[str, Tensor] = {}
        infos = {}
        for name, parameter in self._parameters:
            shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            infos.update({stored: TensorInfo(tuple(part.shape), part.dtype) for stored, part in unfused(name, shape)})
        self.weights = Weights(infos, self._read)

    def rest(self) -> None:
        """Take part in what is left."""
        while self._at < len(self._parameters):
            self._next()

    def _read(self, name: str) -> Tensor:
        while name not in self._held:
            assert self._at < len(self._parameters), f"{name} was asked for out of order"
            self._next()
        return self._held[name]

    def _next(self) -> None:
        name, parameter = self._parameters[self._at]
        self._at += 1
        self._held = {}  # before there is another
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        self._held = dict(unfused(name, value.cpu()))
