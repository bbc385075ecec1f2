"""Attention document by document: documents of about one length are stacked and attended to causally, without a mask over rows.

In: queries, keys and values of flattened rows, and where their documents begin. Out: the attention output, that of the dense masked
twin. Documents are sorted by length into stacks, the shorter ones filled up at their ends by at most an eighth: as nothing looks
ahead, what is filled up changes nothing before it, so a stack needs no mask. Where a document is longer than twice its layer's
window, it is cut into blocks of a window, each of which sees itself and the block before. So the work is that of the documents, not
of the rows that they stand in, however they are packed.

It is what training uses on a CPU; accelerators have kernels that do the same (`keural.train.network.attention`).

Letters: N = rows * T tokens, M of them with those that are filled up, D head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

FILLED_SHARE = 8
"""A document is stacked with a longer one when it lacks at most this part of its length."""
FILLED_TOKENS = 8
"""Or at most so many tokens."""
IMPLEMENTATION = "keural_documents"
"""The name by which the model's own layers find it among transformers' attention functions."""


@dataclass(frozen=True)
class Stack:
    """`number` documents of `length` tokens, which begin at `start` of the M."""

    start: int
    number: int
    length: int
    mask: Tensor | None
    """Bool, of a document ``[length, length]`` or of its blocks ``[blocks, window, 2 window]``; None where being causal is all."""


@dataclass(frozen=True)
class DocumentStacks:
    """Where every token stands in the stacks, and the stacks."""

    there: Tensor
    """``[M]``: the token, among the N, that stands at each place; of what is filled up any one."""
    back: Tensor
    """``[N]``: the place of each token."""
    filled: Tensor
    """Places that are filled up."""
    stacks: tuple[Stack, ...]


def document_offsets(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the documents of rows ``[rows, T]`` of positions begin among the N tokens, and N: one begins with each row, and where a
    position does not follow its left neighbour.
    """
    begins = np.ones(positions.shape, dtype=bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return np.append(np.flatnonzero(begins), positions.size)


def stack_documents(offsets: NDArray[np.int64], window: int | None) -> DocumentStacks:
    """Sort documents that begin at `offsets` (see `document_offsets`) into stacks, for layers in which a token sees `window` tokens
    of its document, itself included (None: all).
    """
    begins, lengths = offsets[:-1], np.diff(offsets)
    order = np.argsort(-lengths, kind="stable")
    there, stacks, start = [], [], 0
    for documents in _alike(lengths[order]):
        chosen = order[documents]
        length = int(lengths[chosen[0]])
        mask = None
        if window is not None and length > 2 * window:
            length = -(-length // window) * window
            mask = _block_mask(length // window, window)
        elif window is not None and length > window:
            mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        inside = np.minimum(np.arange(length), lengths[chosen, None] - 1)
        there.append((begins[chosen, None] + inside).reshape(-1))
        stacks.append(Stack(start, len(chosen), length, mask))
        start += len(chosen) * length
    places = np.concatenate(there)
    back, first = np.unique(places, return_index=True)  # of what stands several times the first is the token itself
    assert len(back) == offsets[-1], "every token stands somewhere"
    filled = np.setdiff1d(np.arange(len(places)), first)
    return DocumentStacks(torch.from_numpy(places), torch.from_numpy(first), torch.from_numpy(filled), tuple(stacks))


def _alike(lengths: NDArray[np.int64]) -> Iterator[slice]:
    """Runs of falling lengths that are stacked."""
    first = 0
    while first < len(lengths):
        least = lengths[first] - max(lengths[first] // FILLED_SHARE, FILLED_TOKENS)
        last = int(np.searchsorted(-lengths, -least, side="right"))
        yield slice(first, last)
        first = last


def _block_mask(blocks: int, window: int) -> Tensor:
    """What the tokens of each block see of the block before and of their own; the first has none before it."""
    query, key = torch.arange(window)[:, None], torch.arange(2 * window) - window
    mask = ((key <= query) & (query - key < window)).repeat(blocks, 1, 1)
    mask[0] &= key >= 0
    return mask


def attend_to_documents(query: Tensor, key: Tensor, value: Tensor, stacked: DocumentStacks, scale: float | None = None) -> Tensor:
    """Queries ``[N, heads, D]``, keys and values ``[N, kv heads, D]`` to the output ``[N, heads, D]``."""
    parts = [stack.number * stack.length for stack in stacked.stacks]
    split = [_Stacked.apply(heads, stacked).split(parts) for heads in (query, key, value)]
    outputs = [_attend(q, k, v, stack, scale).flatten(0, 1) for q, k, v, stack in zip(*split, stacked.stacks, strict=True)]
    found: Tensor = _Unstacked.apply(torch.cat(outputs), stacked)
    return found


def _attend(query: Tensor, key: Tensor, value: Tensor, stack: Stack, scale: float | None) -> Tensor:
    """One stack ``[number * length, heads, D]``; ``[number, length, heads, D]``."""
    query, key, value = (heads.unflatten(0, (stack.number, stack.length)) for heads in (query, key, value))
    mask = stack.mask
    if mask is not None and mask.ndim == 3:
        blocks, window, _ = mask.shape
        query, key, value = (heads.unflatten(1, (blocks, window)) for heads in (query, key, value))
        query, key, value = query.flatten(0, 1), _with_block_before(key), _with_block_before(value)
        mask = mask.repeat(stack.number, 1, 1)[:, None]
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    ).transpose(1, 2)
    return found.reshape(stack.number, stack.length, *found.shape[2:])


def _with_block_before(heads: Tensor) -> Tensor:
    """Blocks ``[number, blocks, window, ...]``, each behind the one before it: ``[number * blocks, 2 window, ...]``."""
    before = torch.cat([torch.zeros_like(heads[:, :1]), heads[:, :-1]], 1)
    return torch.cat([before, heads], 2).flatten(0, 1)


class _Stacked(torch.autograd.Function):
    """Tokens ``[N, ...]`` to their places ``[M, ...]``. Nothing looks at what is filled up, so its gradient is zero and left out:
    both directions gather.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, stacked: DocumentStacks) -> Tensor:
        ctx.stacked = stacked
        return tokens.index_select(0, stacked.there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.stacked.back), None


class _Unstacked(torch.autograd.Function):
    """Places ``[M, ...]`` to their tokens ``[N, ...]``."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, stacked: DocumentStacks) -> Tensor:
        ctx.stacked = stacked
        return places.index_select(0, stacked.back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found = gradients[0].index_select(0, ctx.stacked.there)
        return found.index_fill_(0, ctx.stacked.filled, 0), None


def _in_the_models_layers(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: heads ``[rows, heads, T, D]`` in, ``[rows, T, heads, D]`` out.

    Given another mask than `DocumentStacks`, as when the model is called by itself, it is transformers' own.
    """
    if not isinstance(attention_mask, DocumentStacks):
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
        return output, None
    rows = query.shape[0]
    query, key, value = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
    found = attend_to_documents(query, key, value, attention_mask, arguments.get("scaling"))
    return found.unflatten(0, (rows, -1)), None


AttentionInterface.register(IMPLEMENTATION, _in_the_models_layers)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
