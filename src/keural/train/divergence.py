"""How far the policy has gone from its reference, measured on prompts with the answers to other ones (KTO's reference point).

In: a `Trainer` whose objective goes by it, and the batches of a step, or of a held-out store. Out: the trainer whose objective
knows it. It is one number for the whole step: the mean of log pi(y'|x) - log ref(y'|x) over its answers on all ranks, at least 0,
without gradient (Ethayarajh et al. 2024, arXiv:2402.01306). It does not depend on how the step is cut; what is measured on takes a
forward pass and no backward one, and has no part in the router's losses.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.train.micro_batches import micro_batches
from keural.train.objectives.base import ComparedObjective
from keural.train.objectives.preference import pair_logprobs
from keural.train.reference.online import Reference, references_for
from keural.train.trainer import Trainer


def against_divergence(trainer: Trainer, batches: Iterable[Batch], reference: Reference | None) -> Trainer:
    """The trainer for what these batches of this rank and those of the others make up; as it is where its objective does not go by
    a divergence. Every rank must call it.
    """
    if not isinstance(trainer.objective, ComparedObjective) or not trainer.stage.kto.needs_divergence:
        return trainer
    return replace(trainer, objective=trainer.objective.against(measured(trainer, batches, reference)))


def measured(trainer: Trainer, batches: Iterable[Batch], reference: Reference | None) -> Tensor:
    """The divergence, a number, float32. Every rank must call it."""
    ranks, limit = trainer.ranks, trainer.stage.train.micro_batch_tokens
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        assert batch.mismatched is not None
        for micro in micro_batches(batch.mismatched, limit, ranks.device):
            references = references_for(reference, micro)
            assert references is not None
            with torch.set_grad_enabled(trainer.stage.train.compile):  # as the reference was computed
                logprobs = trainer.policy(micro).logprobs.detach()
            ratios = pair_logprobs(logprobs, micro.pairs) - references(micro.pairs.sequences)
            sums += torch.stack([ratios.double().sum(), sums.new_tensor(ratios.numel())])
    total, number = ranks.sum(sums).unbind()
    found: Tensor = (total / number.clamp(min=1)).clamp(min=0).float()
    return found
