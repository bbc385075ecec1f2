"""Losses of preference pairs, functions of log-probabilities alone: one table, by the names of `keural.recipe.PREFERENCE_LOSSES`.

In: log-probabilities of both answers of each pair under the policy and the reference, and how many tokens they have. Out: a loss
per pair, in the dtype of what is given. Nothing here knows of models, batches or weights.

Letters in the formulas: r+ and r- are the log-ratios log pi(y) - log ref(y) of the chosen and the rejected answer, |y| the number
of an answer's trained tokens, s(x) the logistic function.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from keural.recipe import DpoSpec


class Answers(NamedTuple):
    """Both answers of each pair; every tensor is ``[pairs]``."""

    chosen: Tensor
    """Summed log-probability of the chosen answer under the policy, its tail weighed by `dpo.ld_alpha`."""
    rejected: Tensor
    reference_chosen: Tensor
    """The same under the reference, without gradient; zeros where no loss needs it."""
    reference_rejected: Tensor
    chosen_tokens: Tensor
    """Trained tokens of the chosen answer."""
    rejected_tokens: Tensor
    chosen_whole: Tensor
    """Log-probability of the chosen answer under the policy, every token counted once."""

    @property
    def chosen_ratio(self) -> Tensor:
        """r+."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """r-."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """r+ - r-."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_margin(self) -> Tensor:
        """r+ / |y+| - r- / |y-|."""
        return per_token(self.chosen_ratio, self.chosen_tokens) - per_token(self.rejected_ratio, self.rejected_tokens)


def per_token(values: Tensor, tokens: Tensor) -> Tensor:
    """Sums over answers as means over their tokens; 0 for an answer without a trained token."""
    return values / tokens.clamp(min=1)


def sigmoid(answers: Answers, spec: DpoSpec) -> Tensor:
    """-log s(beta (r+ - r-)): DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With `label_smoothing` e it is (1 - e) (-log s(x)) + e (-log s(-x)), cDPO: as if a share e of the pairs were swapped (Mitchell
    2023, "A note on DPO with noisy preferences & relationship to IPO").
    """
    return _smoothed(spec.beta * answers.margin, spec.label_smoothing)


def sigmoid_norm(answers: Answers, spec: DpoSpec) -> Tensor:
    """-log s(beta (r+ / |y+| - r- / |y-|)): length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124); `beta` is
    larger by the length of an answer (5 there). `label_smoothing` as in `sigmoid`.
    """
    return _smoothed(spec.beta * answers.mean_margin, spec.label_smoothing)


def ipo(answers: Answers, spec: DpoSpec) -> Tensor:
    """(r+ / |y+| - r- / |y-| - 1 / (2 beta))^2: IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17, `beta` called tau there).

    Log-ratios are means over tokens: of sums the square would grow with the length of the answers. The paper's text does not say
    so; its authors' results and the libraries that have the loss do it.
    """
    return (answers.mean_margin - 1 / (2 * spec.beta)).square()


def hinge(answers: Answers, spec: DpoSpec) -> Tensor:
    """max(0, 1 - beta (r+ - r-)): the hinge of SLiC-HF on DPO's margin (Liu et al. 2023, RSO, arXiv:2309.06657)."""
    return F.relu(1 - spec.beta * answers.margin)


def robust(answers: Answers, spec: DpoSpec) -> Tensor:
    """((1 - e) (-log s(x)) - e (-log s(-x))) / (1 - 2 e) with x = beta (r+ - r-): rDPO (Chowdhury et al. 2024, arXiv:2403.00409).
    Its mean over pairs of which a share e = `label_smoothing` is swapped is that of `sigmoid` over the right ones.
    """
    flips, logits = spec.label_smoothing, spec.beta * answers.margin
    return (flips * F.logsigmoid(-logits) - (1 - flips) * F.logsigmoid(logits)) / (1 - 2 * flips)


def nll(answers: Answers, spec: DpoSpec) -> Tensor:
    """-log pi(y+) / |y+|: the chosen answer's negative log-likelihood per token. Only beside other losses; alone it is SFT."""
    return -per_token(answers.chosen_whole, answers.chosen_tokens)


def rpo(answers: Answers, spec: DpoSpec) -> Tensor:
    """`sigmoid` + rpo_alpha `nll`: iterative reasoning preference optimization (Pang et al. 2024, arXiv:2404.19733, eq. 1). The
    second term keeps the chosen answer's probability from falling with the rejected one's.
    """
    return _smoothed(spec.beta * answers.margin, spec.label_smoothing) + spec.rpo_alpha * nll(answers, spec)


def dpop(answers: Answers, spec: DpoSpec) -> Tensor:
    """-log s(beta (r+ - r- - dpop_lambda max(0, -r+))): DPO-Positive (Pal et al. 2024, Smaug, arXiv:2402.13228). The penalty
    acts where the chosen answer is less probable than under the reference.
    """
    penalty = spec.dpop_lambda * F.relu(-answers.chosen_ratio)
    return -F.logsigmoid(spec.beta * (answers.margin - penalty))


def simpo(answers: Answers, spec: DpoSpec) -> Tensor:
    """-log s(beta (log pi(y+) / |y+| - log pi(y-) / |y-|) - simpo_gamma): SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6),
    without a reference. `beta` is 2 to 10 there.
    """
    chosen, rejected = per_token(answers.chosen, answers.chosen_tokens), per_token(answers.rejected, answers.rejected_tokens)
    return -F.logsigmoid(spec.beta * (chosen - rejected) - spec.simpo_gamma)


PAIR_LOSSES: dict[str, Callable[[Answers, DpoSpec], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "rpo": rpo,
    "dpop": dpop,
    "simpo": simpo,
    "nll": nll,
}
"""The loss of each pair ``[pairs]``."""


def pair_loss(answers: Answers, spec: DpoSpec) -> Tensor:
    """The loss of each pair that the settings ask for: one of `PAIR_LOSSES`, or the weighted sum of several."""
    parts = [weight * PAIR_LOSSES[name](answers, spec) for name, weight in spec.weights.items()]
    return sum(parts[1:], start=parts[0])


def _smoothed(logits: Tensor, flips: float) -> Tensor:
    if flips == 0:
        return -F.logsigmoid(logits)
    return -(1 - flips) * F.logsigmoid(logits) - flips * F.logsigmoid(-logits)
