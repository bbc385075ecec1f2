"""One decoder layer as a pure function of tensors, and the network's forward pass made of it: what training computes.

In: the weights of a model (`network_of`), token ids and where their documents begin. Out: hidden states and the routers' logits.
The numbers are those of `KeuralDecoderLayer`. Every dtype is stated here instead of left to autocast: matrix products run in the
dtype of the hidden states, which is also that of the residual stream; norms, rotation, router, softmax and the sum over a token's
experts run in float32 (float64 stays float64). Norms' gains and routers may be stored in float32 beside bfloat16 matrices.

Letters: N = rows * T tokens, H hidden size, D head width, E experts, K of them per token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from keural.lora.layers import bare, beside
from keural.lora.targets import Factors
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.train.network.adapted_experts import adapted_mixture
from keural.train.network.attention import ATTENTION, Packing
from keural.train.network.experts import mixture, route
from keural.train.network.parallel_experts import parallel_mixture
from keural.train.network.recompute import recomputed


class BlockWeights(NamedTuple):
    """The weights of a decoder layer, named as in the model."""

    input_layernorm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor

    def computing_in(self, dtype: torch.dtype) -> "BlockWeights":
        """The same with matrices in `dtype`; the norms' gains and the router are widened where they are used."""
        return self._replace(
            q_proj=self.q_proj.to(dtype),
            k_proj=self.k_proj.to(dtype),
            v_proj=self.v_proj.to(dtype),
            o_proj=self.o_proj.to(dtype),
            gate_up_proj=self.gate_up_proj.to(dtype),
            down_proj=self.down_proj.to(dtype),
        )


class BlockAdapters(NamedTuple):
    """The low-rank adapters of a decoder layer, by the weight that they stand beside; None where there is none."""

    q_proj: Factors | None = None
    k_proj: Factors | None = None
    v_proj: Factors | None = None
    o_proj: Factors | None = None
    gate: Factors | None = None
    gate_up_proj: Factors | None = None
    down_proj: Factors | None = None


NO_ADAPTERS = BlockAdapters()


class Network(NamedTuple):
    """The weights of a whole model; the head is the embedding."""

    embed_tokens: Tensor
    blocks: tuple[BlockWeights, ...]
    norm: Tensor
    inv_freq: Tensor
    adapters: tuple[BlockAdapters, ...] = ()
    """Of each layer; empty where there are none."""


class BlockSettings(NamedTuple):
    """What is the same for all layers of a run, besides their weights."""

    head_dim: int
    top_k: int
    eps: float
    attention: str = "masked"
    experts: str = "grouped_mm"
    expert_group: ProcessGroup | None = None
    """The processes among which the experts are divided; None: each has all of them."""


def settings_of(config: KeuralConfig, attention: str = "masked", experts: str = "grouped_mm") -> BlockSettings:
    """The settings of a model."""
    assert config.head_dim is not None  # filled in by the configuration
    return BlockSettings(config.head_dim, config.num_experts_per_tok, config.rms_norm_eps, attention, experts)


def network_of(model: KeuralMoECausalLM) -> Network:
    """The model's own parameters, no copies: gradients arrive where the model's would."""
    decoder: Any = model.model
    blocks = tuple(weights_of(layer) for layer in decoder.layers)
    adapters = tuple(adapters_of(layer) for layer in decoder.layers)
    found = adapters if any(any(layer) for layer in adapters) else ()
    return Network(decoder.embed_tokens.weight, blocks, decoder.norm.weight, decoder.rotary_emb.inv_freq, found)


def weights_of(layer: Any) -> BlockWeights:
    """The parameters of a `KeuralDecoderLayer`."""
    attention, gate, experts = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    return BlockWeights(
        input_layernorm=layer.input_layernorm.weight,
        q_proj=bare(attention.q_proj).weight,
        k_proj=bare(attention.k_proj).weight,
        v_proj=bare(attention.v_proj).weight,
        o_proj=bare(attention.o_proj).weight,
        post_attention_layernorm=layer.post_attention_layernorm.weight,
        gate=bare(gate).weight,
        gate_up_proj=bare(experts).gate_up_proj,
        down_proj=bare(experts).down_proj,
    )


def adapters_of(layer: Any) -> BlockAdapters:
    """The adapters of a `KeuralDecoderLayer` that are switched on."""
    attention, experts = layer.self_attn, layer.mlp.experts
    return BlockAdapters(
        q_proj=beside(attention.q_proj),
        k_proj=beside(attention.k_proj),
        v_proj=beside(attention.v_proj),
        o_proj=beside(attention.o_proj),
        gate=beside(layer.mlp.gate),
        gate_up_proj=beside(experts, "gate_up_proj"),
        down_proj=beside(experts, "down_proj"),
    )


def linear(inputs: Tensor, weight: Tensor, adapter: Factors | None) -> Tensor:
    """``[N, in]`` to ``[N, out]`` by a matrix and the adapter beside it, in the dtype of the inputs."""
    found = F.linear(inputs, weight)
    if adapter is None:
        return found
    dtype = inputs.dtype
    return found + adapter.scaling * F.linear(F.linear(inputs, adapter.down.to(dtype)), adapter.up.to(dtype))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_norm(hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of ``[N, H]``, in the dtype of `hidden`."""
    wide = _wide(hidden)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(gain)).to(hidden.dtype)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn heads ``[N, heads, D]`` by angles ``[N, D / 2]``: dimension i pairs with i + D/2."""
    first, second = heads.to(cosines.dtype).chunk(2, -1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1).to(heads.dtype)


def angles(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, D / 2]``; computed in float32 as by the model, whatever `dtype` they are wanted in."""
    turned = positions[:, None].float() * inv_freq.float()
    return turned.cos().to(dtype), turned.sin().to(dtype)


def block(
    hidden: Tensor,
    weights: BlockWeights,
    cosines: Tensor,
    sines: Tensor,
    mask: Any,
    settings: BlockSettings,
    adapters: BlockAdapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """One decoder layer.

    Args:
        hidden: ``[N, H]``, the residual stream.
        weights: the layer's.
        cosines: ``[N, D / 2]``, float32, see `angles`.
        sines: likewise.
        mask: what the attention backend prepared for this kind of layer.
        settings: of the run.
        adapters: the layer's.

    Returns:
        The residual stream after the layer, and the router's logits ``[N, E]`` in float32.
    """
    weights = weights.computing_in(hidden.dtype)
    normed = rms_norm(hidden, weights.input_layernorm, settings.eps)
    query, key, value = (
        linear(normed, matrix, adapter).unflatten(-1, (-1, settings.head_dim))
        for matrix, adapter in (
            (weights.q_proj, adapters.q_proj),
            (weights.k_proj, adapters.k_proj),
            (weights.v_proj, adapters.v_proj),
        )
    )
    query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
    attended = ATTENTION[settings.attention].attend(query, key, value, mask)
    hidden = hidden + linear(attended.flatten(1), weights.o_proj, adapters.o_proj)
    normed = rms_norm(hidden, weights.post_attention_layernorm, settings.eps)
    router_logits = linear(_wide(normed), _wide(weights.gate), adapters.gate)
    top_k_weights, top_k_index = route(router_logits, settings.top_k)
    experts = (weights.gate_up_proj, weights.down_proj)
    if settings.expert_group is not None:
        mixed = parallel_mixture(normed, top_k_weights, top_k_index, *experts, settings.expert_group, settings.experts)
    elif adapters.gate_up_proj is None and adapters.down_proj is None:
        mixed = mixture(normed, top_k_weights, top_k_index, *experts, settings.experts)
    else:
        beside_experts = (adapters.gate_up_proj, adapters.down_proj)
        mixed = adapted_mixture(normed, top_k_weights, top_k_index, *experts, *beside_experts, settings.experts)
    return hidden + mixed, router_logits


Block = Callable[..., tuple[Tensor, Tensor]]
"""`block`, or what computes the same."""

Visit = Callable[[Callable[[Tensor, BlockWeights], Tensor], Tensor], Tensor]
"""A layer whose weights are there only while it is visited: `visit(function, hidden)` gives `function(hidden, weights)`."""


def _selective_block(*arguments: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = recomputed(block, "selective")(*arguments)
    return found


COMPILED: dict[str, Block] = {
    "none": torch.compile(block, fullgraph=True, dynamic=False),
    "selective": torch.compile(_selective_block, fullgraph=True, dynamic=False),
}
"""`block` as one graph, by what it keeps: all layers of a run share it, with one version per kind of mask. What is kept is decided
when the graph is made, so the choice of `selective` is part of it; `full` wraps the graph of `none`.
"""


def layer_for(recompute: str, compiled: bool) -> Block:
    """The layer under a mode of `keural.train.network.recompute.RECOMPUTE`."""
    if not compiled:
        return recomputed(block, recompute)
    return COMPILED["selective"] if recompute == "selective" else recomputed(COMPILED["none"], recompute)


def forward(
    network: Network,
    input_ids: Tensor,
    packed: Packing,
    windows: Sequence[int | None],
    settings: BlockSettings,
    dtype: torch.dtype,
    recompute: Sequence[str],
    compiled: bool = False,
    noise: Tensor | None = None,
    visits: Sequence[Visit] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The decoder over flattened rows.

    Args:
        network: the weights.
        input_ids: ``[N]``.
        packed: where the documents lie.
        windows: of each layer; None is full attention.
        settings: of the run.
        dtype: of the residual stream and the matrix products; matrices of another one are converted in every layer.
        recompute: of each layer, see `keural.train.network.recompute`.
        compiled: run each layer as one compiled graph.
        noise: ``[N, H]``, added to the embeddings; None: nothing.
        visits: of each layer, where its weights are not those of `network` (they are sharded); None: they are.

    Returns:
        Hidden states ``[N, H]`` after the final norm, and router logits ``[N, E]`` of each layer in float32.
    """
    backend = ATTENTION[settings.attention]
    masks = {window: backend.prepare(packed, window) for window in dict.fromkeys(windows)}
    cosines, sines = angles(packed.positions, network.inv_freq, torch.promote_types(dtype, torch.float32))
    embedded = F.embedding(input_ids, network.embed_tokens)
    hidden = (embedded if noise is None else embedded + noise).to(dtype)
    router_logits: list[Tensor] = []  # not among what a visit gives: their gradients would call for all layers' weights at once
    adapters = network.adapters or (NO_ADAPTERS,) * len(network.blocks)
    visits = visits or [partial(_at_hand, weights) for weights in network.blocks]
    for visit, beside_it, window, mode in zip(visits, adapters, windows, recompute, strict=True):
        layer = partial(_run, layer_for(mode, compiled), (cosines, sines, masks[window], settings, beside_it), router_logits)
        hidden = visit(layer, hidden)
    return rms_norm(hidden, network.norm, settings.eps), tuple(router_logits)


def _at_hand(weights: BlockWeights, function: Callable[[Tensor, BlockWeights], Tensor], hidden: Tensor) -> Tensor:
    return function(hidden, weights)


def _run(layer: Block, rest: tuple[Any, ...], router_logits: list[Tensor], hidden: Tensor, weights: BlockWeights) -> Tensor:
    hidden, logits = layer(hidden, weights, *rest)
    router_logits.append(logits)
    return hidden


def windows_of(config: KeuralConfig) -> tuple[int | None, ...]:
    """The window of each layer, None where it sees its whole document."""
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
