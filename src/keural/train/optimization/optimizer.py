"""AdamW or Muon over float32 master weights, with weight decay on matrices only.

In: a model and the stage's settings. Out: an optimizer whose state exists from the start, so that a checkpoint has the same tensors
at every step: `torch.optim.AdamW` over float32 parameters (plain or sharded; for `published` over bfloat16 ones),
`HalfMomentAdamW` over float32 ones, `Muon` over the layers' matrices with one of them over the rest, or `SplitAdamW` over bfloat16
parameters and remainders.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from keural.recipe import TrainSpec
from keural.train.optimization.half_moments import HalfMomentAdamW
from keural.train.optimization.muon import MOMENTUM, Muon, split_by_optimizer
from keural.train.optimization.split import SplitAdamW, halve, wide_norm
from keural.train.processes.modes import scale_block

T = TypeVar("T", bound=Tensor)

MOMENTS = ("exp_avg", "exp_avg_sq")

Optimizer = torch.optim.AdamW | Muon | SplitAdamW


def is_decayed(parameter: Tensor) -> bool:
    """Whether weight decay applies: to every matrix, never to a norm's gain.

    Matrices are the projections, the routers, the fused experts (3-D) and the embedding. The embedding is tied to the head and
    so is an output projection too; leaving it out would let the logits' scale grow unchecked while every other matrix is held.
    """
    return parameter.ndim >= 2


def build_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.AdamW | Muon:
    """The optimizer that `spec` names, with its settings; the learning rate is set before every step."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    stored = torch.bfloat16 if spec.precision == "published" else torch.float32
    assert all(parameter.dtype == stored for _, parameter in named), "master weights are float32"
    matrices, others = split_by_optimizer(named) if spec.optimizer == "muon" else ([], named)
    adamw = _adamw([parameter for _, parameter in others], spec)
    optimizer = Muon(matrices, spec.muon, spec.weight_decay, adamw) if matrices else adamw
    set_step(optimizer, 0)
    return optimizer


def _adamw(parameters: Sequence[nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    kind = HalfMomentAdamW if spec.precision == "fp32-bf16m" else torch.optim.AdamW
    groups = [
        {"params": [p for p in together if is_decayed(p) is decayed], "weight_decay": spec.weight_decay if decayed else 0.0}
        for together in by_mesh(parameters)
        for decayed in (True, False)
    ]
    return kind(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        fused=True,
    )


def build_split_optimizer(
    model: nn.Module, spec: TrainSpec, device: torch.device, parts: dict[str, Tensor] | None = None
) -> SplitAdamW:
    """The same for `train.precision: split` and `split-host`.

    The model, float32 on the CPU, is on `device` afterwards, its matrices in bfloat16 and the routers in float32; a sharded one is
    there already (`stored_in_halves`), and `parts`, which is empty afterwards, has this rank's float32 values by name.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    halves = {id(parameter) for parameter in stored_in_halves(model).values()}
    masters: Iterable[Tensor]
    if parts:
        masters = (parts.pop(name) for name in trained)
    else:
        masters = (halve(parameter, device, id(parameter) in halves) for parameter in trained.values())
    return SplitAdamW(
        trained.values(),
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        host=spec.precision == "split-host",
        masters=masters,
        is_decayed=is_decayed,
        block_of=lambda parameter: scale_block(parameter.shape) if parameter.dtype == torch.bfloat16 else 1,
    )


def stored_in_halves(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `split` keeps in bfloat16 and a remainder: all matrices but the routers."""
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("gate.weight")}


def set_step(optimizer: Optimizer, step: int) -> None:
    """Say that `step` steps were taken, and create moments (zero) where there are none yet."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.steps = step
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(step), device=parameter.device)
            for name in moments(optimizer, group):
                state.setdefault(name, torch.zeros_like(parameter))


def moments(optimizer: torch.optim.AdamW | Muon, group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the running means that the optimizer keeps of the parameters of one of its groups."""
    return (MOMENTUM,) if isinstance(optimizer, Muon) and optimizer.is_of_matrices(group) else MOMENTS


def forget(optimizer: Optimizer) -> None:
    """Set all moments to zero, and the number of steps taken."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.forget()
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for name in moments(optimizer, group):
                    optimizer.state[parameter][name].zero_()
        set_step(optimizer, 0)


def state_tensors(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """What a checkpoint keeps beside the parameters, sharing memory with the optimizer: `<moment>.<name>`, for AdamW `exp_avg` and
    `exp_avg_sq`, for Muon `momentum_buffer`; or what `SplitAdamW.state_tensors` gives.
    """
    if isinstance(optimizer, SplitAdamW):
        return optimizer.state_tensors(names)
    kept = {parameter: moments(optimizer, group) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment] for parameter, name in names.items() for moment in kept[parameter]
    }


def take_step(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], learning_rate: float, norm: Tensor, clip_norm: float
) -> None:
    """Change the parameters by their gradients, whose common norm is `norm`, scaled down where it is larger than `clip_norm`."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.step(learning_rate, clip_norm, norm)
        return
    clip_gradients(parameters, norm, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def leave_out_step(optimizer: Optimizer) -> None:
    """Count a step that is not taken: weights and moments stay, later steps are those that they would have been."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.steps += 1
        return
    for state in optimizer.state.values():
        state["step"] += 1


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, of whole tensors even where they are sharded over ranks; a scalar, the same on all
    ranks. Gradients in bfloat16 are summed in float32.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(gradient.dtype == torch.bfloat16 for gradient in gradients) or len(by_mesh(gradients)) > 1:
        return _wide_norm_of_all(gradients)
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Tensors that are sharded over the same ranks in the same way together: not every operation on a list takes others."""
    found: dict[DeviceMesh | None, list[T]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(found.values())


def _wide_norm_of_all(gradients: Sequence[Tensor]) -> Tensor:
    """`wide_norm` of whole tensors: the squares of the parts are added up over the ranks among which a copy is divided."""
    return wide_norm([_wide_norm_of_parts(together) for together in by_mesh(gradients)])


def _wide_norm_of_parts(gradients: Sequence[Tensor]) -> Tensor:
    squares = wide_norm(gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients).square()
    first = gradients[0]
    if isinstance(first, DTensor):
        for dimension, placement in enumerate(first.placements):
            if not placement.is_replicate():
                dist.all_reduce(squares, group=first.device_mesh.get_group(dimension))
    return squares.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, maximum: float) -> None:
    """Scale all gradients by one factor so that their common norm, now `norm`, does not exceed `maximum`."""
    for together in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(together, maximum, norm)
