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
from keural.serve.batching.device_operations import attend_to_slots, chosen_rows, lone_row, norm_and_route, rms_norm, sorted_rows

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


def product(states: Tensor, weight: Tensor) -> Tensor:
    """``[B, In]`` with ``[Out, In]`` to ``[B, Out]``."""
    if len(states) > 1:
        return F.linear(states, weight)
    one: Tensor = lone_row(states, weight)
    return one


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn heads ``[B, heads, D]`` by angles ``[B, D]``, as the network does."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]


def mix(states: Tensor, shares: Tensor, experts: Tensor, layer: LayerWeights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Mix the experts of ``[B, H]``, by shares and choices ``[B, K]``.

    A lone row's experts read it one by one. More rows are sorted by comparing each choice with each, as they are few, so that every
    expert is read once.
    """
    chosen, top_k = experts.flatten(), experts.shape[1]
    if len(states) == 1:
        gate, up = chosen_rows(states, layer.gate_up, chosen).chunk(2, -1)
        outputs = chosen_rows(activation(gate) * up, layer.down, chosen)
    else:
        assignment = torch.arange(chosen.numel(), device=chosen.device)
        left, right = chosen, chosen[:, None]
        places = ((left < right) | ((left == right) & (assignment < assignment[:, None]))).sum(1)
        ends = (right <= torch.arange(len(layer.gate_up), device=chosen.device)).sum(0, dtype=torch.int32)
        rows = states.new_empty(len(chosen), states.shape[1]).index_copy(0, places, states.repeat_interleave(top_k, 0))
        gate, up = sorted_rows(rows, layer.gate_up, ends).chunk(2, -1)
        outputs = sorted_rows(activation(gate) * up, layer.down, ends).index_select(0, places)
    mixed: Tensor = (outputs * shares.flatten()[:, None]).unflatten(0, (-1, top_k)).sum(1)
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
    normed, shares, experts = norm_and_route(hidden, weights.post_attention_norm, weights.router, settings.epsilon, settings.top_k)
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
