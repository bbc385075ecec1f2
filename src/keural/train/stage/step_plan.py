"""How many steps a stage has: given, from epochs, or measured to fit a time budget; fixed before step 0.

The plan is written to `plan.json` before the first step and read by every later start, so the schedule of a stage never changes,
unless it is made longer and the steps that were done are those that the longer one begins with.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from keural.data.loading.stream import Stream
from keural.errors import UserError
from keural.files import CheckedFile
from keural.recipe import StageSpec, TrainSpec
from keural.train.loop import train_step
from keural.train.micro_batches import micro_batches
from keural.train.objectives.base import References
from keural.train.optimization.optimizer import forget
from keural.train.optimization.schedule import learning_rate
from keural.train.processes.parallel import reshard
from keural.train.processes.ranks import Ranks
from keural.train.reference.of_stage import is_cached
from keural.train.stage.heldout import has_items
from keural.train.trainer import Trainer

MEASURED_STEPS = 3
MEASURED_SHARE = 0.03
"""Measure at least so many steps, and at least for this share of the budget."""
RESERVE = 0.97
"""Share of the budget that is planned; the rest is for checkpoints and variation."""


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps of the stage, how many of them warm up, and which are not taken."""

    steps: int
    warmup_steps: int
    skipped: tuple[int, ...] = ()


class PlanFile(CheckedFile):
    """`plan.json`."""

    fingerprint: str
    """Of what the plan is for."""
    steps: int
    warmup_steps: int
    skipped: list[int] = Field(default_factory=list)
    layers: dict[str, int] | None = None
    """How many layers keep what, as the latest start chose it (`train.recompute: budget`); no part of the plan."""


@dataclass(frozen=True)
class Costs:
    """Measured seconds: of one optimizer step, of one step's forward passes alone, of one evaluation of the held-out store."""

    step: float
    forward: float
    evaluation: float


def fixed_plan(stage: StageSpec, stream: Stream) -> StepPlan:
    """The plan of a stage with `steps` or `epochs`. Raises `UserError` when the epochs are shorter than the warm-up."""
    spec = stage.train
    if spec.steps is not None:
        return StepPlan(spec.steps, spec.warmup_steps, tuple(spec.steps_to_skip))
    assert spec.epochs is not None
    steps = stream.steps_for(spec.epochs)
    if spec.warmup_steps >= steps:
        raise UserError(
            f"{stage.name}: {spec.epochs} epochs are {steps} steps, not more than train.warmup_steps {spec.warmup_steps}; "
            "lower warmup_steps or train longer"
        )
    return StepPlan(steps, spec.warmup_steps, tuple(spec.steps_to_skip))


def plan_of(record: Mapping[str, Any]) -> StepPlan:
    """The plan that a file or a checkpoint holds."""
    return StepPlan(record["steps"], record["warmup_steps"], tuple(record.get("skipped", ())))


def why_not_continued(old: StepPlan, new: StepPlan, done: int, spec: TrainSpec) -> str | None:
    """Why a stage of plan `old` that has done `done` steps cannot go on as one of plan `new`; None when it can.

    It can when the steps that were done are those that the other plan begins with: their learning rates are the same.
    """
    if done > new.steps:
        return f"{done} steps are done already, more than {new.steps}"
    if differ := sorted(step for step in {*old.skipped} ^ {*new.skipped} if step < done):
        return f"step {differ[0]} is done, and train.steps_to_skip says otherwise of it than it did"
    old_rate, new_rate = rate_of(spec, old), rate_of(spec, new)
    other = next((step for step in range(done) if old_rate(step) != new_rate(step)), None)
    if other is None:
        return None
    return (
        f"{done} steps are done, and with {new.steps} steps instead of {old.steps} the learning rate would have been another from "
        f"step {other} on (it falls to train.min_lr at the last step); a stage can be made longer while it has not fallen: while "
        "it warms up, before the last train.decay_share of its steps, or where train.min_lr is train.lr"
    )


def rate_of(spec: TrainSpec, plan: StepPlan) -> Callable[[int], float]:
    """The learning rate of each step of a stage with this plan."""
    return partial(
        learning_rate,
        steps=plan.steps,
        peak=spec.lr,
        minimum=spec.min_lr,
        warmup_steps=plan.warmup_steps,
        decay=spec.decay,
        decay_share=spec.decay_share,
    )


def budget_plan(stage: StageSpec, seconds: float, costs: Costs, epoch: int) -> StepPlan:
    """As many steps as fit into `seconds` with all evaluations and, where the objective needs one, the reference pass over the
    first epoch.

    Args:
        stage: the stage.
        seconds: what is left of the stage's budget.
        costs: measured on this machine.
        epoch: steps of one epoch.

    Returns:
        A plan of at least one step; its warm-up is at most half of it.
    """
    every = stage.train.evaluate_every
    per_step = costs.step + (costs.evaluation / every if every else 0.0)
    available = seconds * RESERVE - costs.evaluation * (1 + has_items(stage))  # those are measured before the first step, too
    if is_cached(stage):
        available -= costs.evaluation  # the reference of the held-out pairs
        steps = min(epoch, int(available / (per_step + costs.forward)))
        if steps == epoch:
            steps = int((available - epoch * costs.forward) / per_step)
    else:
        steps = int(available / per_step)
    return _measured_plan(stage, max(1, steps))


def most_steps(stage: StageSpec, stream: Stream) -> int | None:
    """The most steps of a stage with a budget, by `train.max_epochs`; None: as many as fit."""
    return None if stage.train.max_epochs is None else stream.steps_for(stage.train.max_epochs)


def bounded_plan(stage: StageSpec, plan: StepPlan, stream: Stream) -> StepPlan:
    """A plan by a budget, ended where `train.max_epochs` ends it."""
    most = most_steps(stage, stream)
    return plan if most is None or plan.steps <= most else _measured_plan(stage, most)


def _measured_plan(stage: StageSpec, steps: int) -> StepPlan:
    return StepPlan(steps, min(stage.train.warmup_steps, steps // 2), tuple(stage.train.steps_to_skip))


def load_or_make(path: Path, fingerprint: str, ranks: Ranks, make: Callable[[], StepPlan]) -> StepPlan:
    """The plan in `path` when it belongs to this stage, else a new one, written before it is used. All ranks must call it.

    Raises `UserError` when the file is damaged.
    """
    known = ranks.on_main(lambda: PlanFile.find(path))
    if known is not None and known.fingerprint == fingerprint:
        return plan_of(known.model_dump())
    made = make()

    def write() -> StepPlan:
        PlanFile(fingerprint=fingerprint, **asdict(made) | {"skipped": list(made.skipped)}).write(path)
        return made

    return ranks.on_main(write)  # rank 0's: clocks differ


def note_layers(path: Path, layers: dict[str, int] | None) -> None:
    """Write beside the plan how many layers keep what."""
    known = PlanFile.read(path)
    if known.layers != layers:
        known.model_copy(update={"layers": layers}).write(path)


def no_learning(step: int) -> float:
    """The learning rate of steps that are only measured."""
    return 0.0


def no_references(device: torch.device) -> References:
    """References for steps that are only measured."""
    return lambda sequences: torch.zeros(sequences.shape, device=device)


def measure(trainer: Trainer, heldout: Stream | None, budget_seconds: float) -> Costs:
    """Time training steps with a learning rate of 0, so that no weight changes; moments are reset afterwards. All ranks get rank
    0's figures.

    `trainer` is one with `no_learning` and, where the objective needs references, `no_references` or those of every step;
    `heldout` is what is evaluated.
    """
    train_step(trainer, 0)
    seconds: list[float] = []
    while trainer.ranks.any(len(seconds) < MEASURED_STEPS or sum(seconds) < MEASURED_SHARE * budget_seconds):
        seconds.append(_timed(partial(train_step, trainer, len(seconds))))
    work = trainer.stream.work
    step_seconds = sum(seconds) / sum(work(step) for step in range(len(seconds)))
    forward_seconds = _timed_forward(trainer) / work(0)
    trainer.optimizer.zero_grad(set_to_none=True)
    forget(trainer.optimizer)
    share = heldout.epoch_work / trainer.stream.epoch_work * trainer.stream.instances_per_epoch if heldout else 0.0
    share /= trainer.stream.batch_size
    return trainer.ranks.on_main(lambda: Costs(step_seconds, forward_seconds, forward_seconds * share))


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def _timed_forward(trainer: Trainer) -> float:
    """Seconds of one step's forward passes without gradients."""
    ranks = trainer.ranks
    batch = trainer.stream.batch(0, ranks.rank, ranks.world)
    limit = trainer.stage.train.micro_batch_tokens
    micros = [micro for part in batch.parts for micro in micro_batches(part, limit, ranks.device)]

    def forward() -> None:
        for micro in micros:
            trainer.policy(micro)

    seconds = _timed(forward)
    reshard(trainer.policy)
    return seconds
