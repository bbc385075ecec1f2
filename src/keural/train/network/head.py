"""Log-probabilities of labels in pieces sized for the device: `losses.token_logprobs` for the training engine.

In: hidden states, the head's weight and labels, all on the device. Out: log-probabilities that can be differentiated. Three things
differ from the function in `losses`, none of them in the result. Pieces are as large as memory allows, because each reads the
whole head. Rows of logits are padded to a multiple of 64 while they are there (131,074 is 2 more than a multiple of 8, and
unaligned rows keep the fast matrix products away); parameter and files stay as they are. Nothing is read back from the device:
positions without a label are projected too, and count nothing.

Letters: N tokens, H hidden size, V vocabulary, V' the same padded.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keural.train.losses import LOGITS_PER_CHUNK
from keural.train.processes.modes import padded, positions_of_a_piece


def piece_size(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Positions per piece: a multiple of 128 on an accelerator, at least one on a CPU."""
    if device.type == "cpu":
        return max(1, LOGITS_PER_CHUNK // vocabulary)
    return positions_of_a_piece(vocabulary, dtype.itemsize)


def label_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, uniform: bool, piece: int | None = None) -> Tensor:
    """Log-probability of each label under softmax(hidden @ head_weight.T), without ever holding all logits.

    Args:
        hidden: ``[N, H]``; its dtype is that of the matrix products.
        head_weight: ``[V, H]``.
        labels: ``[N]``, token ids; negative where nothing is predicted.
        uniform: the loss is a multiple of the sum of what is returned, as for next-token prediction and SFT. One pass over the
            head then serves both directions; otherwise the backward pass makes the logits again. Gradients are wrong if it is
            said and not so.
        piece: positions per piece, by default `piece_size`.

    Returns:
        ``[N]`` in float32 (float64 stays float64), 0 where the label is negative.
    """
    piece = piece or piece_size(head_weight.shape[0], hidden.dtype, hidden.device)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    found: Tensor = _Logprobs.apply(hidden, head_weight, labels, piece, with_gradient, uniform)
    return found


class _Logprobs(torch.autograd.Function):
    """The formulas of `losses._ChunkedLogprobs`: with s_i = onehot(y_i) - softmax_i, zero without a label, and upstream gradients
    g_i, the gradients are g_i s_i W for h_i and sum_i g_i s_i h_i^T for W.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, piece: int, with_gradient: bool, uniform: bool) -> Tensor:
        aligned = _aligned(weight, hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(labels), dtype=wide, device=hidden.device)
        unit_hidden_gradient = torch.empty_like(hidden) if with_gradient else None
        trained = with_gradient and ctx.needs_input_grad[1]
        unit_weight_gradient = torch.zeros(aligned.shape, dtype=wide, device=hidden.device) if trained and uniform else None
        for start in range(0, len(labels), piece):
            part = slice(start, start + piece)
            logits = hidden[part] @ aligned.T
            logprobs[part] = logprobs_and_gradient(logits, labels[part], weight.shape[0], with_gradient)
            if unit_hidden_gradient is not None:
                torch.mm(logits, aligned, out=unit_hidden_gradient[part])
            if unit_weight_gradient is not None:
                add_product(unit_weight_gradient, logits.T, hidden[part])
        ctx.save_for_backward(hidden, weight, labels, unit_hidden_gradient, unit_weight_gradient)
        ctx.piece, ctx.uniform = piece, uniform
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, unit_hidden_gradient, unit_weight_gradient = ctx.saved_tensors
        upstream = gradients[0]
        hidden_gradient = (unit_hidden_gradient * upstream[:, None]).to(hidden.dtype)
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None, None, None, None
        if ctx.uniform:
            weight_gradient = torch.empty_like(weight)
            torch.mul(unit_weight_gradient[: weight.shape[0]], upstream[:1].sum(), out=weight_gradient)  # no second one in float32
        else:
            aligned = _aligned(weight, hidden.dtype)
            weight_gradient = torch.zeros(aligned.shape, dtype=upstream.dtype, device=hidden.device)
            for start in range(0, len(labels), ctx.piece):
                part = slice(start, start + ctx.piece)
                logits = hidden[part] @ aligned.T
                logprobs_and_gradient(logits, labels[part], weight.shape[0], True)
                add_product(weight_gradient, logits.T, (hidden[part] * upstream[part, None]).to(hidden.dtype))
        return hidden_gradient, weight_gradient[: weight.shape[0]].to(weight.dtype), None, None, None, None


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
