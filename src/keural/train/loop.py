"""One optimizer step, the same for every objective and any number of ranks.

In: a `Trainer` and the number of the step. Out: changed weights and a `StepReport`.
"""

import math
import time
from dataclasses import dataclass

from torch import Tensor

from keural.errors import UserError
from keural.recipe import StageSpec
from keural.train.gradients import accumulate_gradients
from keural.train.losses import balance_loss, z_loss
from keural.train.optimization.optimizer import gradient_norm, leave_out_step, take_step
from keural.train.trainer import Trainer

ASKED = "asked"


@dataclass(frozen=True)
class StepReport:
    """What one step was: mean loss per label or pair, means of the objective's metrics, router losses without coefficients, share
    of assignments per layer and expert, mean entropy of a token's router probabilities over the logarithm of the number of experts
    (1: all alike, 0: always one), mean lead of the most probable expert over the next, experts of all layers without any token,
    global gradient norm before clipping, tokens without padding and their share of all positions, wall-clock seconds.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    real_share: float
    seconds: float
    balance_loss: float
    z_loss: float
    routing_entropy: float
    routing_margin: float
    dead_experts: int
    expert_load: list[list[float]]
    metrics: dict[str, float]
    skipped: str = ""
    """Why the step was not taken: what of it was a spike, or `ASKED`; its weights are then those of the step before."""


def train_step(trainer: Trainer, step: int) -> StepReport:
    """Do optimizer step `step`, counted from 0.

    Raises `UserError` when loss or gradient is not finite; the weights are then still those before the step.
    """
    started = time.perf_counter()
    losses = accumulate_gradients(trainer, step)
    router, tokens = losses.router, losses.tokens
    balance, z = float(balance_loss(router, router.counts, tokens)), float(z_loss(router, tokens))
    parameters = list(trainer.policy.parameters())
    norm = gradient_norm(parameters)
    check_finite(trainer.stage, step, loss=losses.loss, balance_loss=balance, z_loss=z, gradient_norm=float(norm))
    spike = trainer.guard.spike(losses.loss, float(norm)) or ""
    if spike:
        leave_out_step(trainer.optimizer)
    else:
        trainer.before_update()
        take_step(trainer.optimizer, parameters, trainer.learning_rate(step), norm, trainer.stage.train.clip_norm)
    trainer.previous.counts = router.counts
    return StepReport(
        step=step,
        loss=losses.loss,
        learning_rate=trainer.learning_rate(step),
        gradient_norm=float(norm),
        tokens=tokens,
        real_share=tokens / losses.positions,
        seconds=time.perf_counter() - started,
        balance_loss=balance,
        z_loss=z,
        routing_entropy=float(router.entropies.mean()) / max(tokens, 1) / math.log(max(router.counts.shape[-1], 2)),
        routing_margin=float(router.margins.mean()) / max(tokens, 1),
        dead_experts=int((router.counts == 0).sum()),
        expert_load=load_shares(router.counts),
        metrics=losses.metrics,
        skipped=spike,
    )


def left_out(trainer: Trainer, step: int) -> StepReport:
    """Step `step` of which nothing is computed: `train.steps_to_skip` names it."""
    leave_out_step(trainer.optimizer)
    return StepReport(
        step=step,
        loss=math.nan,
        learning_rate=trainer.learning_rate(step),
        gradient_norm=math.nan,
        tokens=0,
        seconds=0.0,
        balance_loss=math.nan,
        z_loss=math.nan,
        real_share=math.nan,
        routing_entropy=math.nan,
        routing_margin=math.nan,
        dead_experts=0,
        expert_load=[],
        metrics={},
        skipped=ASKED,
    )


def check_finite(stage: StageSpec, step: int, **values: float) -> None:
    """Stop at the first value that is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{stage.name}: {name} is {value} at step {step}; no weights were changed by it. {batch_of(stage, step)}, "
                f"leave it out with {stage.name}.train.steps_to_skip=[{step}], or lower train.lr"
            )


def batch_of(stage: StageSpec, step: int) -> str:
    """How to see what a step was made of."""
    return f"Look at its batch with `keural data show RECIPE_DIR/{stage.name}.yaml --step {step}`"


def load_shares(counts: Tensor) -> list[list[float]]:
    """Share of each layer's assignments per expert."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return [[round(share, 5) for share in layer] for layer in shares.tolist()]
