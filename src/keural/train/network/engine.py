"""The training engine behind a `Policy`: the forward pass by `keural.train.network.block` instead of by the model's own layers.

In: a model and a micro-batch. Out: what the policy gives. The numbers are those of the model's layers; dtypes are stated instead of
left to autocast, and what the backward pass computes again is chosen layer by layer (`train.recompute`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.recipe import TrainSpec
from keural.train.losses import Weighing
from keural.train.micro_batches import MicroBatch
from keural.train.network.attention import choose_attention, packing
from keural.train.network.block import BlockWeights, network_of, settings_of, weights_of, windows_of
from keural.train.network.head import label_logprobs
from keural.train.network.layers import Visit, forward
from keural.train.network.policy import PolicyOutput
from keural.train.processes.expert_parallel import expert_group
from keural.train.processes.parallel import gather_wide


@dataclass(frozen=True)
class Engine:
    """How a forward pass is computed."""

    dtype: torch.dtype
    """Of the residual stream and the matrix products."""
    recompute: str | tuple[str, ...]
    """Of every layer, or of each: keys of `keural.train.network.recompute.RECOMPUTE`."""
    compiled: bool
    attention: str
    """A key of `keural.train.network.attention.ATTENTION`."""
    experts: str
    """A key of `keural.train.network.experts.GROUPED`."""
    uniform: bool
    """See `Objective.uniform`."""

    def __call__(
        self, model: KeuralMoECausalLM, micro: MicroBatch, with_labels: bool, weighing: Weighing | None = None
    ) -> PolicyOutput:
        """Run packed rows ``[rows, T]``; without labels the head is not used, and by `weighing` once."""
        config = model.config
        settings, modes = settings_of(config, self.attention, self.experts), self.recompute
        modes = (modes,) * config.num_hidden_layers if isinstance(modes, str) else modes
        packed = packing(torch.from_numpy(micro.positions), micro.input_ids.device)
        settings = settings._replace(expert_group=expert_group(model))
        gather_wide(model)
        network, ids = network_of(model), micro.input_ids.flatten()
        noise = None if micro.noise is None else micro.noise.flatten(0, 1)
        rest = (windows_of(config), settings, self.dtype, modes, self.compiled, noise, visits_of(model))
        hidden, logits = forward(network, ids, packed, *rest)
        if not with_labels:
            return PolicyOutput(torch.zeros(micro.input_ids.shape, device=hidden.device), logits)
        labels = micro.labels.flatten()
        logprobs = label_logprobs(hidden, network.embed_tokens, labels, uniform=self.uniform, weighing=weighing)
        return PolicyOutput(logprobs.view_as(micro.labels).clone(), logits)  # a view loses what sharding hooks onto it


def visits_of(model: KeuralMoECausalLM) -> list[Visit] | None:
    """How the weights of each layer are had while it runs, where they are sharded; None where they are there."""
    layers: list[Any] = list(model.model.layers)
    if not isinstance(layers[0], FSDPModule):
        return None
    return [partial(_within, layer) for layer in layers]


def _within(layer: Any, function: Callable[[Tensor, BlockWeights], Tensor], hidden: Tensor) -> Tensor:
    """`function` as the forward pass of `layer`, so that what gathers its weights, and lets them go, happens around it."""
    modules = [module for module in (layer, layer.mlp.experts) if isinstance(module, FSDPModule)]  # experts divided by themselves
    return _through(modules, lambda hidden: function(hidden, local_experts(weights_of(layer))), hidden)


def _through(modules: list[Any], function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`function` as the forward pass of modules, one within another."""
    if not modules:
        return function(hidden)
    module, *inner = modules
    module.forward = partial(_through, inner, function)
    try:
        found: Tensor = module(hidden)
    finally:
        del module.forward
    return found


def local_experts(weights: BlockWeights) -> BlockWeights:
    """The same with this process's experts alone, where they are divided."""
    own = {
        name: tensor.to_local() for name in ("gate_up_proj", "down_proj") if isinstance(tensor := getattr(weights, name), DTensor)
    }
    return weights._replace(**own)


def engine_for(
    spec: TrainSpec, config: KeuralConfig, device: torch.device, uniform: bool, modes: tuple[str, ...] | None = None
) -> Engine:
    """The engine for a stage on this device; with `modes` for its layers where the recipe has none for all.

    Expert by expert on a CPU, where that is faster, and in float32, for which accelerators and compiled graphs have no grouped
    product.
    """
    dtype = getattr(torch, spec.compute_dtype)
    assert config.head_dim is not None  # filled in by the configuration
    attention = choose_attention(device, dtype, config.head_dim, spec.compile)
    grouped = dtype == torch.bfloat16 and (spec.compile or device.type == "cuda")
    if spec.compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return Engine(dtype, modes or spec.recompute, spec.compile, attention, "grouped_mm" if grouped else "loop", uniform)
