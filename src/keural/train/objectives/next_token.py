"""Next-token prediction; SFT is the same with labels on the assistant's turns only."""

from torch import Tensor

from keural.data.loading.stream import Batch
from keural.train.micro_batches import MicroBatch
from keural.train.objectives.base import References, Task


class NextToken:
    """Negative log-likelihood of every labelled token; SFT is the same, with labels on the assistant's turns only."""

    metrics = ()

    def items(self, batch: Batch) -> int:
        """Labelled tokens."""
        return batch.counted_tokens

    def __call__(self, logprobs: Tensor, micro: MicroBatch, references: References | None) -> Task:
        """Sum of negative log-likelihoods."""
        return Task(-logprobs.sum(), {})
