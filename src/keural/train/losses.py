"""The primitives every objective is made of: log-probabilities of labels, and the router's two losses.

In: hidden states, head weight and labels; router logits and the mask of non-padding tokens. Out: log-probabilities per token that
can be differentiated, and sums from which the router losses of a whole optimizer step are put together, however it is cut.

Letters: N tokens, n labelled or non-padding tokens, H hidden size, V vocabulary, L layers, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_PER_CHUNK = 2**23
"""Logits that exist at a time: 32 MiB in float32, large enough for full speed of the matrix products."""


@dataclass(frozen=True)
class Weighing:
    """How a loss weighs labels, where that is known group by group: of preference pairs as soon as both sides are.

    `ends` says where, among the N tokens, each group of labels ends; groups follow each other. `slopes` gives the loss's gradient
    ``[N]`` from log-probabilities ``[N]`` of which those of later groups are 0; what it says of a group may depend on that group
    alone.
    """

    ends: tuple[int, ...]
    slopes: Callable[[Tensor], Tensor]


def token_logprobs(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int | None = None, weighing: Weighing | None = None
) -> Tensor:
    """Log-probability of each label under softmax(hidden @ head_weight.T), without ever holding all logits.

    Only positions with a label are projected, `chunk` of them at a time. The gradients' directions are taken from each piece
    while it is there, which is all where the loss weighs labels alike, or as `weighing` says. Otherwise, and for groups of labels
    larger than a piece, a second pass over the pieces is needed. The matrix products run in the dtype of `hidden`; softmax and all
    sums run in float32 (float64 stays float64).

    Args:
        hidden: ``[N, H]``.
        head_weight: ``[V, H]``.
        labels: ``[N]``, token ids; negative where nothing is predicted.
        chunk: positions per piece; by default so many that a piece has `LOGITS_PER_CHUNK` logits.
        weighing: how the loss weighs labels, up to a factor; None: alike. Gradients are right also where that is not so.

    Returns:
        ``[N]`` in float32, 0 where the label is negative.
    """
    counted = (labels >= 0).nonzero().squeeze(-1)
    chunk = chunk or max(1, LOGITS_PER_CHUNK // head_weight.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    logprobs = _ChunkedLogprobs.apply(
        hidden.index_select(0, counted),
        head_weight,
        labels.index_select(0, counted),
        _pieces(counted, chunk, weighing if with_gradient else None),
        with_gradient,
        _slopes_of_labels(counted, labels.shape[0], weighing),
    )
    return _spread(logprobs, counted, labels.shape[0])


def _spread(values: Tensor, places: Tensor, number: int) -> Tensor:
    """Values at their places among `number`, 0 elsewhere."""
    return torch.zeros(number, dtype=values.dtype, device=values.device).index_copy(0, places, values)


def _slopes_of_labels(counted: Tensor, number: int, weighing: Weighing | None) -> Callable[[Tensor], Tensor] | None:
    """`Weighing.slopes` from and to the labels alone."""
    if weighing is None:
        return None
    return lambda logprobs: weighing.slopes(_spread(logprobs, counted, number)).index_select(0, counted)


def _pieces(counted: Tensor, chunk: int, weighing: Weighing | None) -> list[list[slice]]:
    """The labels in pieces, in lists: between two lists the slopes of the first one are known."""
    total = len(counted)
    if weighing is None:
        return pieces_of(total, chunk)
    ends = torch.searchsorted(counted, torch.tensor(weighing.ends, device=counted.device)).tolist()
    assert total == 0 or ends[-1] == total, "every label is in a group"
    return pieces_of(total, chunk, ends)


def pieces_of(total: int, chunk: int, ends: Sequence[int] | None = None) -> list[list[slice]]:
    """`total` places in pieces of at most `chunk`, in lists. With `ends`, where groups end (the last one at `total`), a list is a
    piece of whole groups, or the pieces of one group that is larger; without, a list is a piece.
    """
    if ends is None:
        return [[slice(start, min(start + chunk, total))] for start in range(0, total, chunk)]
    found, start, last = [], 0, 0
    for end in [*ends, None]:
        if last > start and (end is None or end - start > chunk):
            found.append([slice(begin, min(begin + chunk, last)) for begin in range(start, last, chunk)])
            start = last
        last = last if end is None else end
    return found


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h W^T)[y] per row i, with upstream gradient g_i.

    With s_i = onehot(y_i) - softmax_i the gradients are g_i s_i W for h_i and sum_i g_i s_i h_i^T for W. The forward pass keeps s W
    ``[n, H]`` and, with the slopes w_i that it is told, sum_i w_i s_i h_i^T ``[V, H]``, which is the weight's gradient up to a
    factor when g is w up to that factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        pieces: list[list[slice]],
        with_gradient: bool,
        slopes_of: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        compute_weight = weight.to(hidden.dtype)
        reduce = torch.promote_types(hidden.dtype, torch.float32)
        normalizers = torch.empty(len(labels), dtype=reduce, device=hidden.device)
        logprobs = torch.zeros_like(normalizers)
        slopes = torch.ones_like(normalizers)
        unit_hidden_gradient = torch.empty_like(hidden) if with_gradient else None
        weighted_gradient = torch.zeros_like(weight, dtype=reduce) if with_gradient else None

        def project(piece: slice) -> Tensor:
            logits = F.linear(hidden[piece], compute_weight).to(reduce)
            of_labels = logits.gather(-1, labels[piece, None]).squeeze(-1)
            logits = logits.log_softmax(-1)  # one kernel, where logsumexp and what follows from it are passes of their own
            logprobs[piece] = logits.gather(-1, labels[piece, None]).squeeze(-1)
            normalizers[piece] = of_labels - logprobs[piece]
            if unit_hidden_gradient is not None:
                logits = _logit_gradient(logits, labels[piece])
                unit_hidden_gradient[piece] = logits.to(hidden.dtype) @ compute_weight
            return logits

        for together in pieces:
            logit_gradients = [project(piece) for piece in together] if len(together) == 1 else []
            for piece in together if len(together) > 1 else ():
                project(piece)
            if weighted_gradient is None:
                continue
            whole = slice(together[0].start, together[-1].stop)
            if slopes_of is not None:
                slopes[whole] = slopes_of(logprobs)[whole].to(reduce)
            for piece, logit_gradient in zip(together, logit_gradients, strict=False):
                _add_weighted(weighted_gradient, logit_gradient, slopes[piece] if slopes_of else None, hidden[piece])
            for piece in together if len(together) > 1 else ():
                logit_gradient = _again(hidden[piece], compute_weight, normalizers[piece], labels[piece])
                _add_weighted(weighted_gradient, logit_gradient, slopes[piece], hidden[piece])
        ctx.save_for_backward(hidden, weight, labels, normalizers, slopes, unit_hidden_gradient, weighted_gradient)
        ctx.pieces = [piece for together in pieces for piece in together]
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, normalizers, slopes, unit_hidden_gradient, weighted_gradient = ctx.saved_tensors
        upstream = gradients[0]
        hidden_gradient = (unit_hidden_gradient * upstream[:, None]).to(hidden.dtype)
        factor = _factor(upstream, slopes)
        if factor is not None:
            weight_gradient = weighted_gradient * factor
        else:
            weight_gradient = torch.zeros_like(weighted_gradient)
            for piece in ctx.pieces:
                logit_gradient = _again(hidden[piece], weight.to(hidden.dtype), normalizers[piece], labels[piece])
                _add_weighted(weight_gradient, logit_gradient, upstream[piece], hidden[piece])
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None, None


SAME_DIRECTION = 1e-6
"""Relative to the largest: so far apart upstream gradients and slopes may be that the loss had those slopes."""


def _factor(upstream: Tensor, slopes: Tensor) -> Tensor | None:
    """The number that `slopes` times it is `upstream`, both ``[n]``; None where there is none."""
    if len(upstream) == 0:
        return upstream.sum()
    largest = slopes.abs().argmax()
    factor = torch.where(slopes[largest] == 0, 0.0, upstream[largest] / slopes[largest])
    apart = (upstream - factor * slopes).abs().max()
    return factor if bool(apart <= SAME_DIRECTION * upstream.abs().max()) else None


def _again(hidden: Tensor, weight: Tensor, normalizers: Tensor, labels: Tensor) -> Tensor:
    """The gradient of a piece's logits, computed once more."""
    return _logit_gradient(F.linear(hidden, weight).to(normalizers.dtype).sub_(normalizers[:, None]), labels)


def _add_weighted(total: Tensor, logit_gradient: Tensor, weights: Tensor | None, hidden: Tensor) -> None:
    """Add a piece's part of the weight's gradient, its rows multiplied by `weights` in the memory of `logit_gradient`."""
    if weights is not None:
        logit_gradient.mul_(weights[:, None])
    total += logit_gradient.to(hidden.dtype).T @ hidden


def _logit_gradient(log_softmax: Tensor, labels: Tensor) -> Tensor:
    """onehot(label) - softmax, in the memory of `log_softmax`."""
    logit_gradient = log_softmax.exp_().neg_()
    logit_gradient[torch.arange(len(logit_gradient), device=logit_gradient.device), labels] += 1
    return logit_gradient


@dataclass(frozen=True)
class RouterStatistics:
    """Sums over the non-padding tokens of one forward pass, from which the router losses follow.

    `counts` ``[L, E]`` assignments per expert (no gradient), `probabilities` ``[L, E]`` summed router probabilities, `squares`
    ``[L]`` summed squared logsumexp, `entropies` ``[L]`` summed entropies of a token's router probabilities and `margins` ``[L]``
    by how much the largest of them exceeds the next (no gradients), `tokens` how many tokens were summed.
    """

    counts: Tensor
    probabilities: Tensor
    squares: Tensor
    entropies: Tensor
    margins: Tensor
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
    largest = probabilities.detach().topk(top_k, dim=-1)
    chosen, leading = largest.indices.flatten(1), largest.values
    if top_k == 1:
        leading = probabilities.detach().topk(min(2, logits.shape[-1]), dim=-1).values
    experts = torch.arange(logits.shape[-1], device=logits.device)
    counts = (chosen.unsqueeze(-1) == experts).sum(1).float()
    entropies = torch.special.entr(probabilities.detach()).sum((1, 2))
    margins = (leading[..., 0] - leading[..., 1:2].sum(-1)).sum(1)
    return RouterStatistics(counts, probabilities.sum(1), logits.logsumexp(-1).square().sum(1), entropies, margins, len(index))


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
