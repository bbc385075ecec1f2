"""Muon for the matrices of the layers, AdamW for everything else.

In: parameters with gradients. Out: changed parameters. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) steps
along the momentum of a matrix with all its singular values brought near 1, by five Newton-Schulz iterations. The step is scaled by
0.2 sqrt(max(rows, columns)), so that it is about as long as one of AdamW: one learning rate and one weight decay serve both (Liu et
al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982, section 2.2).

Matrices are the projections of attention and the experts, each expert one by itself, and its gate and its up projection, which lie
in one tensor, two. Embedding and head, the routers and the norms stay with AdamW. `torch.optim.Muon` takes no tensors of three
dimensions and computes in bfloat16 on every device; here experts are one batch of products, in float32 on a processor.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from keural.recipe import MuonSpec

MOMENTUM = "momentum_buffer"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's iteration: X <- a X + (b A + c A^2) X with A = X X^T."""
EPSILON = 1e-7
RMS = 0.2
"""Root mean square of an AdamW step in units of the learning rate, as Liu et al. found it."""
FUSED = "gate_up_proj"
"""How the names of tensors end that hold two matrices one below the other."""
OTHERS = ("embed_tokens.weight", "lm_head.weight", "gate.weight")
"""How the names of matrices end that AdamW trains."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains a parameter: a matrix, or a batch of them, inside a layer."""
    return parameter.ndim >= 2 and not name.endswith(OTHERS)


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """The matrices ``[.., rows, columns]`` with singular values near 1 (about 0.7 to 1.2), in `matrices`' type.

    Newton-Schulz in bfloat16 on an accelerator, in float32 elsewhere. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    X = matrices.reshape(-1, *matrices.shape[-2:]).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    X = X if wide else X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(iterations):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # sums within the products: no passes of their own
    found: Tensor = (X if wide else X.mT).to(matrices.dtype)
    return found.reshape(matrices.shape)


def step_direction(momentum: Tensor, parts: int, iterations: int) -> Tensor:
    """The step of a tensor ``[.., rows, columns]`` in units of the learning rate; it is `parts` matrices, one below the other."""
    *batch, rows, columns = momentum.shape
    matrices = momentum.view(*batch, parts, rows // parts, columns)
    scale = RMS * math.sqrt(max(matrices.shape[-2:]))
    return (orthogonalized(matrices, iterations) * scale).reshape(momentum.shape)


class Muon(torch.optim.Optimizer):
    """Muon over the matrices that it is given, and `adamw` over what that one was given, as one optimizer.

    Groups and state of both are shared, so whoever sets learning rates or keeps state sees all of them. Sharded tensors are
    gathered for the iterations, each process doing all of them; the momentum stays sharded.

    Args:
        named: matrices by name.
        settings: of the recipe.
        weight_decay: as AdamW's: the weight shrinks by learning rate times this.
        adamw: of all other parameters.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], settings: MuonSpec, weight_decay: float, adamw: torch.optim.AdamW
    ) -> None:
        groups = [
            {"params": found, "parts": parts, "weight_decay": weight_decay, "lr": adamw.defaults["lr"]}
            for parts in (1, 2)
            if (found := [parameter for name, parameter in named if (2 if name.endswith(FUSED) else 1) == parts])
        ]
        super().__init__(groups, {})
        self.settings, self.adamw, self._matrices = settings, adamw, list(self.param_groups)
        self.param_groups = [*self._matrices, *adamw.param_groups]
        self.state = adamw.state

    def is_of_matrices(self, group: Mapping[str, Any]) -> bool:
        """Whether Muon trains a group's parameters, and not AdamW."""
        return any(group is each for each in self._matrices)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody gives a closure
        """Change all parameters by their gradients; those without one stay."""
        for group in self._matrices:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, group)
        self.adamw.step()

    def _change(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, momentum = parameter.grad, self.state[parameter][MOMENTUM]
        assert gradient is not None
        momentum.lerp_(gradient, 1 - self.settings.momentum)
        direction = gradient.lerp(momentum, self.settings.momentum)  # Nesterov
        if isinstance(direction, DTensor):
            whole = step_direction(direction.full_tensor(), group["parts"], self.settings.iterations)
            direction = distribute_tensor(whole, direction.device_mesh, direction.placements, src_data_rank=None)
        else:
            direction = step_direction(direction, group["parts"], self.settings.iterations)
        rate = group["lr"] * self.settings.lr_scale
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(direction, alpha=-rate)


def split_by_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """Named parameters that Muon trains, and the others."""
    found: tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]] = ([], [])
    for name, parameter in named:
        found[0 if is_hidden_matrix(name, parameter) else 1].append((name, parameter))
    return found
