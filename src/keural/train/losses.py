"""The primitives every objective is made of: log-probabilities of labels, and the router's two losses.

In: hidden states, head weight and labels; router logits and the mask of non-padding tokens. Out: log-probabilities per token that
can be differentiated, and sums from which the router losses of a whole optimizer step are put together, however it is cut.

Letters: N tokens, n labelled or non-padding tokens, H hidden size, V vocabulary, L layers, E experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_PER_CHUNK = 2**23
"""Logits that exist at a time: 32 MiB in float32, large enough for full speed of the matrix products."""


def token_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Log-probability of each label under softmax(hidden @ head_weight.T), without ever holding all logits.

    Only positions with a label are projected, `chunk` of them at a time. The gradients' directions are taken from each piece
    while it is there; a second pass over the pieces is needed only when the loss weighs labels differently (as DPO does). The
    matrix products run in the dtype of `hidden`; softmax and all sums run in float32 (float64 stays float64).

    Args:
        hidden: ``[N, H]``.
        head_weight: ``[V, H]``.
        labels: ``[N]``, token ids; negative where nothing is predicted.
        chunk: positions per piece; by default so many that a piece has `LOGITS_PER_CHUNK` logits.

    Returns:
        ``[N]`` in float32, 0 where the label is negative.
    """
    counted = (labels >= 0).nonzero().squeeze(-1)
    chunk = chunk or max(1, LOGITS_PER_CHUNK // head_weight.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    logprobs = _ChunkedLogprobs.apply(
        hidden.index_select(0, counted), head_weight, labels.index_select(0, counted), chunk, with_gradient
    )
    return torch.zeros(labels.shape[0], dtype=logprobs.dtype, device=logprobs.device).index_copy(0, counted, logprobs)


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h W^T)[y] per row i, with upstream gradient g_i.

    With s_i = onehot(y_i) - softmax_i the gradients are g_i s_i W for h_i and sum_i g_i s_i h_i^T for W. The forward pass keeps s W
    ``[n, H]`` and sum_i s_i h_i^T ``[V, H]``, which is the weight's gradient up to a factor when all g_i are equal.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, with_gradient: bool) -> Tensor:
        compute_weight = weight.to(hidden.dtype)
        reduce = torch.promote_types(hidden.dtype, torch.float32)
        normalizers = torch.empty(len(labels), dtype=reduce, device=hidden.device)
        logprobs = torch.empty_like(normalizers)
        unit_hidden_gradient = torch.empty_like(hidden) if with_gradient else None
        unit_weight_gradient = torch.zeros_like(weight, dtype=reduce) if with_gradient else None
        for start in range(0, len(labels), chunk):
            piece = slice(start, start + chunk)
            logits = F.linear(hidden[piece], compute_weight).to(reduce)
            normalizers[piece] = logits.logsumexp(-1)
            logprobs[piece] = logits.gather(-1, labels[piece, None]).squeeze(-1) - normalizers[piece]
            if unit_hidden_gradient is not None and unit_weight_gradient is not None:
                logit_gradient = _logit_gradient(logits, normalizers[piece], labels[piece]).to(hidden.dtype)
                unit_hidden_gradient[piece] = logit_gradient @ compute_weight
                unit_weight_gradient += logit_gradient.T @ hidden[piece]
        ctx.save_for_backward(hidden, weight, labels, normalizers, unit_hidden_gradient, unit_weight_gradient)
        ctx.chunk = chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, labels, normalizers, unit_hidden_gradient, unit_weight_gradient = ctx.saved_tensors
        upstream = gradients[0]
        hidden_gradient = (unit_hidden_gradient * upstream[:, None]).to(hidden.dtype)
        if len(upstream) == 0 or bool((upstream == upstream[0]).all()):
            weight_gradient = unit_weight_gradient * upstream[:1].sum()
        else:
            weight_gradient = torch.zeros_like(unit_weight_gradient)
            for start in range(0, len(labels), ctx.chunk):
                piece = slice(start, start + ctx.chunk)
                logits = F.linear(hidden[piece], weight.to(hidden.dtype)).to(normalizers.dtype)
                logit_gradient = _logit_gradient(logits, normalizers[piece], labels[piece]).mul_(upstream[piece, None])
                weight_gradient += logit_gradient.to(hidden.dtype).T @ hidden[piece]
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None


def _logit_gradient(logits: Tensor, normalizers: Tensor, labels: Tensor) -> Tensor:
    """onehot(label) - softmax(logits), in the memory of `logits`."""
    logit_gradient = logits.sub_(normalizers[:, None]).exp_().neg_()
    logit_gradient[torch.arange(len(logit_gradient), device=logit_gradient.device), labels] += 1
    return logit_gradient


@dataclass(frozen=True)
class RouterStatistics:
    """Sums over the non-padding tokens of one forward pass, from which the router losses follow.

    `counts` ``[L, E]`` assignments per expert (no gradient), `probabilities` ``[L, E]`` summed router probabilities, `squares`
    ``[L]`` summed squared logsumexp, `entropies` ``[L]`` summed entropies of a token's router probabilities (no gradient), `tokens`
    how many tokens were summed.
    """

    counts: Tensor
    probabilities: Tensor
    squares: Tensor
    entropies: Tensor
    tokens: int


def router_statistics(router_logits: Sequence[Tensor], token_mask: Tensor, top_k: int) -> RouterStatistics:
    """Sum what the router losses need over the non-padding tokens.

    Args:
        router_logits: one ``[N, E]`` per layer, as the model returns them.
        token_mask: ``[N]`` bool, False on padding.
        top_k: K, assignments per token.
    """
    index = token_mask.nonzero().squeeze(-1)
    logits = torch.stack([layer.index_select(0, index) for layer in router_logits]).float()
    probabilities = logits.softmax(-1)
    chosen = probabilities.detach().topk(top_k, dim=-1).indices.flatten(1)
    experts = torch.arange(logits.shape[-1], device=logits.device)
    counts = (chosen.unsqueeze(-1) == experts).sum(1).float()
    entropies = torch.special.entr(probabilities.detach()).sum((1, 2))
    return RouterStatistics(counts, probabilities.sum(1), logits.logsumexp(-1).square().sum(1), entropies, len(index))


def balance_loss(statistics: RouterStatistics, counts: Tensor, tokens: int) -> Tensor:
    """This forward pass's part of the balance loss of `tokens` tokens whose assignments per expert are `counts` ``[L, E]``.

    Per layer E * sum_e f_e P_e, with f_e the share of assignments that expert e gets (they sum to 1) and P_e its mean probability;
    1 when balanced; the mean over layers is taken (Fedus et al. 2021, eq. 4-6; over a global batch: Qiu et al. 2025). f carries no
    gradient and P is a mean over tokens, so the parts of all forward passes of a step add up to the loss of one large pass.
    """
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    means = statistics.probabilities / max(tokens, 1)
    return counts.shape[-1] * (shares * means).sum(-1).mean()


def z_loss(statistics: RouterStatistics, tokens: int) -> Tensor:
    """This forward pass's part of the mean of logsumexp(logits)^2 over `tokens` tokens, mean over layers (Zoph et al. 2022, eq.
    5).
    """
    return statistics.squares.mean() / max(tokens, 1)
