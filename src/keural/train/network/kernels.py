"""Triton kernels of the training engine. Every one has a plain twin beside its caller, which a test compares it with.

Imported only where a kernel is about to run, because Triton comes with an accelerator's torch alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _logprobs_with_gradient(  # type: ignore[no-untyped-def]
    logits, labels, logprobs, stride,
    VOCABULARY: tl.constexpr, COLUMNS: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: a running maximum and sum over the row, then the gradient in place of the logits."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = logits + row.to(tl.int64) * stride
    chosen = tl.load(start + tl.maximum(label, 0)).to(tl.float32)  # here: further down another warp may have replaced it
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCABULARY, BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = tl.load(start + column, mask=column < VOCABULARY, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, score)
        # A lane that has seen nothing yet keeps its sum at zero.
        total = tl.where(above == float("-inf"), 0.0, total * tl.exp(highest - above) + tl.exp(score - above))
        highest = above
    top = tl.max(highest, 0)
    normalizer = top + tl.log(tl.sum(tl.where(highest == float("-inf"), 0.0, total * tl.exp(highest - top)), 0))
    counted = label >= 0
    tl.store(logprobs + row, tl.where(counted, chosen - normalizer, 0.0))
    if WITH_GRADIENT:
        for first in range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            score = tl.load(start + column, mask=column < VOCABULARY, other=float("-inf")).to(tl.float32)
            gradient = tl.where(column == label, 1.0, 0.0) - tl.exp(score - normalizer)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < COLUMNS)


def logprobs_with_gradient(logits: Tensor, labels: Tensor, vocabulary: int, with_gradient: bool) -> Tensor:
    """See `keural.train.network.head.plain_logprobs_and_gradient`."""
    logprobs = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    if len(labels):
        block = min(4096, triton.next_power_of_2(logits.shape[1]))
        _logprobs_with_gradient[(len(labels),)](
            logits,
            labels,
            logprobs,
            logits.stride(0),
            VOCABULARY=vocabulary,
            COLUMNS=logits.shape[1],
            WITH_GRADIENT=with_gradient,
            BLOCK=block,
            num_warps=8,
        )
    return logprobs


@triton.jit
def _split_adamw(  # type: ignore[no-untyped-def]
    weight, remainder, gradient, moment, square, moment_scale, square_scale, factor, skip, number,
    decay, step_size, root_correction, beta1, beta2, eps,
    MASTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW on ROWS blocks of BLOCK elements; see `keural.train.optimization.split.plain_update` for the formulas, step by step."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < number
    row_inside = rows.to(tl.int64) * BLOCK < number
    keep = tl.load(skip) == 0
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor)
    m_scale = tl.load(moment_scale + rows, mask=row_inside, other=0.0)
    v_scale = tl.load(square_scale + rows, mask=row_inside, other=0.0)
    code = tl.load(moment + at, mask=inside, other=0).to(tl.float32) / 127.0
    m = code * tl.abs(code) * m_scale[:, None]
    level = tl.load(square + at, mask=inside, other=0).to(tl.float32) / 255.0
    level = level * level
    v = level * level * v_scale[:, None]
    if MASTER:
        high = tl.load(weight + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(remainder + at, mask=inside, other=0).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        w = tl.load(weight + at, mask=inside, other=0.0)
    m = m * beta1 + g * (1.0 - beta1)
    v = v * beta2 + g * g * (1.0 - beta2)
    w = w * decay
    w = w - step_size * m / (tl.sqrt(v) / root_correction + eps)
    new_m_scale = tl.max(tl.abs(m), 1)
    new_v_scale = tl.max(v, 1)
    m_part = tl.sqrt(tl.abs(m) / tl.maximum(new_m_scale, 1e-38)[:, None])
    m_code = tl.floor(m_part * 127.0 + 0.5)
    m_code = tl.where(m < 0, -m_code, m_code)
    v_part = tl.sqrt(tl.sqrt(v / tl.maximum(new_v_scale, 1e-38)[:, None]))
    v_code = tl.floor(v_part * 255.0 + 0.5)
    v_code = tl.where((v > 0) & (v_code < 1), 1.0, v_code)
    write = inside & keep
    if MASTER:
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weight + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=write)
        tl.store(remainder + at, (bits - (high << 16)).to(tl.int16), mask=write)
    else:
        tl.store(weight + at, w, mask=write)
    tl.store(moment + at, m_code.to(tl.int8), mask=write)
    tl.store(square + at, v_code.to(tl.uint8), mask=write)
    tl.store(moment_scale + rows, new_m_scale, mask=row_inside & keep)
    tl.store(square_scale + rows, new_v_scale, mask=row_inside & keep)


ROWS = 8


def split_adamw(
    weight: Tensor, remainder: Tensor | None, gradient: Tensor, moment: Tensor, square: Tensor,
    moment_scale: Tensor, square_scale: Tensor, factor: Tensor, skip: Tensor,
    block: int, decay: float, step_size: float, root_correction: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """See `keural.train.optimization.split.plain_update`; all tensors flat and contiguous."""
    number = weight.numel()
    grid = (triton.cdiv(triton.cdiv(number, block), ROWS),)
    _split_adamw[grid](
        weight, moment if remainder is None else remainder, gradient, moment, square,
        moment_scale, square_scale, factor, skip, number, decay, step_size, root_correction, beta1, beta2, eps,
        MASTER=remainder is not None, ROWS=ROWS, BLOCK=block, num_warps=4,
    )  # fmt: skip
