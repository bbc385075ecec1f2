"""A dense Llama-shaped model that is to become a mixture of experts: what of it the recipe's network cannot be.

In: a directory with `config.json` and safetensors, a `KeuralConfig`. Out: a `DenseModel`, and a line for everything in which the
two networks differ: sizes, windows, rotary embeddings, settings that are not known, tensors without a place (biases, norms of
queries and keys, a head of its own). Nothing is guessed: what is not known to leave the logits as they are is named.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keural.convert.foreign_checkpoint import Checkpoint, open_checkpoint
from keural.errors import UserError, listed
from keural.model import KeuralConfig
from keural.model.configuration_keural import SLIDING_ATTENTION
from keural.pretrained.tensor_names import EMBEDDING, HEAD
from keural.pretrained.weights import Weights

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of dense models whose layers are attention and one gated feed-forward network, each behind an RMS norm."""
_SAME = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "hidden_act",
)
"""Fields of the same name and meaning, without which the logits would be others."""
_ASIDE = frozenset(
    {
        *(
            "architectures",
            "auto_map",
            "dtype",
            "torch_dtype",
            "transformers_version",
            "model_type",
            "use_cache",
            "initializer_range",
        ),
        *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states"),
        *("return_dict", "is_encoder_decoder", "initializer_range", "id2label", "label2id", "problem_type", "vocab_size"),
        *("max_position_embeddings", "head_dim", "tie_word_embeddings", "sliding_window", "layer_types", "rope_parameters"),
        *(
            "chunk_size_feed_forward",
            "rope_theta",
            "use_sliding_window",
            "max_window_layers",
            "_name_or_path",
            "attn_implementation",
        ),
    }
)
"""Keys that say nothing of the network, or that are looked at one by one."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (None, 0, 1),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}
"""Keys that would change the network, and the values with which they do not."""


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint that is open for reading, and what its configuration says."""

    directory: Path
    checkpoint: Checkpoint
    values: Mapping[str, Any]

    @property
    def weights(self) -> Weights:
        """Under the names that the files have."""
        return self.checkpoint.weights

    def integer(self, name: str) -> int:
        """A size of its configuration. Raises `UserError` when it is none."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.directory}: {name} in its configuration must be a whole number above 0, got {value!r:.40}")
        return value


def open_dense(source: Path) -> DenseModel:
    """The dense model in a directory. Raises `UserError` when it is of another kind, or not whole."""
    checkpoint = open_checkpoint(source)
    values = checkpoint.config
    if values is None:
        raise UserError(f"{source}: no config.json came with the weights; a dense model cannot be read without one")
    kind = values.get("model_type")
    if kind not in KINDS:
        raise UserError(
            f"{source}: is a {kind!r:.40} model; a mixture of experts can be started from a dense {', '.join(KINDS[:-1])} or "
            f"{KINDS[-1]}"
        )
    return DenseModel(source, checkpoint, values)


def problems(dense: DenseModel, config: KeuralConfig) -> list[str]:
    """All that keeps the dense model from being the recipe's network with one expert's work done; empty when nothing does."""
    return [*_differences(dense, config), *_unknown(dense), *_leftover(dense, config)]


def _differences(dense: DenseModel, config: KeuralConfig) -> list[str]:
    """Fields in which the dense network is not the recipe's, as `model.KEY` of a recipe, with both values."""
    defaults = {"hidden_act": "silu", "num_key_value_heads": dense.values.get("num_attention_heads")}
    told = []
    for name in _SAME:
        there = dense.values.get(name, defaults.get(name))
        if there != getattr(config, name):
            key = f"model.{name}" if name != "hidden_act" else name
            told.append(f"{key} is {there!r:.40} there and {getattr(config, name)} in the recipe")
    heads, width = dense.values.get("num_attention_heads"), dense.values.get("hidden_size")
    derived = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else None
    head_dim = dense.values.get("head_dim") or derived
    if head_dim != config.head_dim:
        told.append(f"model.head_dim is {head_dim!r:.40} there and {config.head_dim} in the recipe")
    return [*told, *_rotary(dense, config), *_windows(dense, config)]


def _rotary(dense: DenseModel, config: KeuralConfig) -> list[str]:
    given = dense.values.get("rope_parameters")
    parameters = given if isinstance(given, Mapping) else {}
    kind = parameters.get("rope_type", "default")
    theta = parameters.get("rope_theta", dense.values.get("rope_theta", 10_000.0))
    told = [] if kind == "default" else [f"its rotary embedding is of kind {kind!r:.40}, and the network turns by plain ones"]
    if parameters.get("partial_rotary_factor", 1) != 1:
        told.append("it turns a part of each head only")
    if theta != config.rope_parameters["rope_theta"]:
        told.append(f"model.rope_theta is {theta!r:.40} there and {config.rope_parameters['rope_theta']} in the recipe")
    return told


def _windows(dense: DenseModel, config: KeuralConfig) -> list[str]:
    """Layers that would see another number of keys; a window as long as the context is none."""
    context = config.max_position_embeddings
    ours = [min(config.sliding_window or context, context) if kind == SLIDING_ATTENTION else context for kind in config.layer_types]
    kinds = dense.values.get("layer_types")
    qwen = dense.values["model_type"] in ("qwen2", "qwen3")  # which slide only where they say so, and in their last layers
    window = dense.values.get("sliding_window") if dense.values.get("use_sliding_window", not qwen) else None
    first = dense.values.get("max_window_layers", 28) if qwen else 0
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        return [f"its sliding_window is {window!r:.40}"]
    if not isinstance(first, int):
        return [f"its max_window_layers is {first!r:.40}"]
    if isinstance(kinds, list) and len(kinds) == len(ours):
        slides = [kind == SLIDING_ATTENTION for kind in kinds]
    else:
        slides = [window is not None and layer >= first for layer in range(len(ours))]
    theirs = [min(window, context) if window is not None and sliding else context for sliding in slides]
    other = [layer for layer, (one, two) in enumerate(zip(theirs, ours, strict=True)) if one != two]
    if not other:
        return []
    layer = other[0]
    advice = f" (model.sliding_window={context} lets every layer see all)" if set(theirs) == {context} else ""
    return [
        f"layer {layer} sees {theirs[layer]:,} keys there and {ours[layer]:,} in the recipe{advice}, {len(other)} layers of "
        f"{len(ours)} differ"
    ]


def _unknown(dense: DenseModel) -> list[str]:
    """Settings that are not known to leave the network as it is."""
    known = frozenset(_SAME) | _ASIDE
    odd = [
        f"{key} = {value!r:.40}"
        for key, value in dense.values.items()
        if key not in known and not (key in _NEUTRAL and value in _NEUTRAL[key])
    ]
    return [f"its configuration has settings that this network does not know: {listed(odd)}"] if odd else []


def _leftover(dense: DenseModel, config: KeuralConfig) -> list[str]:
    """Tensors that are missing, of another shape, or that have no place in the network; a bias of zeros needs none."""
    infos = dense.weights.infos
    wanted = {name: shape for name, shape in _sources(config).items() if name != EMBEDDING}
    told = []
    if missing := [name for name in (EMBEDDING, *wanted) if name not in infos]:
        told.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    if shapes := [
        f"{name} {list(infos[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in infos and infos[name].shape != shape
    ]:
        told.append(f"{len(shapes)} tensors are of another shape: {listed(shapes)}")
    spare = [name for name in infos if name not in wanted and name != EMBEDDING]
    if odd := [name for name in spare if not _means_nothing(dense, name)]:
        told.append(f"{len(odd)} tensors have no place in the network: {listed(odd)}")
    if EMBEDDING in infos and infos[EMBEDDING].shape != (dense.values.get("vocab_size"), config.hidden_size):
        told.append(f"{EMBEDDING} is {list(infos[EMBEDDING].shape)}, which its configuration does not say")
    if dense.values.get("tie_word_embeddings", False) is False and HEAD not in infos:
        told.append(f"its head is its own and {HEAD} is missing")
    return told


def _means_nothing(dense: DenseModel, name: str) -> bool:
    """Whether a tensor that the network has no place for changes nothing: a bias of zeros, or a head that is the embedding."""
    if name == HEAD:
        infos = dense.weights.infos
        same = EMBEDDING in infos and infos[name].shape == infos[EMBEDDING].shape
        return same and torch.equal(dense.weights.read(name), dense.weights.read(EMBEDDING))
    if name.endswith(".rotary_emb.inv_freq"):
        return True  # what the configuration says, kept by early versions of transformers
    return name.endswith(".bias") and not dense.weights.read(name).any()


def _sources(config: KeuralConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the dense model's tensors."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    assert head is not None
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    block = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    layers = range(config.num_hidden_layers)
    named = {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in block.items()}
    return {EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,), **named}
