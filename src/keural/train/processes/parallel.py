"""Ranks and sharding: one process or many, from outside the model.

In: torchrun's environment and a `Policy` on one process. Out: the process group, the sharded policy, whole state dicts again.
The order is fixed: activation checkpointing, then compilation per layer, then FSDP2. One process without torchrun uses none of
`torch.distributed`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.recipe import StageSpec, TrainSpec
from keural.train.processes.modes import sharded_dimension, why_not_on
from keural.train.processes.ranks import Ranks


def check_ranks(stage: StageSpec, world: int) -> None:
    """Refuse what cannot be sharded. Raises `UserError`."""
    if (reason := why_not_on(stage, world)) is not None:
        raise UserError(reason)


def experts_implementation(device: torch.device, compiled: bool) -> str:
    """The fastest way to run the experts in training: one grouped product on an accelerator, expert by expert on a CPU.

    Compiled layers need the grouped product everywhere: the loop's sizes would break the graph.
    """
    return "grouped_mm" if device.type == "cuda" or compiled else "eager"


def prepare_layers(model: KeuralMoECausalLM, spec: TrainSpec) -> None:
    """Activation checkpointing and compilation of every decoder layer, in this order."""
    if spec.recompute == "full":
        renamed = hasattr(model, "activation_checkpointing_enable")  # from transformers 5.23 on
        enable: Any = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if spec.compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for layer in model.model.layers:
            compile_layer(layer)


def compile_layer(layer: Any) -> None:
    """Compile what a decoder layer consists of, each part as one graph: the norms, the attention and the experts.

    The router and the additions stay outside, and so do the hooks that record router logits: inside they would break the graph,
    and under activation checkpointing leave the whole layer uncompiled without a word.
    """
    for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp.experts):
        part.forward = torch.compile(part.forward, fullgraph=True)


def shard(policy: nn.Module, model: KeuralMoECausalLM, spec: TrainSpec, ranks: Ranks) -> None:
    """Shard `policy`, which holds `model`, over all ranks with FSDP2: one group per decoder layer, one for embedding, head and
    norm. A CPU's weights come to the device group by group, so that it never holds the whole model.

    Each tensor is divided along its first dimension where that gives nearly equal parts, else along another one: the experts of a
    layer, on more ranks than there are experts. Gradients are summed, not averaged: the losses are already divided by global
    counts. With `compute_dtype` bfloat16 the gathered weights are bfloat16; master weights and the reduction of gradients stay
    float32.
    """
    if ranks.world == 1:
        return
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    compute = torch.bfloat16 if spec.compute_dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(sharded_dimension(parameter.shape, ranks.world))

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, shard_placement_fn=placement)
    fully_shard(policy, mesh=mesh, mp_policy=precision, shard_placement_fn=placement)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for buffer in policy.buffers():
        dist.broadcast(buffer, src=0)


def reshard(policy: nn.Module) -> None:
    """Give back weights that a forward pass without a backward pass has left gathered."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights, whole and on the CPU, on rank 0; None on the other ranks. Every rank must call it.

    A tied head, being the embedding again, is left out.
    """
    reshard(model)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main:
            weights[name] = value.cpu().clone()
    return weights if is_main else None
