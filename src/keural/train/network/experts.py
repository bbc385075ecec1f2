"""The mixture of experts in training: routing, the two permutations, and the grouped products behind a registry.

In: normalised hidden states, the router's logits and the experts' two tensors. Out: the mixed outputs. Nothing is read back from
the device (the `loop` twin excepted), and nothing is added atomically: permutations are gathers in both directions, so results
are the same in every run.

Letters: N tokens, H hidden size, E experts of width I, K of them per token, S = N * K assignments sorted by expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Which assignment stands where. Assignment n * K + k is the k-th choice of token n.

    `order` ``[S]``: the assignment at each sorted place; `places` ``[S]``: the sorted place of each assignment; `offsets` ``[E]``
    int32: where each expert's places end.
    """

    order: Tensor
    places: Tensor
    offsets: Tensor


def route(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights ``[N, K]`` (they sum to one) and experts ``[N, K]`` of float32 logits ``[N, E]``."""
    weights, experts = router_logits.softmax(-1).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def sort_by_expert(experts: Tensor, number: int) -> Routing:
    """Sort the assignments ``[N, K]`` by expert, stably. One byte per key, as there are at most 256 experts."""
    keys = experts.reshape(-1)
    order = keys.to(torch.uint8).sort(stable=True).indices
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = (keys[:, None] == torch.arange(number, device=keys.device)).sum(0)
    return Routing(order, places, counts.cumsum(0).to(torch.int32))


class GroupedProduct(NamedTuple):
    """`rows(x [S, In], weight [E, In, Out], offsets)` is ``[S, Out]``: each expert's rows times its matrix.

    `matrices(left [S, A], right [S, B], offsets)` is ``[E, A, B]``: left.T @ right over each expert's rows.
    """

    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    matrices: Callable[[Tensor, Tensor, Tensor], Tensor]


def _sizes(offsets: Tensor) -> list[int]:
    ends: list[int] = offsets.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _loop_rows(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(_sizes(offsets)), weight.unbind(0), strict=True)])


def _loop_matrices(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    sizes = _sizes(offsets)
    return torch.stack([a.T @ b for a, b in zip(left.split(sizes), right.split(sizes), strict=True)])


def _grouped_rows(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=offsets)


def _grouped_matrices(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(left.T, right, offs=offsets)


GROUPED: dict[str, GroupedProduct] = {
    "loop": GroupedProduct(_loop_rows, _loop_matrices),
    "grouped_mm": GroupedProduct(_grouped_rows, _grouped_matrices),
}
"""`loop` is the twin: one product per expert, whose sizes it waits for; it cannot be compiled."""


def dispatch(tokens: Tensor, routing: Routing, top_k: int) -> Tensor:
    """Rows of tokens ``[N, H]`` in the experts' order, ``[S, H]``."""
    return tokens.index_select(0, routing.order // top_k)


def combine(sorted_rows: Tensor, routing: Routing, top_k: int) -> Tensor:
    """Sum over each token's assignments of sorted rows ``[S, H]``, in float32; ``[N, H]`` in the rows' dtype.

    `dispatch` and `combine` are each other's gradients.
    """
    rows = sorted_rows.index_select(0, routing.places).unflatten(0, (-1, top_k))
    found: Tensor = rows.to(torch.promote_types(rows.dtype, torch.float32)).sum(1).to(rows.dtype)
    return found


class _Dispatched(torch.autograd.Function):
    """`dispatch`, whose gradient is `combine`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, places: Tensor, offsets: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, places, offsets)
        ctx.top_k = top_k
        return dispatch(tokens, Routing(order, places, offsets), top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return combine(gradients[0], Routing(*ctx.saved_tensors), ctx.top_k), None, None, None, None


class _Combined(torch.autograd.Function):
    """`combine`, whose gradient is `dispatch`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor, offsets: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, places, offsets)
        ctx.top_k = top_k
        return combine(rows, Routing(order, places, offsets), top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return dispatch(gradients[0], Routing(*ctx.saved_tensors), ctx.top_k), None, None, None, None


class _Sorted(torch.autograd.Function):
    """Weights ``[N, K]`` in the experts' order, ``[S]``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = weights.shape
        return weights.reshape(-1).index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places).view(ctx.shape), None, None


def dispatched(tokens: Tensor, routing: Routing, top_k: int) -> Tensor:
    """`dispatch` with its gradient."""
    found: Tensor = _Dispatched.apply(tokens, *routing, top_k)
    return found


def combined(rows: Tensor, routing: Routing, top_k: int) -> Tensor:
    """`combine` with its gradient."""
    found: Tensor = _Combined.apply(rows, *routing, top_k)
    return found


def weights_in_order(weights: Tensor, routing: Routing) -> Tensor:
    """Weights ``[N, K]`` in the experts' order, ``[S]``, with their gradient."""
    found: Tensor = _Sorted.apply(weights, routing.order, routing.places)
    return found


def _gated(gate_up: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) * up * weight, computed in float32 or more: ``[S, 2I]`` and ``[S]`` to ``[S, I]``."""
    gate, up = gate_up.to(weights.dtype).chunk(2, -1)
    return (F.silu(gate) * up * weights[:, None]).to(gate_up.dtype)


def _gated_backward(gate_up: Tensor, weights: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for gate_up and weights, and the forward's output again."""
    gate, up = gate_up.to(weights.dtype).chunk(2, -1)
    gradient = upstream.to(weights.dtype)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    activated = silu * up
    weighted = gradient * weights[:, None]
    silu_gradient = sigmoid * (1 + gate * (1 - sigmoid))
    gate_up_gradient = torch.cat([weighted * up * silu_gradient, weighted * silu], -1).to(gate_up.dtype)
    return gate_up_gradient, (gradient * activated).sum(-1), (activated * weights[:, None]).to(gate_up.dtype)


class _Mixture(torch.autograd.Function):
    """sum_k w_k down_k(silu(gate_k(x)) * up_k(x)) for every token, with the backward pass written out.

    The weights multiply the activation, before the second product, so that this product's output is not needed again. Kept for the
    backward pass: the tokens and the first product ``[S, 2I]``; the rest is gathered and multiplied again element by element.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        order: Tensor,
        places: Tensor,
        offsets: Tensor,
        top_k: int,
        backend: str,
    ) -> Tensor:
        product, routing = GROUPED[backend], Routing(order, places, offsets)
        gate_up = product.rows(dispatch(tokens, routing, top_k), gate_up_proj.transpose(-2, -1), offsets)
        outputs = product.rows(_gated(gate_up, weights.reshape(-1).index_select(0, order)), down_proj.transpose(-2, -1), offsets)
        ctx.save_for_backward(tokens, weights, gate_up_proj, down_proj, order, places, offsets, gate_up)
        ctx.top_k, ctx.backend = top_k, backend
        return combine(outputs, routing, top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, gate_up_proj, down_proj, order, places, offsets, gate_up = ctx.saved_tensors
        product, routing, top_k = GROUPED[ctx.backend], Routing(order, places, offsets), ctx.top_k
        outputs_gradient = dispatch(gradients[0], routing, top_k)
        sorted_weights = weights.reshape(-1).index_select(0, order)
        gate_up_gradient, weights_gradient, activated = _gated_backward(
            gate_up, sorted_weights, product.rows(outputs_gradient, down_proj, offsets)
        )
        frozen = not any(ctx.needs_input_grad[2:4])
        down_gradient = None if frozen else product.matrices(outputs_gradient, activated, offsets)
        tokens_gradient = combine(product.rows(gate_up_gradient, gate_up_proj, offsets), routing, top_k)
        gate_up_proj_gradient = None if frozen else product.matrices(gate_up_gradient, dispatch(tokens, routing, top_k), offsets)
        weights_gradient = weights_gradient.index_select(0, places).view_as(weights)
        return tokens_gradient, weights_gradient, gate_up_proj_gradient, down_gradient, None, None, None, None, None


def mixture(
    tokens: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: str = "grouped_mm"
) -> Tensor:
    """Mix the chosen experts of tokens ``[N, H]``.

    Args:
        tokens: ``[N, H]``, in the dtype of the experts.
        weights: ``[N, K]`` float32 (float64 with float64 experts).
        experts: ``[N, K]``, which experts.
        gate_up_proj: ``[E, 2I, H]``, gate rows first.
        down_proj: ``[E, H, I]``.
        backend: a key of `GROUPED`.

    Returns:
        ``[N, H]``.
    """
    routing = sort_by_expert(experts, gate_up_proj.shape[0])
    found: Tensor = _Mixture.apply(tokens, weights, gate_up_proj, down_proj, *routing, experts.shape[-1], backend)
    return found
