"""Preference optimization: losses over the summed log-probabilities of pairs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.train.micro_batches import MicroBatch, PairIndices
from keural.train.objectives.base import LossTerms, References


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimization, summed over pairs; see `dpo_loss`."""

    beta: float
    uniform: ClassVar[bool] = False

    def denominator(self, batch: Batch) -> float:
        """Pairs, or the sum of their weights."""
        return len(batch.pairs) if batch.pair_weights is None else float(batch.pair_weights.sum(dtype="float64"))

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> LossTerms:
        """The loss of the pairs of a forward pass."""
        assert references is not None
        found = pair_logprobs(logprobs, micro.pairs)
        return dpo_loss(*found, *references(micro.pairs.sequences), beta=self.beta, weights=micro.pairs.weights)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    weights: Tensor | None = None,
) -> LossTerms:
    """Sum over pairs of -log sigmoid(beta * ((chosen - its reference) - (rejected - its reference))).

    The sigmoid loss of Rafailov et al. 2023, eq. 7. All four are log-probabilities ``[pairs]`` of whole answers; those of the
    reference model have no gradient. Each pair counts `weights` ``[pairs]`` times, in the metrics, too; None: once.
    """

    def total(values: Tensor) -> Tensor:
        return (values if weights is None else values * weights).sum()

    chosen_rewards, rejected_rewards = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    margins = (chosen_rewards - rejected_rewards).detach()
    metrics = {
        "reward_margin": total(margins),
        "reward_accuracy": total((margins > 0).float()),
        "reward_chosen": total(chosen_rewards.detach()),
        "reward_rejected": total(rejected_rewards.detach()),
    }
    return LossTerms(-total(F.logsigmoid(chosen_rewards - rejected_rewards)), metrics)


def pair_logprobs(logprobs: Tensor, pairs: PairIndices) -> Tensor:
    """Sums of the labels' log-probabilities ``[rows, T]`` over the sides of each pair; ``[2, pairs]``, the chosen ones first."""
    sums = torch.zeros(pairs.sequences.size, dtype=logprobs.dtype, device=logprobs.device)
    return sums.index_add(0, pairs.sides, logprobs.flatten().index_select(0, pairs.positions)).view(2, -1)
