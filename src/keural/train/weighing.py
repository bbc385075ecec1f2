"""How a loss over pairs or answers weighs the labels of each, told to the head while it has their logits.

In: an objective, rows with pairs, reference values. Out: a `Weighing`, by which one pass over the head gives log-probabilities and
gradients. It asks the objective itself, so every loss has it: what a pair adds to a loss depends on that pair alone. Where that is
not so the head notices, and takes its second pass.
"""

import torch
from torch import Tensor

from keural.train.losses import Weighing
from keural.train.micro_batches import MicroBatch
from keural.train.objectives.base import Objective, References


def weighing_of(objective: Objective, micro: MicroBatch, references: References | None) -> Weighing | None:
    """How `objective` weighs the labels of these rows; None where it weighs all alike, or there are no pairs."""
    if objective.uniform or not micro.pairs.sequences.size:
        return None

    def slopes(logprobs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            loss = objective(leaf.view_as(micro.labels), micro, references).loss
            found: Tensor = torch.autograd.grad(loss, leaf)[0]
        return found

    return Weighing(micro.pairs.ends, slopes)
