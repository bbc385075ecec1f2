"""AdamW over float32 master weights, with weight decay on matrices only.

In: a model's named parameters (plain or sharded) and the stage's settings. Out: a `torch.optim.AdamW` whose moments exist from
the start, so that a checkpoint has the same tensors at every step.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keural.recipe import TrainSpec

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_decayed(parameter: Tensor) -> bool:
    """Whether weight decay applies: to every matrix, never to a norm's gain.

    Matrices are the projections, the routers, the fused experts (3-D) and the embedding. The embedding is tied to the head and
    so is an output projection too; leaving it out would let the logits' scale grow unchecked while every other matrix is held.
    """
    return parameter.ndim >= 2


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW with the betas, epsilon and weight decay of `spec`; the learning rate is set before every step."""
    parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in parameters), "master weights are float32"
    groups = [
        {"params": [p for p in parameters if is_decayed(p)], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        fused=True,
    )
    set_step(optimizer, 0)
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Say that `step` steps were taken, and create moments (zero) where there are none yet."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(step), device=parameter.device)
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(parameter))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, of whole tensors even where they are sharded over ranks; a scalar, the same on all
    ranks.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, maximum: float) -> None:
    """Scale all gradients by one factor so that their common norm, now `norm`, does not exceed `maximum`."""
    nn.utils.clip_grads_with_norm_(parameters, maximum, norm)
