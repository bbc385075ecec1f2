"""What sampling is to do, in float64 and by a full sort: the oracle of the quick sampler."""

import torch
from torch import Tensor

from keural.serve.engines.sampling import ENOUGH
from keural.serve.engines.sampling_params import SamplingParams


def next_token_distribution(logits: Tensor, seen: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities `[V]`, float64, of the next token after `seen` `[V]` (bool): repetition penalty, then temperature, then the
    nucleus, renormalized. Temperature must be above 0. Of tokens that are equally probable the first ones belong to the nucleus.
    """
    scores = penalized(logits, seen, sampling.repetition_penalty) / sampling.temperature
    probabilities = scores.double().softmax(dim=-1)
    if sampling.top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    inside = ordered.cumsum(dim=-1) - ordered < sampling.top_p - ENOUGH
    inside[0] = True
    kept = torch.zeros_like(probabilities).index_copy_(0, order[inside], ordered[inside])
    return kept / kept.sum()


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def token_at(distribution: Tensor, number: float) -> int:
    """The token at the part `number` of the mass, most probable tokens first."""
    ordered, order = distribution.sort(descending=True, stable=True)
    sums = ordered.cumsum(dim=-1)
    place = int(torch.searchsorted(sums, number * sums[-1], right=True))
    return int(order[min(place, int((ordered > 0).sum()) - 1)])
