"""Learning from single answers with a label (KTO): the loss and metrics of answers, from the log-probabilities of their labels.

In: log-probabilities under the policy and the reference, which answers are good ones, and the divergence of a step. Out: sums over
answers. Where that divergence comes from is `keural.train.divergence`'s matter.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.recipe import KtoSpec
from keural.train.micro_batches import MicroBatch
from keural.train.objectives.base import LossTerms, References
from keural.train.objectives.preference import pair_logprobs, pair_tokens


def answer_loss(ratios: Tensor, desirable: Tensor, divergence: Tensor, spec: KtoSpec) -> Tensor:
    """The loss of each answer ``[answers]``, with r = log pi(y) - log ref(y), z the divergence and s the logistic function.

    Good answers: desirable_weight (1 - s(beta (r - z))), bad ones: undesirable_weight (1 - s(beta (z - r))): KTO (Ethayarajh et al.
    2024, arXiv:2402.01306, eq. 7, without the constant). With z = 0 it is `apo_zero_unpaired` (D'Oosterlinck et al. 2024,
    arXiv:2408.06266, eq. 7, for single answers).
    """
    gains = spec.beta * (ratios - divergence)
    weights = torch.where(desirable, spec.desirable_weight, spec.undesirable_weight)
    return weights * torch.sigmoid(torch.where(desirable, -gains, gains))  # 1 - s(x) = s(-x)


@dataclass(frozen=True)
class Kto:
    """`answer_loss` summed over answers."""

    spec: KtoSpec
    divergence: Tensor | None = None
    """Of the step; None: 0."""
    uniform: ClassVar[bool] = False

    def denominator(self, batch: Batch) -> float:
        """Answers."""
        return len(batch.pairs)

    def against(self, divergence: Tensor) -> "Kto":
        """See `ComparedObjective`; a loss that does not go by it stays as it is."""
        return replace(self, divergence=divergence) if self.spec.needs_divergence else self

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> LossTerms:
        """The loss of the answers of a forward pass. Metrics are sums over the answers of one label (`figures` makes means):
        rewards are beta times the log-ratio. `kl` is the divergence, in nats per answer.
        """
        assert references is not None
        assert micro.pairs.desirable is not None
        desirable, scored = micro.pairs.desirable, pair_logprobs(logprobs, micro.pairs)[0]
        ratios = scored - references(micro.pairs.sequences)[0]
        divergence = ratios.new_zeros(()) if self.divergence is None else self.divergence.to(ratios.dtype)
        loss = answer_loss(ratios, desirable, divergence, self.spec).sum()
        figures = {
            "reward": self.spec.beta * ratios.detach(),
            "logprob": scored.detach(),
            "length": pair_tokens(micro.labels, micro.pairs)[0],
        }
        metrics = {"kl": divergence * len(ratios)}
        for label, chosen in (("desirable", desirable), ("undesirable", ~desirable)):
            metrics[label] = chosen.sum().to(ratios.dtype)
            metrics |= {f"{name}_{label}": torch.where(chosen, values, 0.0).sum() for name, values in figures.items()}
        return LossTerms(loss, metrics)
