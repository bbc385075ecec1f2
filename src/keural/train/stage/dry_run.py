"""A stage tried on one batch before it is trained for days: does it fit, what does a step take, are its figures finite?

In: a `StageJob`, whose model may be missing yet. Out: a `Tried`. The batch is the one with the most work of an epoch's first
steps; it is trained on twice with the recipe's highest learning rate, so that moments are there and weights move; they are thrown
away, and nothing is written.
"""

import resource
import sys
from dataclasses import dataclass

import torch

from keural.data.loading.stream import Stream
from keural.train.checks.probes import check_isolation
from keural.train.loop import StepReport, train_step
from keural.train.memory.parts import GIB
from keural.train.objectives.registry import LOSSES
from keural.train.processes.ranks import Ranks
from keural.train.reference.of_stage import is_online
from keural.train.stage import step_plan
from keural.train.stage.building import online_reference, open_data, policy_of
from keural.train.stage.health import enough_memory
from keural.train.stage.job import StageJob
from keural.train.stage.signals import reproducible
from keural.train.trainer import Trainer

LOOKED_AT = 1000
"""Steps among which the one with the most work is looked for."""


@dataclass(frozen=True)
class Tried:
    """What the second step on the largest batch was."""

    name: str
    batch: int
    """Its number, as `keural data show --step` takes it."""
    steps: int | None
    """Of the whole stage; None where a budget decides."""
    seconds: float
    """Wall-clock time of the step."""
    tokens: int
    """Without padding, over all ranks."""
    loss: float
    peak_gib: float
    """The most memory of one rank: of its device, or, on a CPU, of the process since it began."""


def dry_run(job: StageJob, ranks: Ranks) -> Tried:
    """Take the largest step of a stage twice, and forget it.

    Every rank calls it. Raises `UserError` as training would: for data and settings that do not fit, memory that runs out, figures
    that are not finite.
    """
    stage = job.stage
    stream, _, _ = open_data(job, ranks, keep=False)
    planned = None if stage.train.budget_share is not None else step_plan.fixed_plan(stage, stream).steps
    looked_at = min(planned or LOOKED_AT, stream.steps_per_epoch, LOOKED_AT)
    batch = max(range(looked_at), key=stream.work)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    with reproducible(ranks.device), enough_memory(stage.name, f"step {batch}"):
        report = _second_step(job, stream, batch, ranks)
    peak = max(ranks.gather(_peak_bytes(ranks.device)))
    return Tried(
        name=stage.name,
        batch=batch,
        steps=planned,
        seconds=report.seconds,
        tokens=report.tokens,
        loss=report.loss,
        peak_gib=peak / GIB,
    )


def _second_step(job: StageJob, stream: Stream, batch: int, ranks: Ranks) -> StepReport:
    """The step as it is once moments are there. References that no pass has computed yet are zero, which takes as long."""
    stage = job.stage
    objective = LOSSES[stage.objective](stage)
    policy, optimizer, _ = policy_of(job, objective.uniform, ranks)
    online = online_reference(job, policy, objective.uniform, ranks) if is_online(stage) else None
    references = online or step_plan.no_references(ranks.device)
    trainer = Trainer(stage, policy, optimizer, objective, stream, ranks, lambda step: stage.train.lr, references)
    check_isolation(trainer)
    train_step(trainer, batch)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return train_step(trainer, batch)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
