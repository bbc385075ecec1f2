"""One optimizer step, the same for every objective and any number of ranks.

In: a `Trainer` and the number of the step. Out: changed weights and a `StepReport`. The step's batch, losses and gradients do
not depend on how it is cut into micro-batches or spread over ranks: every loss is divided by counts of the whole step,
gradients are summed, and the load of the experts is that of the whole step.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keural.data.loading.stream import Batch, Stream
from keural.errors import UserError
from keural.recipe import StageSpec
from keural.train.losses import RouterStatistics, balance_loss, router_statistics, z_loss
from keural.train.micro_batches import MicroBatch, micro_batches
from keural.train.objectives.base import Objective, References
from keural.train.optimizer import clip_gradients, gradient_norm, set_learning_rate
from keural.train.policy import Policy
from keural.train.ranks import Ranks


@dataclass
class Trainer:
    """Everything a step needs."""

    stage: StageSpec
    policy: Policy
    optimizer: torch.optim.Optimizer
    objective: Objective
    stream: Stream
    ranks: Ranks
    learning_rate: Callable[[int], float]
    references: References | None = None

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.policy.model.config.num_experts_per_tok)


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimizer step over all ranks: items of the objective, real tokens, forward passes with at least one
    token.
    """

    items: int
    tokens: int
    forwards: int


@dataclass(frozen=True)
class StepReport:
    """What one step was: mean loss per item, means of the objective's metrics, router losses without coefficients, share of
    assignments per layer and expert, global gradient norm before clipping, real tokens, wall-clock seconds.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    balance_loss: float
    z_loss: float
    expert_load: list[list[float]]
    metrics: dict[str, float]


def train_step(trainer: Trainer, step: int) -> StepReport:
    """Do optimizer step `step`, counted from 0.

    Raises `UserError` when loss or gradient is not finite; the weights are then still those before the step.
    """
    started, ranks = time.perf_counter(), trainer.ranks
    batch = trainer.stream.batch(step, ranks.rank, ranks.world)
    micros = micro_batches(batch, trainer.stage.train.micro_batch_tokens, ranks.device)
    totals = count_step(trainer, batch, micros)
    loads = step_loads(trainer, micros)
    trainer.optimizer.zero_grad(set_to_none=True)
    sums = torch.stack([forward_backward(trainer, micro, totals, loads) for micro in micros]).sum(0)
    loss, metrics, router = unpack(trainer, ranks.sum(sums), totals)
    balance, z = float(balance_loss(router, router.counts, totals.tokens)), float(z_loss(router, totals.tokens))
    parameters = list(trainer.policy.parameters())
    norm = gradient_norm(parameters)
    check_finite(trainer.stage, step, loss=loss, balance_loss=balance, z_loss=z, gradient_norm=float(norm))
    clip_gradients(parameters, norm, trainer.stage.train.clip_norm)
    set_learning_rate(trainer.optimizer, trainer.learning_rate(step))
    trainer.optimizer.step()
    return StepReport(
        step=step,
        loss=loss,
        learning_rate=trainer.learning_rate(step),
        gradient_norm=float(norm),
        tokens=totals.tokens,
        seconds=time.perf_counter() - started,
        balance_loss=balance,
        z_loss=z,
        expert_load=load_shares(router.counts),
        metrics=metrics,
    )


def count_step(trainer: Trainer, batch: Batch, micros: Sequence[MicroBatch]) -> Totals:
    """The counts that losses are divided by."""
    forwards = sum(bool(micro.real.any()) for micro in micros)
    counts = torch.tensor([trainer.objective.items(batch), batch.real_tokens, forwards], device=trainer.ranks.device)
    return Totals(*trainer.ranks.sum(counts).tolist())


def step_loads(trainer: Trainer, micros: Sequence[MicroBatch]) -> Tensor | None:
    """Assignments per layer and expert ``[L, E]`` of the whole step, from a forward pass ahead where they cannot be known
    otherwise.

    None when the loss can take them from its own forward pass: one micro-batch per rank, the published scope, or no balance loss.
    """
    router = trainer.stage.router
    if len(micros) == 1 or router.scope == "micro_batch" or router.balance_coef == 0:
        return None
    with torch.no_grad():
        counts = [
            router_statistics(
                trainer.policy(micro.input_ids, micro.position_ids, None).router_logits, micro.real.flatten(), trainer.top_k
            ).counts
            for micro in micros
        ]
    return trainer.ranks.sum(torch.stack(counts).sum(0))


def forward_backward(trainer: Trainer, micro: MicroBatch, totals: Totals, loads: Tensor | None) -> Tensor:
    """Add one micro-batch's gradients; returns the sums that the step's report is made of, see `unpack`."""
    output = trainer.policy(micro.input_ids, micro.position_ids, micro.labels)
    statistics = router_statistics(output.router_logits, micro.real.flatten(), trainer.top_k)
    task = trainer.objective(output.logprobs, micro, trainer.references)
    balance, z = router_parts(trainer, statistics, totals, loads)
    router = trainer.stage.router
    (task.loss / max(totals.items, 1) + router.balance_coef * balance + router.z_coef * z).backward()
    routed = [statistics.counts.flatten(), statistics.probabilities.detach().flatten(), statistics.squares.detach()]
    return torch.cat([torch.stack([task.loss.detach(), *task.metrics.values()]), *routed])


def unpack(trainer: Trainer, sums: Tensor, totals: Totals) -> tuple[float, dict[str, float], RouterStatistics]:
    """Mean loss, means of the objective's metrics, and router statistics of the whole step."""
    names, config = trainer.objective.metrics, trainer.policy.model.config
    layers, experts = config.num_hidden_layers, config.num_local_experts
    scalars, counts, probabilities, squares = sums.split([1 + len(names), layers * experts, layers * experts, layers])
    loss, *metrics = (scalars / max(totals.items, 1)).tolist()
    router = RouterStatistics(counts.view(layers, experts), probabilities.view(layers, experts), squares, totals.tokens)
    return loss, dict(zip(names, metrics, strict=True)), router


def router_parts(trainer: Trainer, statistics: RouterStatistics, totals: Totals, loads: Tensor | None) -> tuple[Tensor, Tensor]:
    """This forward pass's parts of the step's balance and z-loss, in the scope that the recipe asks for."""
    if trainer.stage.router.scope == "micro_batch":
        share = (statistics.tokens > 0) / max(totals.forwards, 1)
        return share * balance_loss(statistics, statistics.counts, statistics.tokens), share * z_loss(statistics, statistics.tokens)
    if loads is None:
        loads = trainer.ranks.sum(statistics.counts.clone())
    return balance_loss(statistics, loads, totals.tokens), z_loss(statistics, totals.tokens)


def check_finite(stage: StageSpec, step: int, **values: float) -> None:
    """Stop at the first value that is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{stage.name}: {name} is {value} at step {step}; no weights were changed by it. Look at its batch with "
                f"`keural data show RECIPE_DIR/{stage.name}.yaml --step {step}`, or lower train.lr"
            )


def load_shares(counts: Tensor) -> list[list[float]]:
    """Share of each layer's assignments per expert."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return [[round(share, 5) for share in layer] for layer in shares.tolist()]
