"""The mixture of experts that are divided among processes: tokens travel to the experts, and their outputs back.

In: what `experts.mixture` takes, with this process's experts alone. Out: the mixed outputs of its own tokens. Nothing is dropped
and nothing is filled up: every process says how many rows it sends for each expert. That costs one small exchange and one wait for
the device in each pass through a layer, because the host must know the sizes of what is exchanged. Rows lie in the order of the
experts before they leave, so what is for one process lies together; there a mixture of one expert a row does the rest.

Letters: as in `experts`; P processes, R rows that come in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from keural.train.network.experts import Routing, combined, dispatched, mixture, sort_by_expert, weights_in_order


class Exchange(NamedTuple):
    """Rows that are sent to each process and that come from each, in the order of the processes."""

    sent: list[int]
    received: list[int]
    group: ProcessGroup

    @property
    def back(self) -> "Exchange":
        """The way back."""
        return Exchange(self.received, self.sent, self.group)


def exchanged(rows: Tensor, exchange: Exchange) -> Tensor:
    """The rows of all processes that are for this one, ``[R, ..]``, of those that each has, ``[S, ..]``."""
    found = rows.new_empty((sum(exchange.received), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), exchange.received, exchange.sent, group=exchange.group)
    return found


class _Exchanged(torch.autograd.Function):
    """`exchanged`, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.back = exchange.back
        return exchanged(rows, exchange)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(gradients[0], ctx.back), None


def agree(offsets: Tensor, group: ProcessGroup) -> tuple[Exchange, Tensor]:
    """What is exchanged, and of every row that comes in which of this process's experts it is for.

    Args:
        offsets: ``[E]``, where each expert's rows end among those that this process has.
        group: the P processes; the first has the first E / P experts, and so on.
    """
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    coming = counts.clone()
    dist.all_to_all_single(coming, counts, group=group)
    by_process = torch.stack([counts, coming]).unflatten(1, (group.size(), -1))
    sent, received = by_process.sum(-1).tolist()
    own = torch.arange(by_process.shape[-1], device=offsets.device).repeat(group.size())
    return Exchange(sent, received, group), own.repeat_interleave(coming, output_size=sum(received))


class Leaving(NamedTuple):
    """Rows ``[S, H]`` in the experts' order, before they leave, their weights ``[S]``, and their places."""

    rows: Tensor
    weights: Tensor
    routing: Routing


def leaving(tokens: Tensor, weights: Tensor, experts: Tensor, number: int) -> Leaving:
    """The rows of tokens ``[N, H]`` that go to `number` experts."""
    routing = sort_by_expert(experts, number)
    return Leaving(dispatched(tokens, routing, experts.shape[-1]), weights_in_order(weights, routing), routing)


def travelled(
    leave: Leaving,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: ProcessGroup,
    backend: str = "grouped_mm",
    mix: Callable[..., Tensor] = mixture,
) -> Tensor:
    """What the experts of all processes make of rows that go to them and come back, ``[S, H]`` in the order in which they left.

    `mix` is `mixture` or what computes the same, for a `backend` that takes any rows but none.
    """
    exchange, chosen = agree(leave.routing.offsets, group)
    rows, row_weights = _Exchanged.apply(leave.rows, exchange), _Exchanged.apply(leave.weights, exchange)
    came = (rows, row_weights[:, None], chosen[:, None], gate_up_proj, down_proj)
    outputs = mix(*came, backend) if len(chosen) else mixture(*came, "loop")  # a grouped product has rows
    found: Tensor = _Exchanged.apply(outputs, exchange.back)
    return found


def parallel_mixture(
    tokens: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: ProcessGroup,
    backend: str = "grouped_mm",
) -> Tensor:
    """Mix the chosen experts of tokens ``[N, H]``. All P processes of `group` must call it, forward and backward.

    Arguments and result are those of `experts.mixture`, but `gate_up_proj` ``[E / P, 2I, H]`` and `down_proj` ``[E / P, H, I]`` are
    this process's; their gradients are sums over the tokens of all P processes.
    """
    leave = leaving(tokens, weights, experts, gate_up_proj.shape[0] * group.size())
    return combined(travelled(leave, gate_up_proj, down_proj, group, backend), leave.routing, experts.shape[-1])
