"""What of a model is trained, and what stays as it is.

In: a model and the stage's settings. Out: parameters that take gradients, and those that take none. What is frozen gets no
gradient, no moments, no weight decay and no place in checkpoints: it is there again whenever the stage starts, and a digest says
that it is the same.
"""

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keural.pretrained.weights import data_bytes
from keural.recipe import RouterSpec

ROUTER = "gate.weight"
"""How the names of the routers' weights end."""


def freeze(model: nn.Module, router: RouterSpec) -> str:
    """Take what the stage leaves alone out of training; returns a digest of it, empty where all is trained."""
    take_out(model, router)
    return frozen_digest(model)


def take_out(model: nn.Module, router: RouterSpec) -> None:
    """Take what the stage leaves alone out of training; it need not have its values yet."""
    for name, parameter in model.named_parameters():
        if router.freeze and name.endswith(ROUTER):
            parameter.requires_grad_(False)


def frozen_digest(model: nn.Module) -> str:
    """A digest of what is not trained, empty where all is. Where it is sharded every rank must call it."""
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in frozen.items()}
    return digest(whole) if whole else ""


def trained_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that are trained, with their names."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_trained(model: nn.Module) -> int:
    """How many numbers are trained, of all ranks together."""
    return sum(parameter.numel() for parameter in trained_parameters(model))


def count_all(model: nn.Module) -> int:
    """How many numbers the model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, type, shape and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(data_bytes(tensor))
    return found.hexdigest()
