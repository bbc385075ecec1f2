"""What a model's own forward passes must show before step 0: packed neighbours do not see each other, and the reference is the
model that the stage starts from.

In: a `Trainer` before its first step. Out: figures that the run keeps, or a `UserError`. No weight, gradient or state changes;
every rank must call these functions, because sharded layers work together.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from keural.errors import UserError
from keural.model import KeuralConfig
from keural.recipe import RouterSpec
from keural.train.micro_batches import MicroBatch, micro_batches
from keural.train.objectives.preference import answer_logprobs, pair_tokens
from keural.train.processes.parallel import reshard
from keural.train.reference.online import OnlineReference
from keural.train.trainer import Trainer

LEAK = 0.01
"""A token of the document before may move a document's log-probabilities by this share of what a token of its own moves them."""
ROUNDING = 1e-6
"""Differences in log-probability up to this are none."""
REFERENCE_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.02}
"""Mean difference per token between policy and reference, before step 0, that rounding explains."""


def check_router(router: RouterSpec, config: KeuralConfig) -> None:
    """Refuse a balance loss that has no effect. Raises `UserError`."""
    if router.balance_coef > 0 and config.num_local_experts <= config.num_experts_per_tok:
        raise UserError(
            f"router.balance_coef {router.balance_coef:g} has no effect: every token uses all {config.num_local_experts} experts "
            "of a layer; set it to 0"
        )


@torch.no_grad()
def check_isolation(trainer: Trainer) -> float | None:
    """How much of a document's dependence on itself there is on its neighbour in a packed row; None where no row has neighbours.

    Measured in the first forward pass of training, on whatever computes it: the last token of a document is changed, and the
    log-probabilities of the next one must stay; changing that one's own first token shows how much they would move. Raises
    `UserError` when packed documents are not kept apart.
    """
    micro = _first(trainer)
    places = _neighbours(micro)
    if not trainer.ranks.any(places is not None):
        return None
    last, first, labels = places or (0, 0, torch.zeros(0, dtype=torch.long, device=micro.input_ids.device))
    plain = trainer.policy(micro).logprobs.flatten()
    foreign, own = (_moved(trainer, micro, plain, place, labels) for place in (last, first))
    reshard(trainer.policy)
    leak = torch.tensor([foreign > ROUNDING and foreign > LEAK * own, foreign / own if own else 0.0], dtype=torch.float64)
    leaks, share = trainer.ranks.sum(leak.to(trainer.ranks.device)).tolist()
    if leaks:
        raise UserError(
            f"{trainer.stage.name}: packed documents are not kept apart: a document's log-probabilities move by {foreign:.2g} when "
            f"the one before it changes, by {own:.2g} when it changes itself; this attention cannot train packed rows, so run with "
            "train.recompute=none and train.compile=false, and report it"
        )
    return round(float(share) / trainer.ranks.world, 9)


def _neighbours(micro: MicroBatch) -> tuple[int, int, Tensor] | None:
    """Flat positions of the last token of a document and of the first of the next one in its row, and of labels after that one."""
    length = micro.input_ids.shape[1]
    tokens, labelled = micro.token_mask.cpu().numpy(), (micro.labels >= 0).cpu().numpy()
    for row, positions in enumerate(micro.positions):
        begins = np.flatnonzero((positions == 0) & tokens[row])
        for begin, end in list(pairwise([*begins, length]))[1:]:
            found = np.flatnonzero(labelled[row, begin + 1 : end]) + begin + 1
            if found.size:
                places = torch.from_numpy(found + row * length).to(micro.input_ids.device)
                return row * length + int(begin) - 1, row * length + int(begin), places
    return None


def _moved(trainer: Trainer, micro: MicroBatch, plain: Tensor, place: int, labels: Tensor) -> float:
    """The largest change of these labels' log-probabilities when the token at `place` is another one."""
    ids = micro.input_ids.flatten().clone()
    ids[place] = (ids[place] + 1) % trainer.policy.model.config.vocab_size
    changed = trainer.policy(replace(micro, input_ids=ids.view_as(micro.input_ids))).logprobs.flatten()
    return float((changed - plain).index_select(0, labels).abs().max()) if labels.numel() else 0.0


@torch.no_grad()
def check_references(trainer: Trainer) -> float | None:
    """Mean difference per token between the policy before step 0 and the reference, which is the same model; None without one.

    Raises `UserError` when the reference values are of another model.
    """
    if trainer.references is None or isinstance(trainer.references, OnlineReference):
        return None  # what is computed in the step is computed by that model
    micro, alpha = _first(trainer), trainer.stage.dpo.ld_alpha
    with torch.set_grad_enabled(trainer.stage.train.compile):  # as the reference was computed
        policy = answer_logprobs(trainer.policy(micro).logprobs.detach(), micro, alpha)
    reshard(trainer.policy)
    differences = (policy - trainer.references(micro.pairs.sequences)).abs().sum()
    sums = torch.stack([differences.double(), pair_tokens(micro.labels, micro.pairs).sum().double()])
    total, tokens = trainer.ranks.sum(sums).tolist()
    difference = total / max(tokens, 1.0)
    if not difference <= REFERENCE_DIFFERENCE[trainer.stage.train.compute_dtype]:
        raise UserError(
            f"{trainer.stage.name}: the reference log-probabilities are those of another model: before the first step they differ "
            f"from the model's own by {difference:.3g} per token; delete its reference values and run the same command again"
        )
    return round(float(difference), 9)


def _first(trainer: Trainer) -> MicroBatch:
    """The first forward pass of this rank."""
    ranks = trainer.ranks
    batch = trainer.stream.batch(0, ranks.rank, ranks.world)
    return micro_batches(batch, trainer.stage.train.micro_batch_tokens, ranks.device)[0]
