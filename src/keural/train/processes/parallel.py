"""Ranks and sharding: one process or many, from outside the model.

In: torchrun's environment and a `Policy` on one process. Out: the process group, the sharded policy, whole state dicts again.
The order is fixed: activation checkpointing, then compilation per layer, then FSDP2. One process without torchrun uses none of
`torch.distributed`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.recipe import StageSpec, TrainSpec
from keural.train.processes.expert_parallel import divide_experts, expert_mesh
from keural.train.processes.modes import ModelShape, sharded_dimension, shards_of, why_not_on, width_dimension
from keural.train.processes.ranks import Ranks


def check_ranks(stage: StageSpec, world: int, model: ModelShape) -> None:
    """Refuse what cannot be sharded. Raises `UserError`."""
    if (reason := why_not_on(stage, world, model)) is not None:
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


def shard(policy: Any, model: KeuralMoECausalLM, spec: TrainSpec, ranks: Ranks) -> None:
    """Shard `policy`, which holds `model`, over the ranks with FSDP2: one group per decoder layer, one for embedding and head. A
    CPU's weights come to the device group by group, so that it never holds the whole model.

    With `shard_over` fewer ranks than all share a copy of the weights, and as many copies are kept alike as there are such groups.
    Each tensor is divided along its first dimension where that gives nearly equal parts, else along another one: the experts of a
    layer, on more ranks than there are experts. Gradients are summed, not averaged: the losses are already divided by global
    counts. With `compute_dtype` bfloat16 the gathered weights are bfloat16; master weights and the reduction of gradients stay
    float32 (not in `published`). Under the engine norms and routers are gathered in float32, in a group of their own
    (`gather_wide`): there they are used in float32 on one process, too.

    With `expert_parallel` the experts are groups of their own: so many neighbours have other experts each, which are gathered and
    whose gradients are summed over the ranks that have the same ones, and never over others.
    """
    if ranks.world == 1:
        return
    shards = shards_of(spec, ranks.world)
    mesh = mesh_of(ranks, shards)
    compute = torch.bfloat16 if spec.compute_dtype == "bfloat16" else None

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(sharded_dimension(parameter.shape, shards))

    def width(parameter: nn.Parameter) -> Shard:
        dimension = width_dimension(parameter.shape, shards // spec.expert_parallel)
        assert dimension is not None, "check_ranks refuses such"
        return Shard(dimension)

    reduced = torch.bfloat16 if spec.precision == "published" else torch.float32

    def group(module: nn.Module | list[nn.Module], dtype: torch.dtype | None, **options: Any) -> None:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        fully_shard(module, **{"mesh": mesh, "mp_policy": precision, "shard_placement_fn": placement, **options})

    if policy.engine is not None:
        group(wide_modules(model), None, reshard_after_forward=False)
    experts = expert_mesh(ranks, shards, spec.expert_parallel) if spec.expert_parallel > 1 else None
    layers: list[Any] = list(model.model.layers)
    for layer in layers:
        if experts is not None:
            divide_experts(layer.mlp.experts, experts.among)
            group(layer.mlp.experts, compute, mesh=experts.of_each, shard_placement_fn=width)
        group(layer, compute)
    group(policy, compute)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for buffer in policy.buffers():
        dist.broadcast(buffer, src=0)


def mesh_of(ranks: Ranks, shards: int) -> DeviceMesh:
    """The ranks in order, `shards` neighbours sharing a copy of the weights."""
    if shards == ranks.world:
        return init_device_mesh(ranks.device.type, (ranks.world,))
    return init_device_mesh(ranks.device.type, (ranks.world // shards, shards), mesh_dim_names=("copy", "shard"))


def wide_modules(model: KeuralMoECausalLM) -> list[nn.Module]:
    """What the engine computes in float32: norms and routers; a millionth of the weights."""
    layers: list[Any] = list(model.model.layers)
    found = [module for layer in layers for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.gate)]
    return [*found, model.model.norm]


def gather_wide(model: KeuralMoECausalLM) -> None:
    """Have norms and routers whole, where they are sharded in a group of their own, until the end of the backward pass."""
    norm: Any = model.model.norm
    if isinstance(norm, FSDPModule):
        norm.unshard()


def reshard(policy: nn.Module) -> None:
    """Give back weights that a forward pass without a backward pass has left gathered."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
