"""The gradients of one optimizer step, summed over its micro-batches: the same for training, measuring and tests.

In: a `Trainer` and the number of the step. Out: every parameter's gradient, and the step's mean losses. They do not depend on how
the step is cut into micro-batches or spread over ranks: every loss is divided by counts of the whole step, gradients are summed,
and the load of the experts is that of the whole step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.recipe import OBJECTIVES
from keural.train.divergence import against_divergence
from keural.train.losses import RouterStatistics, balance_loss, router_statistics, z_loss
from keural.train.micro_batches import MicroBatch, micro_batches
from keural.train.network.neftune import noised
from keural.train.objectives.base import figures
from keural.train.reference.online import references_for
from keural.train.trainer import Trainer
from keural.train.weighing import weighing_of


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimizer step over all ranks: what the task loss is divided by (labels, pairs, their weights, or answers),
    tokens without padding, positions of all rows, forward passes with at least one token.
    """

    denominator: float
    tokens: int
    positions: int
    forwards: int


@dataclass(frozen=True)
class StepLosses:
    """Losses of a whole optimizer step over all ranks: the task loss and the objective's metrics as means over what it counts, the
    router's statistics, from which its two losses follow, the number of tokens without padding, and of positions.
    """

    loss: float
    metrics: dict[str, float]
    router: RouterStatistics
    tokens: int
    positions: int


def accumulate_gradients(trainer: Trainer, step: int) -> StepLosses:
    """Replace all gradients by those of optimizer step `step`, counted from 0, and change nothing else. Every rank must call it."""
    ranks = trainer.ranks
    batch = trainer.stream.batch(step, ranks.rank, ranks.world)
    trainer = against_divergence(trainer, [batch], trainer.references)
    micros = micro_batches(batch, trainer.stage.train.micro_batch_tokens, ranks.device)
    totals = count_step(trainer, batch, micros)
    tokens_per_expert = step_tokens_per_expert(trainer, step, batch, micros)
    trainer.optimizer.zero_grad(set_to_none=True)
    parts = [forward_backward(trainer, micro, totals, tokens_per_expert) for micro in noised(trainer, step, batch, micros)]
    sums = torch.stack(parts).sum(0)
    return unpack(trainer, ranks.sum(sums), totals)


def count_step(trainer: Trainer, batch: Batch, micros: Sequence[MicroBatch]) -> Totals:
    """The counts that losses are divided by."""
    forwards = sum(bool(micro.token_mask.any()) for micro in micros)
    counts = [trainer.objective.denominator(batch), batch.num_tokens, batch.input_ids.size, forwards]
    found = trainer.ranks.sum(torch.tensor(counts, dtype=torch.float64, device=trainer.ranks.device)).tolist()
    return Totals(found[0], *map(int, found[1:]))


def step_tokens_per_expert(trainer: Trainer, step: int, batch: Batch, micros: Sequence[MicroBatch]) -> Tensor | None:
    """Assignments per layer and expert ``[L, E]`` of the whole step, from a forward pass ahead where they cannot be known
    otherwise.

    With `router.load: lagged` it is that of the step before, and even before the first. None when the loss can take them from its
    own forward pass: one micro-batch per rank, the published scope, or no balance loss.
    """
    router = trainer.stage.router
    if router.load == "lagged":
        return trainer.previous_load()
    if len(micros) == 1 or router.scope == "micro_batch" or router.balance_coef == 0:
        return None
    with torch.no_grad():
        counts = [
            router_statistics(
                trainer.policy(micro, with_labels=False).router_logits, micro.token_mask.flatten(), trainer.top_k
            ).counts
            for micro in noised(trainer, step, batch, micros)
        ]
    return trainer.ranks.sum(torch.stack(counts).sum(0))


def forward_backward(trainer: Trainer, micro: MicroBatch, totals: Totals, tokens_per_expert: Tensor | None) -> Tensor:
    """Add one micro-batch's gradients; returns the sums that the step's losses are made of, see `unpack`."""
    references = references_for(trainer.references, micro)
    output = trainer.policy(micro, weighing=weighing_of(trainer.objective, micro, references))
    statistics = router_statistics(output.router_logits, micro.token_mask.flatten(), trainer.top_k)
    terms = trainer.objective(output.logprobs, micro, references)
    balance, z = router_losses(trainer, statistics, totals, tokens_per_expert)
    router = trainer.stage.router
    (terms.loss / (totals.denominator or 1) + router.balance_coef * balance + router.z_coef * z).backward()
    scalars = torch.stack([terms.loss.detach(), *(terms.metrics[name] for name in trainer.metrics)])
    routed = [statistics.counts.flatten(), statistics.probabilities.detach().flatten(), statistics.squares.detach()]
    return torch.cat([scalars, *routed, statistics.entropies, statistics.margins])


def unpack(trainer: Trainer, sums: Tensor, totals: Totals) -> StepLosses:
    """Means of the task loss and the metrics, and the router's statistics, from the sums over a step's forward passes."""
    names, config = trainer.metrics, trainer.policy.model.config
    layers, experts = config.num_hidden_layers, config.num_local_experts
    sizes = [1 + len(names), layers * experts, layers * experts, layers, layers, layers]
    scalars, counts, probabilities, squares, entropies, margins = sums.split(sizes)
    loss, *metrics = (scalars / (totals.denominator or 1)).tolist()
    by_expert = (counts.view(layers, experts), probabilities.view(layers, experts))
    router = RouterStatistics(*by_expert, squares, entropies, margins, totals.tokens)
    found = figures(dict(zip(names, metrics, strict=True)), OBJECTIVES[trainer.stage.objective])
    return StepLosses(loss, found, router, totals.tokens, totals.positions)


def router_losses(
    trainer: Trainer, statistics: RouterStatistics, totals: Totals, tokens_per_expert: Tensor | None
) -> tuple[Tensor, Tensor]:
    """This forward pass's parts of the step's balance and z-loss, in the scope that the recipe asks for."""
    if trainer.stage.router.scope == "micro_batch":
        share = (statistics.tokens > 0) / max(totals.forwards, 1)
        return share * balance_loss(statistics, statistics.counts, statistics.tokens), share * z_loss(statistics, statistics.tokens)
    if tokens_per_expert is None:
        tokens_per_expert = trainer.ranks.sum(statistics.counts.clone())
    return balance_loss(statistics, tokens_per_expert, totals.tokens), z_loss(statistics, totals.tokens)
