"""Preference optimization: from the log-probabilities of labels to those of answers, and the loss and metrics of pairs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.recipe import DpoSpec
from keural.train.micro_batches import MicroBatch, PairIndices
from keural.train.objectives.base import LossTerms, References
from keural.train.objectives.pairwise import Answers, pair_loss, per_token


@dataclass(frozen=True)
class Dpo:
    """A loss of `pairwise`, or several, summed over pairs."""

    spec: DpoSpec
    uniform: ClassVar[bool] = False

    def denominator(self, batch: Batch) -> float:
        """Pairs, or the sum of their weights."""
        return len(batch.pairs) if batch.pair_weights is None else float(batch.pair_weights.sum(dtype="float64"))

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> LossTerms:
        """The loss of the pairs of a forward pass."""
        return preference_terms(self.answers(logprobs, micro, references), self.spec, micro.pairs.weights)

    def answers(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> Answers:
        """Both answers of the pairs of a forward pass, from the log-probabilities ``[rows, T]`` of its labels."""
        assert references is not None or not self.spec.needs_reference
        whole, tokens = pair_logprobs(logprobs, micro.pairs), pair_tokens(micro.labels, micro.pairs)
        scored = answer_logprobs(logprobs, micro, self.spec.ld_alpha)
        reference = references(micro.pairs.sequences) if references and self.spec.needs_reference else torch.zeros_like(scored)
        return Answers(scored[0], scored[1], reference[0], reference[1], tokens[0], tokens[1], whole[0])


def preference_terms(answers: Answers, spec: DpoSpec, weights: Tensor | None = None) -> LossTerms:
    """Loss and metrics summed over pairs, of which each counts `weights` ``[pairs]`` times; None: once.

    Rewards are beta times the log-ratio to the reference, or to nothing where no loss needs one; per token where all losses are.
    `kl_estimate` is the reference's log-probability less the policy's, per token, the mean of both answers: KL(reference || policy)
    if the reference had written them, and below 0 where the policy finds them more probable.
    """

    def total(values: Tensor) -> Tensor:
        return (values if weights is None else values * weights).sum()

    detached = Answers(*(value.detach() for value in answers))
    chosen, rejected = spec.beta * detached.chosen_ratio, spec.beta * detached.rejected_ratio
    if spec.per_token:
        chosen, rejected = per_token(chosen, detached.chosen_tokens), per_token(rejected, detached.rejected_tokens)
    metrics = {
        "reward_margin": total(chosen - rejected),
        "reward_accuracy": total((chosen > rejected).to(chosen.dtype)),
        "reward_chosen": total(chosen),
        "reward_rejected": total(rejected),
        "logprob_chosen": total(detached.chosen),
        "logprob_rejected": total(detached.rejected),
        "length_chosen": total(detached.chosen_tokens),
        "length_rejected": total(detached.rejected_tokens),
    }
    if spec.needs_reference:
        drift = per_token(detached.chosen_ratio, detached.chosen_tokens) + per_token(
            detached.rejected_ratio, detached.rejected_tokens
        )
        metrics["kl_estimate"] = total(-drift / 2)
    return LossTerms(total(pair_loss(answers, spec)), metrics)


def pair_logprobs(logprobs: Tensor, pairs: PairIndices) -> Tensor:
    """Sums of the labels' log-probabilities ``[rows, T]`` over the sides of each pair; ``[2, pairs]``, the chosen ones first; of
    labelled answers ``[1, answers]``.
    """
    return _over_sides(logprobs.flatten().index_select(0, pairs.positions), pairs)


def pair_tokens(labels: Tensor, pairs: PairIndices) -> Tensor:
    """Labels ``[rows, T]`` of each side of each pair, float32 ``[2, pairs]``."""
    return _over_sides((labels.flatten().index_select(0, pairs.positions) >= 0).float(), pairs)


def answer_logprobs(logprobs: Tensor, micro: MicroBatch, ld_alpha: float = 1.0) -> Tensor:
    """As `pair_logprobs`, with the labels by which a side is longer than the other weighed by `ld_alpha`: LD-DPO (Liu et al. 2024,
    arXiv:2409.06411), where log pi(y) = sum of the tokens that both lengths have + alpha (sum of the others).
    """
    if ld_alpha == 1:
        return pair_logprobs(logprobs, micro.pairs)
    pairs = micro.pairs
    counted = (micro.labels.flatten().index_select(0, pairs.positions) >= 0).long()
    tokens = _over_sides(counted, pairs)
    shared = tokens.min(0).values.repeat(2)
    before = tokens.flatten().cumsum(0) - tokens.flatten()  # the sides' tokens stand one after another
    place = counted.cumsum(0) - before.index_select(0, pairs.sides)
    values = logprobs.flatten().index_select(0, pairs.positions)
    longer = place > shared.index_select(0, pairs.sides)
    return _over_sides(values * torch.ones_like(values).masked_fill(longer, ld_alpha), pairs)


def _over_sides(values: Tensor, pairs: PairIndices) -> Tensor:
    """Sums of one value per token of every side, in the shape of `PairIndices.sequences`."""
    sums = torch.zeros(pairs.sequences.size, dtype=values.dtype, device=values.device)
    return sums.index_add(0, pairs.sides, values).view(pairs.sequences.shape)
