"""What decoding computes by kernels of its own on a GPU, as operations that a compiler leaves alone, and their plain twins.

In: a few rows, large matrices, slots. Out: products and attention. A processor runs the twins, which are there to be compared with.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_grouped_rows(rows: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """See `grouped_rows`."""
    limits = [0, *([len(rows)] if ends is None else ends.tolist())]
    parts = [rows[begin:end] for begin, end in itertools.pairwise(limits)]
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])


def plain_attend_to_slots(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, firsts: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """See `attend_to_slots`."""
    found = []
    wider = torch.promote_types(query.dtype, torch.float32)
    for questions, slot, first, last in zip(query, slots.tolist(), firsts.tolist(), lengths.tolist(), strict=True):
        seen = [held[slot, :, first : last + 1].to(wider) for held in (keys, values)]
        grouped = questions.to(wider).unflatten(0, (keys.shape[1], -1))
        weights = (grouped @ seen[0].mT * scaling).softmax(-1)
        found.append((weights @ seen[1]).flatten(0, 1))
    return torch.stack(found).to(query.dtype)


@torch.library.custom_op("keural::grouped_rows", mutates_args=())
def grouped_rows(rows: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """Each group's rows times its matrix.

    Args:
        rows: ``[S, In]``, those of one group behind each other.
        weight: ``[groups, Out, In]``, contiguous.
        ends: ``[groups]`` int32, where each group's rows end; None where there is one group.

    Returns:
        ``[S, Out]``, summed in float32.
    """
    return plain_grouped_rows(rows, weight, ends)


@grouped_rows.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_rows.register_kernel("cuda")
def _(rows: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    from keural.serve.batching import kernels

    return kernels.grouped_rows(rows.contiguous(), weight, ends)


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
