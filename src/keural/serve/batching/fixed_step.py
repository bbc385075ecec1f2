"""One new token of every row through the network in fixed shapes, without waiting for the device: what a CUDA graph can hold.

In: a model's weights, each slot's keys and values, and where each row stands. Out: logits. It computes what the network computes;
that is held by tests. What is between the products and attention is left to a compiler.

Letters in shapes: B rows, C columns of a slot, V vocabulary, H hidden size, D head width, E experts, K of them per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keural.model import KeuralMoECausalLM
from keural.model.modeling_keural import KeuralDecoderLayer
from keural.serve.batching.device_operations import attend_to_slots, grouped_rows

FIXED_ROPE = frozenset({"default", "linear", "yarn", "llama3"})
"""Kinds of rotary positions whose frequencies do not depend on how long an answer has become."""


class LayerWeights(NamedTuple):
    """Of one block, as the network holds them."""

    input_norm: Tensor
    query_key_value: Tensor
    output: Tensor
    post_attention_norm: Tensor
    router: Tensor
    gate_up: Tensor
    down: Tensor


class StepSettings(NamedTuple):
    """What a block is told beside its weights."""

    epsilon: float
    scaling: float
    top_k: int
    activation: Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """Where the rows stand, on the device: their new ids, their slots, and how many tokens each slot holds, each ``[B]`` int64.

    `counted` is 1 for a row whose experts are counted, 0 for one that only fills up the batch.
    """

    ids: Tensor
    slots: Tensor
    lengths: Tensor
    counted: Tensor


def decoder_layers(model: KeuralMoECausalLM) -> list[KeuralDecoderLayer]:
    """The blocks of a model."""
    return [layer for layer in model.model.layers if isinstance(layer, KeuralDecoderLayer)]


def layer_weights(model: KeuralMoECausalLM) -> list[LayerWeights]:
    """The weights of a model's blocks. The three projections of attention are laid into one tensor each, of which the model's own
    weights are parts from then on: one product instead of three, and no memory for it.
    """
    return [
        LayerWeights(
            layer.input_layernorm.weight,
            _laid_together(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            layer.self_attn.o_proj.weight,
            layer.post_attention_layernorm.weight,
            layer.mlp.gate.weight,
            layer.mlp.experts.gate_up_proj,
            layer.mlp.experts.down_proj,
        )
        for layer in decoder_layers(model)
    ]


def _laid_together(*layers: nn.Linear) -> Tensor:
    """The weights of linear layers below each other in one tensor, which the layers share."""
    together = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, together.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return together


def step_settings(model: KeuralMoECausalLM) -> StepSettings:
    """The same for all blocks of a model."""
    config, first = model.config, decoder_layers(model)[0]
    return StepSettings(config.rms_norm_eps, first.self_attn.scaling, config.num_experts_per_tok, first.mlp.experts.act_fn)


def wide(tensor: Tensor) -> Tensor:
    """In float32 or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def product(states: Tensor, weight: Tensor) -> Tensor:
    """``[B, In]`` with ``[Out, In]`` to ``[B, Out]``. A lone row is multiplied by a kernel that is made for few rows."""
    if len(states) > 1:
        return F.linear(states, weight)
    one: Tensor = grouped_rows(states, weight[None])
    return one


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `KeuralRMSNorm`."""
    wider = wide(states)
    return weight * (wider * torch.rsqrt(wider.pow(2).mean(-1, keepdim=True) + epsilon)).to(states.dtype)


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn heads ``[B, heads, D]`` by angles ``[B, D]``, as the network does."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]


def route(states: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights ``[B, K]`` in the dtype of ``[B, H]`` and experts ``[B, K]``, as `KeuralTopKRouter`.

    By comparing each expert with each: a few numbers, which are ranked in the same kernel that computes them.
    """
    few = len(states) == 1
    logits = (wide(weight) * wide(states)).sum(-1, keepdim=True).T.to(states.dtype) if few else F.linear(states, weight)
    probabilities = wide(logits).softmax(-1)
    place = torch.arange(probabilities.shape[-1], device=states.device)
    left, right = probabilities[:, None], probabilities[:, :, None]
    before = (left > right) | ((left == right) & (place[None] < place[:, None]))
    rank = before.sum(-1)[:, None] == torch.arange(top_k, device=states.device)[:, None]
    experts, weights = (rank * place).sum(-1), (rank * probabilities[:, None]).sum(-1)
    return (weights / weights.sum(-1, keepdim=True)).to(states.dtype), experts


def mix(states: Tensor, weights: Tensor, experts: Tensor, layer: LayerWeights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Mix experts of ``[B, H]``: each expert reads its rows, sorted by comparing each with each, as they are few."""
    chosen, assignment, top_k = experts.flatten(), torch.arange(experts.numel(), device=experts.device), experts.shape[1]
    left, right = chosen, chosen[:, None]
    places = ((left < right) | ((left == right) & (assignment < assignment[:, None]))).sum(1)
    ends = (right <= torch.arange(len(layer.gate_up), device=chosen.device)).sum(0, dtype=torch.int32)
    rows = states.new_empty(len(chosen), states.shape[1]).index_copy(0, places, states.repeat_interleave(top_k, 0))
    gate, up = grouped_rows(rows, layer.gate_up, ends).chunk(2, -1)
    outputs = grouped_rows(activation(gate) * up, layer.down, ends)
    mixed: Tensor = (outputs.index_select(0, places) * weights.flatten()[:, None]).unflatten(0, (-1, top_k)).sum(1)
    return mixed


def layer_step(
    hidden: Tensor,
    weights: LayerWeights,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    angles: tuple[Tensor, Tensor],
    firsts: Tensor,
    counts: Tensor,
    settings: StepSettings,
) -> Tensor:
    """One block: ``[B, H]`` to ``[B, H]``; each row looks at its slot's columns from `firsts` ``[B]`` on.

    The new keys and values are written into ``[slots, kv heads, C, D]``, each at its row's length, and the chosen experts are added
    to `counts` ``[E]``.
    """
    normed = rms_norm(hidden, weights.input_norm, settings.epsilon)
    heads, width = keys.shape[1], keys.shape[-1]
    projected = product(normed, weights.query_key_value).unflatten(-1, (-1, width))
    query, key, value = projected.split([projected.shape[1] - 2 * heads, heads, heads], 1)
    keys[rows.slots, :, rows.lengths] = rotate(key, *angles)
    values[rows.slots, :, rows.lengths] = value
    found = attend_to_slots(rotate(query, *angles), keys, values, rows.slots, firsts, rows.lengths, settings.scaling)
    hidden = hidden + product(found.flatten(1), weights.output)
    normed = rms_norm(hidden, weights.post_attention_norm, settings.epsilon)
    shares, experts = route(normed, weights.router, settings.top_k)
    chosen = experts[:, :, None] == torch.arange(len(counts), device=experts.device)
    counts += (chosen * rows.counted[:, None, None]).sum((0, 1))
    return hidden + mix(normed, shares, experts, weights, settings.activation)


def head_step(hidden: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> Tensor:
    """Float32 logits ``[B, V]`` of ``[B, H]``."""
    return product(rms_norm(hidden, norm, epsilon), head).float()


def mark_sizes(hidden: Tensor, rows: Rows, angles: tuple[Tensor, Tensor], firsts: Tensor) -> None:
    """Tell the compiler that the number of rows changes, so that one version serves all of them; a lone row has its own."""
    if len(hidden) > 1:
        for tensor in (hidden, *rows, *angles, firsts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


class Parts(NamedTuple):
    """The two functions that a step is made of, compiled or not."""

    layer: Callable[..., Tensor] = layer_step
    head: Callable[..., Tensor] = head_step


def compiled_parts(backend: str = "inductor", options: dict[str, Any] | None = None) -> Parts:
    """Both as one graph each: one version for a lone row, one for any number of rows."""
    return Parts(*(torch.compile(part, fullgraph=True, dynamic=None, backend=backend, options=options) for part in Parts()))
