"""The mixture of experts with low-rank adapters beside frozen experts.

In: what `experts.mixture` takes, and the adapters' factors. Out: the mixed outputs. The adapters' products are computed by
themselves and added: no delta of an expert's size exists, frozen experts cost no product for gradients of their own, and a small
adapter is not lost in the rounding of a bfloat16 weight. The permutations are those of `experts`, gathers in both directions.

Letters: as in `experts`; r rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keural.lora.targets import Factors
from keural.train.network.experts import GROUPED, GroupedProduct, combined, dispatched, sort_by_expert, weights_in_order


class _Rows(torch.autograd.Function):
    """``rows[s] @ weight[expert of s].T`` for weights ``[E, out, in]``; their gradient only where they are trained."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.backend = backend
        return GROUPED[backend].rows(rows, weight.transpose(-2, -1), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        product: GroupedProduct = GROUPED[ctx.backend]
        upstream = gradients[0].contiguous()
        rows_gradient = product.rows(upstream, weight, offsets) if ctx.needs_input_grad[0] else None
        weight_gradient = product.matrices(upstream, rows, offsets) if ctx.needs_input_grad[1] else None
        return rows_gradient, weight_gradient, None, None


def _product(rows: Tensor, weight: Tensor, adapter: Factors | None, offsets: Tensor, backend: str) -> Tensor:
    """Each expert's rows times its matrix and the adapter beside it: ``[S, in]`` to ``[S, out]``."""
    found: Tensor = _Rows.apply(rows, weight, offsets, backend)
    if adapter is None:
        return found
    down, up = (factor.to(rows.dtype).contiguous() for factor in adapter[:2])
    added: Tensor = _Rows.apply(_Rows.apply(rows, down, offsets, backend), up, offsets, backend)
    return found + adapter.scaling * added


def adapted_mixture(
    tokens: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_adapter: Factors | None,
    down_adapter: Factors | None,
    backend: str = "grouped_mm",
) -> Tensor:
    """Mix the chosen experts of tokens ``[N, H]``; arguments and result as for `experts.mixture`.

    `gate_up_adapter` has factors ``[E, r, H]`` and ``[E, 2I, r]``, `down_adapter` ``[E, r, I]`` and ``[E, H, r]``. Experts that get
    no token give zeros as gradients of their factors.
    """
    routing, top_k = sort_by_expert(experts, gate_up_proj.shape[0]), experts.shape[-1]
    sorted_weights = weights_in_order(weights, routing)
    rows = dispatched(tokens, routing, top_k)
    gate, up = _product(rows, gate_up_proj, gate_up_adapter, routing.offsets, backend).to(weights.dtype).chunk(2, -1)
    activated = (F.silu(gate) * up * sorted_weights[:, None]).to(tokens.dtype)
    outputs = _product(activated, down_proj, down_adapter, routing.offsets, backend)
    return combined(outputs, routing, top_k)
