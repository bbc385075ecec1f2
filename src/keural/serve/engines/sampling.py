"""Choosing the next token.

In: the logits after the last token, the tokens so far, the settings. Out: a token id. Every engine samples here, so that the same
logits and seed give the same text everywhere. Order and definitions are those of transformers' processors.
"""

import math

import torch
from torch import Tensor

from keural.serve.engines.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
"""A temperature this small is taken as 0: logits divided by it would overflow."""

SORTABLE = 2048
"""So many candidates of the nucleus are sorted without narrowing them further."""
ENOUGH = 1e-9
"""A nucleus may miss `top_p` by so little: more than sums in float64 differ by between processors, so that none of them takes a
token more where the sum is `top_p` exactly, as among equally probable tokens."""
NARROWINGS = 20
"""Bisections tried at most: tokens of equal probability cannot be told apart."""


def choose(logits: Tensor, seen: Tensor, sampling: SamplingParams, generator: torch.Generator | None = None) -> int:
    """Draw the next token from `logits` `[V]`; with temperature 0 the most probable one after the repetition penalty.

    `seen` `[V]` (bool) marks the tokens of the prompt and the answer so far. `logits` are not changed.
    """
    if sampling.temperature < GREEDY_BELOW:
        return int(penalize(logits, seen, sampling.repetition_penalty).argmax())
    probabilities = next_token_distribution(logits, seen, sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def next_token_distribution(logits: Tensor, seen: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities `[V]` to sample from: repetition penalty, then temperature, then the nucleus, renormalized.

    Temperature must be above 0. The nucleus is the smallest set of most probable tokens whose probability reaches `top_p`
    (Holtzman et al. 2020, eq. 2-3), at least one token. It is found in float64: sums of a large vocabulary in float32 differ
    between processors, and would leave its last tokens to them.
    """
    scores = penalize(logits, seen, sampling.repetition_penalty) / sampling.temperature
    probabilities = scores.double().softmax(dim=-1)
    if sampling.top_p >= 1:
        return probabilities.to(logits.dtype)
    members = _nucleus(probabilities, sampling.top_p)
    kept = probabilities[members]
    return torch.zeros_like(logits).index_copy_(0, members, (kept / kept.sum()).to(logits.dtype))


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` `[V]` (bool) less likely (Keskar et al. 2019, section 4.1, with the sign taken into account)."""
    if penalty == 1:
        return logits
    tokens = seen.nonzero()[:, 0]
    scores = logits[tokens]
    return logits.index_copy(0, tokens, torch.where(scores > 0, scores / penalty, scores * penalty))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Ids of the nucleus's tokens, in no order; of tokens that are equally probable the first ones belong to it.

    Sorting a large vocabulary takes longer than a step of a small model, so bounds are drawn first: tokens above `high` are inside,
    those up to `low` outside, and only the ones between are sorted. The tokens up to (1 - top_p) / 2V have together at most half of
    what the nucleus may leave out, hence the first `low`.
    """
    top_p -= ENOUGH
    low, high = (1 - top_p) / (2 * probabilities.shape[0]), float(probabilities.max())
    mass = 0.0  # of the tokens above `high`
    between = probabilities > low
    for _ in range(NARROWINGS):
        if int(between.count_nonzero()) <= SORTABLE:
            break
        middle = math.sqrt(low * high)
        above = float((probabilities * (probabilities > middle)).sum())
        if above < top_p:
            high, mass = middle, above
        else:
            low = middle
        between = (probabilities > low) & (probabilities <= high)
    tokens = between.nonzero()[:, 0]
    ordered, order = probabilities[tokens].sort(descending=True, stable=True)
    before = mass + ordered.cumsum(dim=-1) - ordered
    chosen = before < top_p
    chosen[0] |= mass == 0  # with top_p 0 the most probable token is still there
    inside = (probabilities > high).nonzero()[:, 0]
    return torch.cat([inside, tokens[order[chosen]]])
