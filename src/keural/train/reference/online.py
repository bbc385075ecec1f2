"""Reference log-probabilities computed in the step, by a model of their own: `dpo.reference: online`.

In: a policy whose weights stay (those under an adapter do), and a micro-batch. Out: the values that a cache would have; twice the
weights in memory (not with an adapter) and a third more work in every step, but nothing on disk and no pass ahead.
"""

import torch
from torch import Tensor

from keural.train.micro_batches import MicroBatch
from keural.train.network.policy import Policy
from keural.train.objectives.base import References
from keural.train.objectives.preference import answer_logprobs
from keural.train.processes.parallel import reshard
from keural.train.reference.cache import Compute


def values_by(policy: Policy, recording: bool = False, ld_alpha: float = 1.0) -> Compute:
    """The values that `policy` gives as it is when it is asked. Every rank must ask.

    `recording` says that gradients are recorded as training does: compiled graphs differ in the last bit otherwise. `ld_alpha`
    weighs the tokens by which an answer is longer than the other, as in training.
    """

    def compute(micro: MicroBatch) -> Tensor:
        with torch.set_grad_enabled(recording):
            return answer_logprobs(policy(micro).logprobs.detach(), micro, ld_alpha)

    return compute


class OnlineReference:
    """The values of a micro-batch's pairs by `policy`, for no other sequences: with its adapter off where it has one, else nobody
    changes its weights.
    """

    def __init__(self, policy: Policy, ld_alpha: float = 1.0) -> None:
        self.policy = policy if policy.adapter is not None else policy.requires_grad_(False)
        self._compute = values_by(policy, ld_alpha=ld_alpha)

    def of(self, micro: MicroBatch) -> References:
        """The values of this micro-batch's pairs."""
        with self.policy.without_adapter():
            values = self._compute(micro)
        reshard(self.policy)
        return lambda sequences: values


Reference = References | OnlineReference
"""Where reference values come from: looked up by sequence, or computed."""


def references_for(reference: Reference | None, micro: MicroBatch) -> References | None:
    """The values for the pairs of one micro-batch; None where the objective needs none."""
    return reference.of(micro) if isinstance(reference, OnlineReference) else reference
