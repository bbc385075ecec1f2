"""Triton kernels of decoding: a few rows by large matrices, and one query a row over its slot's keys. Every one has a plain twin in
`keural.serve.batching.device_operations`, which a test compares it with.

Imported only where a kernel is about to run, because Triton comes with an accelerator's torch alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 16
"""Parts of a slot's keys that programs of their own look at, so that one long answer keeps the device busy."""
KEYS = 32
"""Keys that are looked at together."""
FEWEST = 16
"""The least rows of a matrix product on tensor cores; those that are missing are zeros."""


ALL, SORTED, CHOSEN = 0, 1, 2
"""Which rows a matrix is for: all, those up to where its group ends, or one for each choice of a matrix."""


@triton.jit
def _few_rows(  # type: ignore[no-untyped-def]
    rows, weight, groups, outputs, count, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """One program for each group of rows and block of outputs, which reads its part of the group's matrix once for all of them."""
    group = tl.program_id(1)
    matrix = group
    first = 0
    end = count
    if KIND == 1:
        first = tl.where(group == 0, 0, tl.load(groups + tl.maximum(group - 1, 0)))
        end = tl.load(groups + group)
    if KIND == 2:
        matrix = tl.load(groups + group)
        first = group
        end = group + 1
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    matrix_rows = weight + matrix.to(tl.int64) * INPUTS * OUTPUTS + output.to(tl.int64)[:, None] * INPUTS
    inside = (output < OUTPUTS)[:, None]
    while first < end:
        row = first + tl.arange(0, BLOCK_ROWS)
        there = (row < end)[:, None]
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for start in range(0, INPUTS, BLOCK_INPUTS):
            place = start + tl.arange(0, BLOCK_INPUTS)[None, :]
            left = tl.load(rows + (row // EACH)[:, None] * INPUTS + place, mask=there & (place < INPUTS), other=0.0)
            right = tl.load(matrix_rows + place, mask=inside & (place < INPUTS), other=0.0)
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
        found = total.to(outputs.dtype.element_ty)
        tl.store(outputs + row[:, None] * OUTPUTS + output[None, :], found, mask=there & tl.trans(inside))
        first += BLOCK_ROWS


Blocks = tuple[int, int, int, int]
"""Outputs and inputs of a block, stages in flight, warps."""
BLOCKS: Blocks = (64, 64, 8, 4)


def few_rows(rows: Tensor, weight: Tensor, kind: int, groups: Tensor | None, each: int = 1, blocks: Blocks | None = None) -> Tensor:
    """Rows ``[S, In]`` by matrices ``[groups, Out, In]``; `groups` is what `kind` needs: ends, or choices, `each` of a row."""
    count, (number, outputs, inputs) = len(rows), weight.shape
    if kind == CHOSEN:
        assert groups is not None
        count = number = len(groups)
    found = rows.new_empty(count, outputs)
    block_outputs, block_inputs, stages, warps = blocks or BLOCKS
    stages = max(2, 2 * stages // rows.element_size())  # numbers of four bytes take the same room in half the stages
    together = {ALL: count, SORTED: count // 2, CHOSEN: 1}[kind]
    _few_rows[(triton.cdiv(outputs, block_outputs), number)](
        rows, weight, rows if groups is None else groups, found, count, INPUTS=inputs, OUTPUTS=outputs, KIND=kind, EACH=each,
        BLOCK_ROWS=min(64, max(FEWEST, triton.next_power_of_2(together))), BLOCK_OUTPUTS=block_outputs, BLOCK_INPUTS=block_inputs,
        num_stages=stages, num_warps=warps,
    )  # fmt: skip
    return found


@triton.jit
def _norm_and_route(  # type: ignore[no-untyped-def]
    hidden, norm, router, normed, shares, experts, epsilon, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TOP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program for each row: normalised, scored by the router, the most probable experts one after the other."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK_HIDDEN)
    states = tl.load(hidden + row * HIDDEN + place, mask=place < HIDDEN, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states, 0) / HIDDEN + epsilon)
    expert = tl.arange(0, BLOCK_EXPERTS)
    logits = tl.zeros((BLOCK_EXPERTS,), tl.float32)
    for start in range(0, HIDDEN, PART):
        some = start + tl.arange(0, PART)
        known = some < HIDDEN
        part = tl.load(hidden + row * HIDDEN + some, mask=known, other=0.0).to(tl.float32) * scale
        weight = tl.load(norm + some, mask=known, other=0.0)
        part = part.to(weight.dtype) * weight
        tl.store(normed + row * HIDDEN + some, part, mask=known)
        there = (expert < EXPERTS)[:, None] & known[None, :]
        matrix = tl.load(router + expert[:, None] * HIDDEN + some[None, :], mask=there, other=0.0).to(tl.float32)
        logits += tl.sum(matrix * part.to(tl.float32)[None, :], 1)
    logits = logits.to(normed.dtype.element_ty).to(tl.float32)
    logits = tl.where(expert < EXPERTS, logits, float("-inf"))
    probable = tl.exp(logits - tl.max(logits, 0))
    left = probable / tl.sum(probable, 0)
    lane = tl.arange(0, BLOCK_TOP)
    found = tl.zeros((BLOCK_TOP,), tl.float32)
    chosen = tl.zeros((BLOCK_TOP,), tl.int32)
    for rank in tl.static_range(TOP):
        best = tl.max(left, 0)
        first = tl.min(tl.where(left == best, expert, EXPERTS - 1), 0)  # of a row of NaNs, where nothing is equal, the last one
        found = tl.where(lane == rank, best, found)
        chosen = tl.where(lane == rank, first, chosen)
        left = tl.where(expert == first, -1.0, left)
    found = found / tl.sum(found, 0)
    tl.store(shares + row * TOP + lane, found.to(shares.dtype.element_ty), mask=lane < TOP)
    tl.store(experts + row * TOP + lane, chosen.to(tl.int64), mask=lane < TOP)


def norm_and_route(hidden: Tensor, norm: Tensor, router: Tensor, epsilon: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `keural.serve.batching.device_operations.norm_and_route`."""
    rows, width = hidden.shape
    normed, shares = torch.empty_like(hidden), hidden.new_empty(rows, top_k)
    experts = torch.empty(rows, top_k, dtype=torch.int64, device=hidden.device)
    _norm_and_route[(rows,)](
        hidden, norm, router, normed, shares, experts, epsilon, HIDDEN=width, EXPERTS=len(router), TOP=top_k,
        BLOCK_HIDDEN=triton.next_power_of_2(width), BLOCK_EXPERTS=triton.next_power_of_2(len(router)),
        BLOCK_TOP=triton.next_power_of_2(top_k), PART=min(1024, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
    return normed, shares, experts


@triton.jit
def _attend_to_part(  # type: ignore[no-untyped-def]
    query, keys, values, slots, firsts, lengths, highest, totals, sums, stride_slot, stride_head, scaling,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_GROUP: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program for each part of a slot's keys, key-value head and row: the head's queries, with a running maximum and sum."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(firsts + row), tl.load(lengths + row) + 1
    size = tl.cdiv(tl.cdiv(last - first, SPLITS), KEYS) * KEYS
    begin = first + part * size
    end = tl.minimum(begin + size, last)
    lane, width = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH)
    here = (lane < GROUP)[:, None] & (width < WIDTH)[None, :]
    of_query = (row * HEADS + head) * GROUP + lane
    question = tl.load(query + of_query[:, None] * WIDTH + width[None, :], mask=here, other=0.0)
    slot = tl.load(slots + row).to(tl.int64) * stride_slot + head * stride_head
    top = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    summed = tl.zeros((BLOCK_GROUP, BLOCK_WIDTH), tl.float32)
    start = begin
    while start < end:
        column = start + tl.arange(0, KEYS)
        there = (column < end)[:, None] & (width < WIDTH)[None, :]
        at = slot + column[:, None] * WIDTH + width[None, :]
        key = tl.load(keys + at, mask=there, other=0.0)
        score = tl.dot(question, tl.trans(key), input_precision="ieee") * scaling
        score = tl.where((column < end)[None, :], score, float("-inf"))
        above = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - above[:, None])
        fading = tl.exp(top - above)
        value = tl.load(values + at, mask=there, other=0.0)
        summed = summed * fading[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * fading + tl.sum(weight, 1)
        top = above
        start += KEYS
    of_part = of_query * SPLITS + part
    tl.store(highest + of_part, top, mask=lane < GROUP)
    tl.store(totals + of_part, total, mask=lane < GROUP)
    tl.store(sums + of_part[:, None] * WIDTH + width[None, :], summed, mask=here)


@triton.jit
def _together(  # type: ignore[no-untyped-def]
    highest, totals, sums, outputs, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program for each query: the parts weighted by what they hold of the whole."""
    query, part, width = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, BLOCK_WIDTH)
    top = tl.load(highest + query * SPLITS + part)
    share = tl.exp(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(totals + query * SPLITS + part), 0)
    at = (query * SPLITS + part)[:, None] * WIDTH + width[None, :]
    summed = tl.load(sums + at, mask=(width < WIDTH)[None, :], other=0.0)
    found = tl.sum(summed * share[:, None], 0) / total
    tl.store(outputs + query * WIDTH + width, found.to(outputs.dtype.element_ty), mask=width < WIDTH)


def attend_to_slots(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, firsts: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """See `keural.serve.batching.device_operations.attend_to_slots`."""
    rows, queries, width = query.shape
    heads = keys.shape[1]
    group, block_width = queries // heads, max(16, triton.next_power_of_2(width))
    highest, totals = (torch.empty(rows, queries, SPLITS, dtype=torch.float32, device=query.device) for _ in range(2))
    sums = torch.empty(rows, queries, SPLITS, width, dtype=torch.float32, device=query.device)
    _attend_to_part[(SPLITS, heads, rows)](
        query.contiguous(), keys, values, slots, firsts, lengths, highest, totals, sums, keys.stride(0), keys.stride(1), scaling,
        HEADS=heads, GROUP=group, WIDTH=width, BLOCK_WIDTH=block_width, BLOCK_GROUP=max(FEWEST, triton.next_power_of_2(group)),
        KEYS=KEYS, SPLITS=SPLITS, num_warps=4,
    )  # fmt: skip
    found = torch.empty_like(query, memory_format=torch.contiguous_format)
    _together[(rows * queries,)](highest, totals, sums, found, WIDTH=width, BLOCK_WIDTH=block_width, SPLITS=SPLITS, num_warps=1)
    return found
