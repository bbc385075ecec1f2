"""One decoder layer as a pure function of tensors: what training computes.

In: the weights of a model (`network_of`) and the residual stream. Out: the same after a layer, and the router's logits. The numbers
are those of `KeuralDecoderLayer`. Every dtype is stated here instead of left to autocast: matrix products run in the dtype of the
hidden states, which is also that of the residual stream; norms, rotation, router, softmax and the sum over a token's experts run in
float32 (float64 stays float64). Norms' gains and routers may be stored in float32 beside bfloat16 matrices.

Letters: N = rows * T tokens, H hidden size, D head width, E experts, K of them per token.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from keural.lora.layers import bare, beside
from keural.lora.targets import Factors
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.train.network.adapted_experts import adapted_mixture
from keural.train.network.attention import ATTENTION
from keural.train.network.experts import mixture, route
from keural.train.network.parallel_experts import parallel_mixture


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
        """The same with attention's matrices in `dtype`; the norms' gains and the router are widened where they are used."""
        return self._replace(
            q_proj=self.q_proj.to(dtype),
            k_proj=self.k_proj.to(dtype),
            v_proj=self.v_proj.to(dtype),
            o_proj=self.o_proj.to(dtype),
        )

    def experts_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both tensors of the experts in `dtype`."""
        return self.gate_up_proj.to(dtype), self.down_proj.to(dtype)


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


class BeforeExperts(NamedTuple):
    """A layer until its experts: the residual stream ``[N, H]``, what the experts get ``[N, H]``, and the router's logits
    ``[N, E]`` in float32.
    """

    hidden: Tensor
    normed: Tensor
    router_logits: Tensor


def before_experts(
    hidden: Tensor,
    weights: BlockWeights,
    cosines: Tensor,
    sines: Tensor,
    mask: Any,
    settings: BlockSettings,
    adapters: BlockAdapters = NO_ADAPTERS,
) -> BeforeExperts:
    """Attention and the router of a layer; arguments are those of `block`."""
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
    return BeforeExperts(hidden, normed, linear(_wide(normed), _wide(weights.gate), adapters.gate))


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
    hidden, normed, router_logits = before_experts(hidden, weights, cosines, sines, mask, settings, adapters)
    top_k_weights, top_k_index = route(router_logits, settings.top_k)
    experts = weights.experts_in(hidden.dtype)
    if settings.expert_group is not None:
        mixed = parallel_mixture(normed, top_k_weights, top_k_index, *experts, settings.expert_group, settings.experts)
    elif adapters.gate_up_proj is None and adapters.down_proj is None:
        mixed = mixture(normed, top_k_weights, top_k_index, *experts, settings.experts)
    else:
        beside_experts = (adapters.gate_up_proj, adapters.down_proj)
        mixed = adapted_mixture(normed, top_k_weights, top_k_index, *experts, *beside_experts, settings.experts)
    return hidden + mixed, router_logits


def windows_of(config: KeuralConfig) -> tuple[int | None, ...]:
    """The window of each layer, None where it sees its whole document."""
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
