"""Adapters around the layers of a network in memory: made, saved and switched off by PEFT, read here for the training engine.

In: a network. Out: the same network with PEFT's layers in it, whose adapters alone are trained; the factors that stand beside a
parameter; an adapter directory.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keural.files import atomic_directory, read_object, write_atomic, write_json
from keural.lora.directory import CONFIG
from keural.lora.targets import MODULES, PARAMETERS, Factors, factors_of
from keural.model import KeuralMoECausalLM
from keural.pretrained.directory import quiet_transformers
from keural.pretrained.lineage import write_record
from keural.recipe import ChatSpec, LoraSpec

_NAME = "default"
"""PEFT's name of the only adapter."""
README = """# Adapter

A LoRA adapter (rank {rank}, alpha {alpha}) of a Keural model, as PEFT reads it:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=True)
    model = PeftModel.from_pretrained(base, DIR)

`keural merge DIR --base BASE --to NEW` writes the whole model. `keural.json` names the base by the digest of its tensors.
"""


@dataclass(frozen=True)
class TrainedAdapter:
    """The adapter of a network in memory, and what it stands on."""

    peft_model: Any
    """PEFT's view of the network."""
    spec: LoraSpec
    base: Path
    """The model directory that the network was read from."""
    base_digest: str
    """`keural.lora.merge.weights_digest` of it."""


def adapt(model: KeuralMoECausalLM, spec: LoraSpec, seed: int, base: Path, base_digest: str) -> TrainedAdapter:
    """Put new adapters around the layers of a float32 network, in place; all else is frozen.

    The second factors are zero, so the network computes what it did before; the first ones depend on `seed` alone.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=sorted(name for target in spec.targets for name in MODULES[target]) or None,
        target_parameters=sorted(name for target in spec.targets for name in PARAMETERS[target]) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(seed)
        found = get_peft_model(model, config, adapter_name=_NAME)
    found.peft_config[_NAME].base_model_name_or_path = str(base)
    return TrainedAdapter(found, spec, base, base_digest)


def store_frozen(model: KeuralMoECausalLM, dtype: torch.dtype) -> None:
    """Keep the frozen matrices in `dtype`, in place; norms and routers stay as they are."""
    routers = {id(bare(layer.mlp.gate).weight) for layer in _layers(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim >= 2 and id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)


def _layers(model: KeuralMoECausalLM) -> Any:
    decoder: Any = model.model
    return decoder.layers


def beside(module: nn.Module, parameter: str = "weight") -> Factors | None:
    """The factors of a module's parameter in PEFT's layers around it, of gradients' own parameters; None without an adapter, and
    where adapters are switched off.
    """
    layer: Any = module
    while hasattr(layer, "base_layer"):
        if getattr(layer, "parameter_name", "weight") == parameter and not layer.disable_adapters:
            experts = getattr(bare(layer), parameter).shape[0] if getattr(bare(layer), parameter).ndim == 3 else None
            return factors_of(layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, experts, layer.scaling[_NAME])
        layer = layer.base_layer
    return None


def bare(module: nn.Module) -> Any:
    """The network's own module inside of PEFT's layers, or the module itself."""
    layer: Any = module
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside the block a network computes without its adapters, where it has some: it is the model that it was before."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "base_layer")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(out: Path, adapter: TrainedAdapter, lineage: Mapping[str, Any], chat: ChatSpec) -> Path:
    """Write the adapter directory, whole or not at all; PEFT writes configuration and factors. Replaces an earlier one."""
    spec = adapter.spec
    with quiet_transformers(), atomic_directory(out) as directory, warnings.catch_warnings(action="ignore"):
        adapter.peft_model.save_pretrained(str(directory), save_embedding_layers=False)
        values = read_object(directory / CONFIG)
        write_json(directory / CONFIG, {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()})
        write_atomic(directory / "README.md", README.format(rank=spec.rank, alpha=spec.alpha))
        about = {"base": adapter.base_digest, "rank": spec.rank, "alpha": spec.alpha, "targets": list(spec.targets)}
        write_record(directory, {**lineage, "adapter": about}, chat)
    return out
