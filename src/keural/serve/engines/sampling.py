"""Choosing the next token.

In: the logits after the last token, the tokens so far, the settings. Out: a token id. Every engine samples here, so that the same
logits and seed give the same text everywhere. Order and definitions are those of transformers' processors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keural.errors import UserError, quoted
from keural.recipe.evaluation import MAX_NEW_TOKENS, MAX_PENALTY, MAX_SEED, MAX_TEMPERATURE, MIN_PENALTY

GREEDY_BELOW = 1e-5
"""A temperature this small is taken as 0: logits divided by it would overflow."""

SORTABLE = 2048
"""So many candidates of the nucleus are sorted without narrowing them further."""
NARROWINGS = 20
"""Bisections tried at most: tokens of equal probability cannot be told apart."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are the model card's."""

    temperature: float = 0.7
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = 0.9
    """Sample from the smallest set of tokens with at least this probability."""
    repetition_penalty: float = 1.1
    """Tokens of the prompt and the answer so far: positive logits are divided by it, negative ones multiplied."""
    max_new_tokens: int = 256
    seed: int | None = None
    """Makes sampling repeatable; None draws a new seed for every answer."""

    def __post_init__(self) -> None:
        for name, (kinds, low, high) in _RANGES.items():
            value: Any = getattr(self, name)
            if name == "seed" and value is None:
                continue
            possible = isinstance(value, kinds) and not isinstance(value, bool) and bool(low <= value <= high)
            if not possible:
                raise UserError(f"impossible sampling settings: {name} {quoted(value)}; use a number from {low} to {high:,}")


_NUMBER = (int, float)
_RANGES: dict[str, tuple[Any, float, float]] = {
    "temperature": (_NUMBER, 0, MAX_TEMPERATURE),
    "top_p": (_NUMBER, 0, 1),
    "repetition_penalty": (_NUMBER, MIN_PENALTY, MAX_PENALTY),
    "max_new_tokens": ((int,), 1, MAX_NEW_TOKENS),
    "seed": ((int,), 0, MAX_SEED),
}


def choose(logits: Tensor, seen: Tensor, sampling: SamplingParams, generator: torch.Generator | None = None) -> int:
    """Draw the next token from `logits` `[V]`; with temperature 0 the most probable one after the repetition penalty.

    `seen` `[V]` (bool) marks the tokens of the prompt and the answer so far. `logits` are not changed.
    """
    if sampling.temperature < GREEDY_BELOW:
        return int(penalise(logits, seen, sampling.repetition_penalty).argmax())
    probabilities = next_token_distribution(logits, seen, sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def next_token_distribution(logits: Tensor, seen: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities `[V]` to sample from: repetition penalty, then temperature, then the nucleus, renormalised.

    Temperature must be above 0. The nucleus is the smallest set of most probable tokens whose probability reaches `top_p`
    (Holtzman et al. 2020, eq. 2-3), at least one token.
    """
    scores = penalise(logits, seen, sampling.repetition_penalty) / sampling.temperature
    probabilities = scores.softmax(dim=-1)
    if sampling.top_p >= 1:
        return probabilities
    members = _nucleus(probabilities, sampling.top_p)
    kept = probabilities[members]
    return torch.zeros_like(probabilities).index_copy_(0, members, kept / kept.sum())


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` `[V]` (bool) less likely (Keskar et al. 2019, section 4.1, with the sign taken into account)."""
    if penalty == 1:
        return logits
    tokens = seen.nonzero()[:, 0]
    scores = logits[tokens]
    return logits.index_copy(0, tokens, torch.where(scores > 0, scores / penalty, scores * penalty))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Ids of the nucleus's tokens, in no order.

    Sorting a large vocabulary takes longer than a step of a small model, so bounds are drawn first: tokens above `high` are inside,
    those up to `low` outside, and only the ones between are sorted. The tokens up to (1 - top_p) / 2V have together at most half of
    what the nucleus may leave out, hence the first `low`.
    """
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
    ordered, order = probabilities[tokens].sort(descending=True)
    before = mass + ordered.cumsum(dim=-1) - ordered
    chosen = before < top_p
    chosen[0] |= mass == 0  # with top_p 0 the most probable token is still there
    inside = (probabilities > high).nonzero()[:, 0]
    return torch.cat([inside, tokens[order[chosen]]])
