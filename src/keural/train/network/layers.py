"""The decoder's layers one after another: what each keeps for the backward pass, and as which graphs it is compiled.

In: the weights of a network, token ids and where their documents begin. Out: hidden states and the routers' logits.

A compiled layer is one graph. Where experts are divided among processes it is three, because the host must know how many rows
travel before they do: until the rows leave, the products over those that came in, and the sum of what came back.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keural.train.network.attention import ATTENTION, Packing
from keural.train.network.block import (
    NO_ADAPTERS,
    BlockAdapters,
    BlockSettings,
    BlockWeights,
    Network,
    angles,
    before_experts,
    block,
    rms_norm,
)
from keural.train.network.experts import Routing, combined, mixture, route
from keural.train.network.parallel_experts import Leaving, leaving, travelled
from keural.train.network.recompute import recomputed

Block = Callable[..., tuple[Tensor, Tensor]]
"""`block`, or what computes the same."""

Visit = Callable[[Callable[[Tensor, BlockWeights], Tensor], Tensor], Tensor]
"""A layer whose weights are there only while it is visited: `visit(function, hidden)` gives `function(hidden, weights)`."""


def until_rows_leave(
    hidden: Tensor,
    weights: BlockWeights,
    cosines: Tensor,
    sines: Tensor,
    mask: Any,
    settings: BlockSettings,
    adapters: BlockAdapters = NO_ADAPTERS,
) -> tuple[Tensor, ...]:
    """The residual stream and the router's logits of a layer until its experts, and the fields of `Leaving` and its `Routing`."""
    hidden, normed, router_logits = before_experts(hidden, weights, cosines, sines, mask, settings, adapters)
    rows, row_weights, routing = leaving(normed, *route(router_logits, settings.top_k), router_logits.shape[-1])
    return hidden, router_logits, rows, row_weights, *routing


def sum_of_rows(hidden: Tensor, outputs: Tensor, order: Tensor, places: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """The residual stream after a layer, from what its experts made of the rows ``[S, H]``."""
    return hidden + combined(outputs, Routing(order, places, offsets), top_k)


def _selective(function: Callable[..., Any]) -> Callable[..., Any]:
    def kept(*arguments: Any) -> Any:
        return recomputed(function, "selective")(*arguments)

    return kept


def graphs(backend: str = "inductor") -> dict[str, Callable[..., Any]]:
    """Parts of a layer as one graph each, by name; all layers of a run share them, with one version per kind of mask.

    `none` and `selective` are `block`, and with ` until rows leave` `until_rows_leave`, by what they keep: that is decided when a
    graph is made, so the choice of `selective` is part of it. `experts` is `mixture` over any number of rows, `sum` `sum_of_rows`.
    """
    functions = {"": block, " until rows leave": until_rows_leave}
    fixed = {f"none{name}": function for name, function in functions.items()}
    fixed |= {f"selective{name}": _selective(function) for name, function in functions.items()} | {"sum": sum_of_rows}
    found = {name: torch.compile(each, fullgraph=True, dynamic=False, backend=backend) for name, each in fixed.items()}
    return found | {"experts": torch.compile(mixture, fullgraph=True, dynamic=True, backend=backend)}


COMPILED = graphs()


def divided_block(
    mode: str,
    hidden: Tensor,
    weights: BlockWeights,
    cosines: Tensor,
    sines: Tensor,
    mask: Any,
    settings: BlockSettings,
    adapters: BlockAdapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """`block` as graphs, where its experts are divided; `mode` is that of its first one, `none` or `selective`.

    Products in float32, for which there is no compiled grouped product, and over no rows at all are not compiled.
    """
    assert settings.expert_group is not None
    first, alone = COMPILED[f"{mode} until rows leave"], settings._replace(expert_group=None)
    hidden, router_logits, rows, row_weights, *routing = first(hidden, weights, cosines, sines, mask, alone, adapters)
    mix = COMPILED["experts"] if settings.experts == "grouped_mm" else mixture
    experts = weights.experts_in(hidden.dtype)
    leave = Leaving(rows, row_weights, Routing(*routing))
    outputs = travelled(leave, *experts, settings.expert_group, settings.experts, mix)
    return COMPILED["sum"](hidden, outputs, *routing, settings.top_k), router_logits


def layer_for(recompute: str, compiled: bool, divided: bool = False) -> Block:
    """The layer under a mode of `keural.train.network.recompute.RECOMPUTE`; `divided`: its experts are, among processes. `full`
    wraps what `none` compiles.
    """
    if not compiled:
        return recomputed(block, recompute)
    mode = "none" if recompute == "full" else recompute
    layer: Block = partial(divided_block, mode) if divided else COMPILED[mode]
    return recomputed(layer, recompute) if recompute == "full" else layer


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
        compiled: run each layer as compiled graphs.
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
    divided = settings.expert_group is not None
    for visit, beside_it, window, mode in zip(visits, adapters, windows, recompute, strict=True):
        rest = (cosines, sines, masks[window], settings, beside_it)
        hidden = visit(partial(_run, layer_for(mode, compiled, divided), rest, router_logits), hidden)
    return rms_norm(hidden, network.norm, settings.eps), tuple(router_logits)


def _at_hand(weights: BlockWeights, function: Callable[[Tensor, BlockWeights], Tensor], hidden: Tensor) -> Tensor:
    return function(hidden, weights)


def _run(layer: Block, rest: tuple[Any, ...], router_logits: list[Tensor], hidden: Tensor, weights: BlockWeights) -> Tensor:
    hidden, logits = layer(hidden, weights, *rest)
    router_logits.append(logits)
    return hidden
