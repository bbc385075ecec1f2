"""Next-token prediction; SFT is the same with labels on the assistant's turns only."""

from torch import Tensor

from keural.data.loading.batch import Batch
from keural.train.micro_batches import MicroBatch
from keural.train.objectives.base import LossTerms, References


class NextToken:
    """Negative log-likelihood of every labelled token; SFT is the same, with labels on the assistant's turns only."""

    uniform = True

    def denominator(self, batch: Batch) -> int:
        """Labelled tokens."""
        return batch.num_labels

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> LossTerms:
        """Sum of negative log-likelihoods."""
        return LossTerms(-logprobs.sum(), {})
