"""`keural export --format granite`: the same weights as a native GraniteMoeSWA checkpoint, which needs no code of its own.

In: a `StoredModel`. Out: a directory that transformers, vLLM and SGLang load with their built-in class. GraniteMoeSWA is this
network plus two things that are made to vanish: an attention sink per head (an extra logit in the softmax, set so low that its
probability is zero) and four multipliers (set to 1, the one of attention to the usual 1/sqrt(D)).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteMoeSWAConfig

from keural.convert.carried import carried
from keural.convert.model_card import model_card
from keural.files import atomic_directory, check_new, write_atomic
from keural.model import KeuralConfig
from keural.pretrained.directory import DEFAULT_SHARD_BYTES, generation_config, quiet_transformers
from keural.pretrained.lineage import identity_of, write_record
from keural.pretrained.safetensors import write_shards
from keural.pretrained.stored_model import StoredModel
from keural.pretrained.weights import TensorInfo, Weights

SILENT_SINK = -1e4
"""A sink's logit: e to its power is zero in every precision, so the softmax is that of a model without sinks."""


def export_granite(
    model: StoredModel,
    out: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    license_id: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
    scores: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` as a GraniteMoeSWA checkpoint into the directory `out`; one layer's experts are in memory at a time.

    Args:
        model: what to write.
        out: must not exist, or be empty.
        shard_bytes: upper bound of one weight file, unless a single tensor is larger.
        license_id: for the model card.
        advance: told the bytes of every tensor that was read.
        scores: for the model card.

    Returns:
        `out`.

    Raises:
        UserError: for a model that the class cannot hold, too little disk, or an `out` that is not empty.
    """
    config = granite_config(model.config)
    weights = granite_weights(model.watched(advance))
    check_new(out, weights.nbytes)
    config.dtype = weights.infos["model.embed_tokens.weight"].dtype
    with quiet_transformers(), atomic_directory(out) as directory:
        sums = write_shards(directory, weights, shard_bytes)
        config.save_pretrained(directory)
        generation_config(model.config, model.chat, model.ends).save_pretrained(directory)
        model.tokenizer.save(directory)
        write_atomic(directory / "README.md", model_card(model, "granite", license_id, scores))
        origin = {"format": "granite", "exported_from": identity_of(model.directory)}
        write_record(directory, {**model.lineage, **origin}, model.chat, sums)
    return out


def granite_config(config: KeuralConfig) -> GraniteMoeSWAConfig:
    """The GraniteMoeSWA configuration of the same network. Raises `UserError` when there is none."""
    values = carried(config, "granite")
    assert config.head_dim is not None
    return GraniteMoeSWAConfig(
        **values,
        architectures=["GraniteMoeSWAForCausalLM"],
        shared_intermediate_size=0,
        attention_multiplier=config.head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )


def granite_weights(model: StoredModel) -> Weights:
    """The tensors of the GraniteMoeSWA checkpoint: experts fused, gate rows first, and a silent sink for every head."""
    config, stored = model.config, model.weights
    dtype = stored.infos["model.norm.weight"].dtype
    experts, inner, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
    readers: dict[str, Callable[[], Tensor]] = {}
    infos: dict[str, TensorInfo] = {}

    def add(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        infos[name], readers[name] = TensorInfo(shape, dtype), read

    for name, info in stored.infos.items():
        if ".mlp.experts." not in name:
            add(name.replace(".mlp.gate.", ".block_sparse_moe.router."), info.shape, lambda name=name: stored.read(name))  # type: ignore[misc]
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        sources = f"{block}.mlp.experts"
        add(
            f"{block}.self_attn.sinks",
            (config.num_attention_heads,),
            lambda: torch.full((config.num_attention_heads,), SILENT_SINK, dtype=dtype),
        )
        gate_up = [f"{sources}.{expert}.{half}_proj.weight" for expert in range(experts) for half in ("gate", "up")]
        down = [f"{sources}.{expert}.down_proj.weight" for expert in range(experts)]
        fused = f"{block}.block_sparse_moe.experts"
        add(f"{fused}.gate_up_proj", (experts, 2 * inner, hidden), _stacked(stored, gate_up, (experts, 2 * inner, hidden)))
        add(f"{fused}.down_proj", (experts, hidden, inner), _stacked(stored, down, (experts, hidden, inner)))
    return Weights(infos, lambda name: readers[name]())


def _stacked(stored: Weights, names: list[str], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Reads matrices one by one into one tensor of `shape`, which holds them one below the other."""

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=stored.infos[names[0]].dtype)
        for part, name in zip(whole.view(-1, shape[-1]).chunk(len(names)), names, strict=True):
            part.copy_(stored.read(name))
        return whole

    return read
