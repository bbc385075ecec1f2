"""What decoding computes by kernels of its own on a GPU, as operations that a compiler leaves alone, and their plain twins.

In: a few rows, large matrices, slots. Out: products and attention. A processor runs the twins, which are there to be compared with.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """In float32 or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `KeuralRMSNorm`."""
    wider = wide(states)
    return weight * (wider * torch.rsqrt(wider.pow(2).mean(-1, keepdim=True) + epsilon)).to(states.dtype)


def plain_sorted_rows(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `sorted_rows`."""
    parts = [rows[begin:end] for begin, end in itertools.pairwise([0, *ends.tolist()])]
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])


def plain_chosen_rows(rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """See `chosen_rows`."""
    each = len(chosen) // len(rows)
    return torch.stack([F.linear(rows[place // each], weight[matrix]) for place, matrix in enumerate(chosen.tolist())])


def plain_norm_and_route(hidden: Tensor, norm: Tensor, router: Tensor, epsilon: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `norm_and_route`."""
    normed = rms_norm(hidden, norm, epsilon)
    shares, experts = wide(F.linear(normed, router)).softmax(-1).topk(top_k, -1)
    return normed, (shares / shares.sum(-1, keepdim=True)).to(hidden.dtype), experts


def plain_attend_to_slots(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, firsts: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """See `attend_to_slots`."""
    found = []
    for questions, slot, first, last in zip(query, slots.tolist(), firsts.tolist(), lengths.tolist(), strict=True):
        seen = [wide(held[slot, :, first : last + 1]) for held in (keys, values)]
        grouped = wide(questions).unflatten(0, (keys.shape[1], -1))
        weights = (grouped @ seen[0].mT * scaling).softmax(-1)
        found.append((weights @ seen[1]).flatten(0, 1))
    return torch.stack(found).to(query.dtype)


@torch.library.custom_op("keural::lone_row", mutates_args=())
def lone_row(row: Tensor, weight: Tensor) -> Tensor:
    """``[1, In]`` with ``[Out, In]`` to ``[1, Out]``, summed in float32."""
    return F.linear(row, weight)


@lone_row.register_fake
def _(row: Tensor, weight: Tensor) -> Tensor:
    return row.new_empty(row.shape[0], weight.shape[0])


@lone_row.register_kernel("cuda")
def _(row: Tensor, weight: Tensor) -> Tensor:
    from keural.serve.batching import kernels

    return kernels.few_rows(row.contiguous(), weight[None], kernels.ALL, None)


@torch.library.custom_op("keural::sorted_rows", mutates_args=())
def sorted_rows(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows times its matrix.

    Args:
        rows: ``[S, In]``, those of one group behind each other.
        weight: ``[groups, Out, In]``, contiguous.
        ends: ``[groups]`` int32, where each group's rows end.

    Returns:
        ``[S, Out]``, summed in float32.
    """
    return plain_sorted_rows(rows, weight, ends)


@sorted_rows.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@sorted_rows.register_kernel("cuda")
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    from keural.serve.batching import kernels

    return kernels.few_rows(rows.contiguous(), weight, kernels.SORTED, ends)


@torch.library.custom_op("keural::chosen_rows", mutates_args=())
def chosen_rows(rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Each choice's row times the matrix that was chosen.

    Args:
        rows: ``[S, In]``, each for A / S choices behind each other.
        weight: ``[groups, Out, In]``, contiguous.
        chosen: ``[A]`` int64, matrices.

    Returns:
        ``[A, Out]``, summed in float32.
    """
    return plain_chosen_rows(rows, weight, chosen)


@chosen_rows.register_fake
def _(rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    return rows.new_empty(chosen.shape[0], weight.shape[1])


@chosen_rows.register_kernel("cuda")
def _(rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    from keural.serve.batching import kernels

    return kernels.few_rows(rows.contiguous(), weight, kernels.CHOSEN, chosen.contiguous(), len(chosen) // len(rows))


@torch.library.custom_op("keural::norm_and_route", mutates_args=())
def norm_and_route(hidden: Tensor, norm: Tensor, router: Tensor, epsilon: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What comes before the experts, as the network's second norm and its router compute it.

    Args:
        hidden: ``[B, H]``.
        norm: the norm's weight, ``[H]``.
        router: the router's weight, ``[E, H]``.
        epsilon: of the norm.
        top_k: experts of a row.

    Returns:
        The normalised rows ``[B, H]``, the experts' shares ``[B, K]`` in the same dtype, and the experts ``[B, K]``.
    """
    return plain_norm_and_route(hidden, norm, router, epsilon, top_k)


@norm_and_route.register_fake
def _(hidden: Tensor, norm: Tensor, router: Tensor, epsilon: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    experts = hidden.new_empty(hidden.shape[0], top_k, dtype=torch.int64)
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[0], top_k), experts


@norm_and_route.register_kernel("cuda")
def _(hidden: Tensor, norm: Tensor, router: Tensor, epsilon: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    from keural.serve.batching import kernels

    return kernels.norm_and_route(hidden.contiguous(), norm, router, epsilon, top_k)


@torch.library.custom_op("keural::attend_to_slots", mutates_args=())
def attend_to_slots(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, firsts: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """Attention of one new token of each row over its slot, itself included.

    Args:
        query: ``[B, heads, D]``; head h reads key-value head h // (heads / kv heads).
        keys: of all slots, ``[slots, kv heads, C, D]``, columns and widths contiguous.
        values: the same.
        slots: ``[B]`` int64, the row's slot.
        firsts: ``[B]`` int64, the first column that it sees.
        lengths: ``[B]`` int64, the column of the token itself, the last that it sees.
        scaling: of the scores.

    Returns:
        ``[B, heads, D]``.
    """
    return plain_attend_to_slots(query, keys, values, slots, firsts, lengths, scaling)


@attend_to_slots.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, firsts: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    return query.new_empty(query.shape)


@attend_to_slots.register_kernel("cuda")
def _(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, firsts: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    from keural.serve.batching import kernels

    return kernels.attend_to_slots(query, keys, values, slots, firsts, lengths, scaling)
