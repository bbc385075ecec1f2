"""Log-probabilities of labels in pieces sized for the device: `losses.token_logprobs` for the training engine.

In: hidden states, the head's weight and labels, all on the device. Out: log-probabilities that can be differentiated. Three things
differ from the function in `losses`, none of them in the result. Pieces are as large as memory allows, because each reads the
whole head; one piece of logits is there at a time. Rows of logits are padded to a multiple of 64 while they are there (131,074 is 2
more than a multiple of 8, and unaligned rows keep the fast matrix products away); parameter and files stay as they are. Nothing is
read back from the device: positions without a label are projected too, and count nothing.

Letters: N tokens, H hidden size, V vocabulary, V' the same padded.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keural.train.losses import LOGITS_PER_CHUNK, SAME_DIRECTION, Weighing, pieces_of
from keural.train.processes.modes import padded, positions_of_a_piece


def piece_size(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Positions per piece: a multiple of 128 on an accelerator, at least one on a CPU."""
    if device.type == "cpu":
        return max(1, LOGITS_PER_CHUNK // vocabulary)
    return positions_of_a_piece(vocabulary, dtype.itemsize)


ROUNDING = 1e-3
"""Relative to the largest: so far apart upstream gradients and slopes may be on an accelerator, whose sums are in no order."""


def label_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    uniform: bool,
    piece: int | None = None,
    weighing: Weighing | None = None,
) -> Tensor:
    """Log-probability of each label under softmax(hidden @ head_weight.T), without ever holding all logits.

    Args:
        hidden: ``[N, H]``; its dtype is that of the matrix products.
        head_weight: ``[V, H]``.
        labels: ``[N]``, token ids; negative where nothing is predicted.
        uniform: the loss is a multiple of the sum of what is returned, as for next-token prediction and SFT. One pass over the
            head then serves both directions. Gradients are wrong if it is said and not so.
        piece: positions per piece, by default `piece_size`.
        weighing: how another loss weighs labels, up to a factor: one pass then serves both directions, but for groups that are
            larger than a piece. Without it, or on a CPU where it was not so, the backward pass makes the logits again; on an
            accelerator what was not so ends the process.

    Returns:
        ``[N]`` in float32 (float64 stays float64), 0 where the label is negative.
    """
    piece = piece or piece_size(head_weight.shape[0], hidden.dtype, hidden.device)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    told = weighing if with_gradient and head_weight.requires_grad and not uniform else None
    ends = None if told is None else [*told.ends, *([len(labels)] if told.ends[-1] < len(labels) else [])]
    lists = pieces_of(len(labels), piece, ends)
    found: Tensor = _Logprobs.apply(hidden, head_weight, labels, lists, with_gradient, uniform, told.slopes if told else None)
    return found


class _Logprobs(torch.autograd.Function):
    """The formulas of `losses._ChunkedLogprobs`: with s_i = onehot(y_i) - softmax_i, zero without a label, and upstream gradients
    g_i, the gradients are g_i s_i W for h_i and sum_i g_i s_i h_i^T for W. `uniform` or slopes w_i say what g_i is up to a factor;
    then the forward pass sums w_i s_i h_i^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        lists: list[list[slice]],
        with_gradient: bool,
        uniform: bool,
        slopes_of: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        aligned = _aligned(weight, hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        unit_hidden_gradient = torch.empty_like(hidden) if with_gradient else None
        known = with_gradient and ctx.needs_input_grad[1] and (uniform or slopes_of is not None)
        weighted_gradient = torch.zeros(aligned.shape, dtype=wide, device=hidden.device) if known else None
        slopes = None if slopes_of is None else torch.zeros_like(logprobs)
        pieces = _Pieces(hidden, aligned, labels, lists, weight.shape[0])
        for together in lists:
            for part in together:
                logits, logprobs[part] = pieces.project(part, with_gradient)
                if unit_hidden_gradient is not None:
                    torch.mm(logits, aligned, out=unit_hidden_gradient[part])
                if weighted_gradient is not None and slopes is None:
                    add_product(weighted_gradient, logits.T, hidden[part])
            if weighted_gradient is None or slopes is None or slopes_of is None:
                continue
            whole = slice(together[0].start, together[-1].stop)
            slopes[whole] = slopes_of(logprobs)[whole].to(wide)
            for part in together:
                logits = pieces.logits(part) if len(together) == 1 else pieces.project(part, True)[0]
                add_product(weighted_gradient, logits.T, (hidden[part] * slopes[part, None]).to(hidden.dtype))
        ctx.save_for_backward(hidden, weight, labels, unit_hidden_gradient, weighted_gradient, slopes)
        ctx.lists, ctx.uniform = lists, uniform
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, unit_hidden_gradient, weighted_gradient, slopes = ctx.saved_tensors
        upstream = gradients[0]
        nothing = (None,) * 5
        hidden_gradient = (unit_hidden_gradient * upstream[:, None]).to(hidden.dtype)
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, *nothing
        factor = None
        if weighted_gradient is not None:
            factor = upstream[:1].sum() if slopes is None else _factor(upstream, slopes)
        if factor is not None:
            weight_gradient = torch.empty_like(weight)
            torch.mul(weighted_gradient[: weight.shape[0]], factor, out=weight_gradient)  # no second one in float32
            return hidden_gradient, weight_gradient, *nothing
        aligned = _aligned(weight, hidden.dtype)
        weight_gradient = torch.zeros(aligned.shape, dtype=upstream.dtype, device=hidden.device)
        pieces = _Pieces(hidden, aligned, labels, ctx.lists, weight.shape[0])
        for together in ctx.lists:
            for part in together:
                logits, _ = pieces.project(part, True)
                add_product(weight_gradient, logits.T, (hidden[part] * upstream[part, None]).to(hidden.dtype))
        return hidden_gradient, weight_gradient[: weight.shape[0]].to(weight.dtype), *nothing


class _Pieces:
    """The logits of one piece at a time, in memory that all pieces share."""

    def __init__(self, hidden: Tensor, aligned: Tensor, labels: Tensor, lists: list[list[slice]], vocabulary: int) -> None:
        self.hidden, self.aligned, self.labels, self.vocabulary = hidden, aligned, labels, vocabulary
        longest = max((part.stop - part.start for together in lists for part in together), default=0)
        self._memory = hidden.new_empty(longest, aligned.shape[0])

    def logits(self, part: slice) -> Tensor:
        """What `project` has left of this piece, if it was the last one."""
        return self._memory[: part.stop - part.start]

    def project(self, part: slice, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """The logits of a piece, replaced by their gradient where one is asked for, and its log-probabilities."""
        logits = torch.mm(self.hidden[part], self.aligned.T, out=self.logits(part))
        return logits, logprobs_and_gradient(logits, self.labels[part], self.vocabulary, with_gradient)


def _factor(upstream: Tensor, slopes: Tensor) -> Tensor | None:
    """The number that `slopes` times it is `upstream`, both ``[N]``, without reading it back; None where there is none, which on an
    accelerator is an error instead.
    """
    if not len(upstream):
        return upstream.sum()
    largest = slopes.abs().argmax().view(1)
    at_most, there = slopes.index_select(0, largest), upstream.index_select(0, largest)
    factor = torch.where(at_most == 0, 0.0, there / at_most).squeeze(0)
    apart, whole = (upstream - factor * slopes).abs().max(), upstream.abs().max()
    if upstream.is_cuda:
        torch._assert_async(apart <= ROUNDING * whole)
        return factor
    return factor if bool(apart <= SAME_DIRECTION * whole) else None


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head ``[V', H]`` in `dtype`, rows of zeros at the end; a copy only where one is needed."""
    missing = padded(weight.shape[0]) - weight.shape[0]
    return F.pad(weight.to(dtype), (0, 0, 0, missing)) if missing else weight.to(dtype)


def logprobs_and_gradient(logits: Tensor, labels: Tensor, vocabulary: int, with_gradient: bool) -> Tensor:
    """Log-probabilities ``[n]`` of the labels under logits ``[n, V']``, 0 without a label; columns from V on are left out.

    With a gradient, onehot(label) - softmax replaces the logits, zero in the rows without a label and in the columns from V on.
    """
    if logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from keural.train.network.kernels import logprobs_with_gradient

        return logprobs_with_gradient(logits, labels, vocabulary, with_gradient)
    return plain_logprobs_and_gradient(logits, labels, vocabulary, with_gradient)


def plain_logprobs_and_gradient(logits: Tensor, labels: Tensor, vocabulary: int, with_gradient: bool) -> Tensor:
    """The twin of the kernel behind `logprobs_and_gradient`."""
    scores = logits[:, :vocabulary].to(torch.promote_types(logits.dtype, torch.float32))
    normalizers = scores.logsumexp(-1)
    counted = labels >= 0
    index = labels.clamp(min=0)[:, None]
    logprobs = torch.where(counted, scores.gather(-1, index).squeeze(-1) - normalizers, 0.0)
    if with_gradient:
        logit_gradient = (scores - normalizers[:, None]).exp_().neg_()
        logit_gradient.scatter_add_(-1, index, torch.ones_like(index, dtype=logit_gradient.dtype))
        logits[:, :vocabulary] = logit_gradient * counted[:, None]
        logits[:, vocabulary:] = 0
    return logprobs


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with `total` in float32 and factors in bfloat16 in one product where the device can."""
    if left.dtype != total.dtype and total.is_cuda and _adds_wide(total.device):
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right


@functools.cache
def _adds_wide(device: torch.device) -> bool:
    """Whether this torch adds a bfloat16 product to a float32 matrix in place, and rightly."""
    try:
        total = torch.ones(64, 64, device=device)
        factor = torch.eye(64, device=device, dtype=torch.bfloat16) * 2
        torch.ops.aten.addmm.dtype_out(total, factor, factor, torch.float32, out=total)
        return bool(torch.equal(total, 1 + 4 * torch.eye(64, device=device)))
    except (RuntimeError, AttributeError):
        return False
