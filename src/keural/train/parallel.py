"""Ranks and sharding: one process or many, from outside the model.

In: torchrun's environment and a `Policy` on one process. Out: the process group, the sharded policy, whole state dicts again.
The order is fixed: activation checkpointing, then compilation per layer, then FSDP2. One process without torchrun uses none of
`torch.distributed`.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.recipe import TrainSpec

T = TypeVar("T")
TIMEOUT = datetime.timedelta(hours=6)
"""Rank 0 tokenises corpora and hashes checkpoints while the others wait for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, the same on each; it replaces the tensor's values."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and give its (picklable) result, or its `UserError`, to every rank."""
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]


def pick_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def session() -> Iterator[Ranks]:
    """The ranks of this run, from torchrun's environment; inside another session, that one's. The process group ends with the
    block.
    """
    world, device = int(os.environ.get("WORLD_SIZE", "1")), pick_device()
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), world, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()


def experts_implementation(device: torch.device, compiled: bool) -> str:
    """The fastest way to run the experts in training: one grouped product on an accelerator, expert by expert on a CPU.

    Compiled layers need the grouped product everywhere: the loop's sizes would break the graph.
    """
    return "grouped_mm" if device.type == "cuda" or compiled else "eager"


def prepare_layers(model: KeuralMoECausalLM, spec: TrainSpec) -> None:
    """Activation checkpointing and compilation of every decoder layer, in this order."""
    if spec.gradient_checkpointing:
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
    norm.

    Gradients are summed, not averaged: the losses are already divided by global counts. With `compute_dtype` bfloat16 the
    gathered weights are bfloat16; master weights and the reduction of gradients stay float32.
    """
    if ranks.world == 1:
        return
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    compute = torch.bfloat16 if spec.compute_dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
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
