"""A stage while it runs: steps, and between them what is saved, measured and judged.

In: a stage before its next step. Out: its figures and its model.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keural.data.loading.stream import Stream
from keural.errors import UserError
from keural.train.checkpoints.checkpoints import Checkpoints, tensors
from keural.train.checkpoints.manifest import Progress
from keural.train.loop import ASKED, StepReport, batch_of, left_out, train_step
from keural.train.optimization.split import SplitAdamW
from keural.train.optimization.trainable import count_trained
from keural.train.processes.parallel import reshard
from keural.train.reference.online import Reference
from keural.train.stage import step_plan
from keural.train.stage.alarms import Alarms
from keural.train.stage.health import IN_A_ROW, Watchdog, check_disk, enough_memory
from keural.train.stage.heldout import Evaluation, evaluate, has_items
from keural.train.stage.item_losses import AFTER, BEFORE, ItemLosses
from keural.train.stage.job import StageJob, StageResult
from keural.train.stage.metrics import Metrics
from keural.train.stage.signals import StopSignals
from keural.train.trainer import Trainer

LOSSES_KEPT = 10
SAVE_SECONDS = 600.0
"""Without `train.save_every`: so long after a checkpoint the next one is written."""
SAVE_SHARE = 0.05
""".. but saving may take no larger share of the time: a checkpoint that takes a minute is written every twenty."""


@dataclass
class StageRun:
    """A stage while it runs."""

    job: StageJob
    trainer: Trainer
    plan: step_plan.StepPlan
    heldout: Stream | None
    heldout_references: Reference | None
    checkpoints: Checkpoints
    progress: Progress
    began: float
    """When it would have begun if it had never been interrupted (`time.monotonic`)."""

    def train(self, stop: StopSignals) -> bool:
        """Do the remaining steps; True when a signal came before the last one was begun."""
        progress, spec, steps = self.progress, self.job.stage.train, self.plan.steps
        saved, pause, ranks = progress.step, Pause(), self.trainer.ranks
        self._check_disk()
        self.checkpoints.prepare(self.trainer.policy.model, self.trainer.optimizer)
        with self._metrics() as metrics, Watchdog(spec.stuck_after, ranks.rank) as watchdog, self._written():
            watchdog.sign(f"the evaluation before step 0 of {self.job.stage.name}")
            self._evaluate_before(metrics)
            if progress.step == steps and not self._is_measured():
                self._evaluate(metrics)
            while progress.step < steps:
                by_clock = spec.save_every is None and pause.over()
                stopped, late, writing, failed = ranks.any_of([stop.requested, by_clock, *self.checkpoints.signs])
                if failed or not writing:
                    self.checkpoints.finish()
                if saved != progress.step and (stopped or (late and not writing)):
                    self._save(pause)
                    saved = progress.step
                if stopped:
                    return True
                watchdog.sign(f"step {progress.step} of {self.job.stage.name}")
                report = self._step()
                self._advance(report)
                metrics.step(report, progress.tokens, progress.seconds)
                self._judge(report, metrics)
                if progress.step == steps or _due(spec.evaluate_every, progress.step):
                    watchdog.sign(f"the evaluation after step {report.step} of {self.job.stage.name}")
                    self._evaluate(metrics)
                if progress.step == steps or _due(spec.save_every, progress.step):
                    watchdog.sign(f"the checkpoint after step {report.step} of {self.job.stage.name}")
                    self._save(pause)
                    saved = progress.step
        return False

    def result(self, interrupted: bool) -> StageResult:
        """The figures so far and the model."""
        progress = self.progress
        number = max(1, min(LOSSES_KEPT, progress.step // 10))
        first, latest = progress.first_losses[:number], progress.last_losses[-number:]
        self.trainer.optimizer.zero_grad(set_to_none=True)
        reshard(self.trainer.policy)
        if isinstance(self.trainer.optimizer, SplitAdamW):
            self.trainer.optimizer.restore_masters(self.trainer.policy)
        if self.job.stage.train.precision == "published":
            self.trainer.policy.float()
        return StageResult(
            name=self.job.stage.name,
            seconds=round(progress.seconds, 3),
            tokens=progress.tokens,
            steps=progress.step,
            loss_first=_mean(first),
            loss_last=_mean(latest),
            heldout=progress.heldout,
            model=self.trainer.policy.model,
            trained=count_trained(self.trainer.policy.model),
            interrupted=interrupted,
            adapter=self.trainer.policy.adapter,
        )

    def _step(self) -> StepReport:
        step = self.progress.step
        if step in self.plan.skipped:
            return left_out(self.trainer, step)
        with enough_memory(self.job.stage.name, f"step {step}"):
            return train_step(self.trainer, step)

    def _judge(self, report: StepReport, metrics: Metrics) -> None:
        """Say that a step was not taken. Raises `UserError` when too many in a row were not."""
        if not report.skipped:
            return
        guard, stage = self.trainer.guard, self.job.stage
        metrics.say(f"step {report.step} is left out: {'train.steps_to_skip' if report.skipped == ASKED else report.skipped}")
        if guard.in_a_row >= IN_A_ROW:
            raise UserError(
                f"{stage.name}: {IN_A_ROW} steps in a row were spikes, the last one step {report.step}: {report.skipped}. No batch "
                f"is to blame. {batch_of(stage, report.step)}, lower train.lr, or raise train.skip_spikes; the same command "
                "goes on from the newest checkpoint"
            )

    def _check_disk(self) -> None:
        """Refuse to begin where what will be written does not fit."""
        model, spec = self.trainer.policy.model, self.job.stage.train
        checkpoint = sum(each.numel() * each.element_size() for each in tensors(model, self.trainer.optimizer).values())
        whole = 4 * sum(parameter.numel() for parameter in model.parameters())
        there = self.checkpoints.number
        job = self.job
        keep = spec.keep_checkpoints + (self.plan.steps // spec.keep_every if spec.keep_every else 0)
        self.trainer.ranks.on_main(lambda: check_disk(job.run_dir, job.stage.name, checkpoint, keep, there, whole))

    def _advance(self, report: StepReport) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += report.tokens
        if self.trainer.previous.counts is not None:
            progress.tokens_per_expert = self.trainer.previous.counts.tolist()
        progress.seconds = time.monotonic() - self.began
        guard = self.trainer.guard
        progress.taken, progress.spikes_in_a_row = guard.taken, guard.in_a_row
        if report.skipped:
            progress.spikes += report.skipped != ASKED
            return
        if len(progress.first_losses) < LOSSES_KEPT:
            progress.first_losses.append(report.loss)
        progress.last_losses = [*progress.last_losses, report.loss][-LOSSES_KEPT:]

    def _evaluate_before(self, metrics: Metrics) -> None:
        """Keep the loss of each held-out item as the stage finds it, where it has such and an earlier start has not kept them."""
        path, heldout = self.job.run_dir / BEFORE, self.heldout
        if heldout is None or not has_items(self.job.stage):
            return
        if self.trainer.ranks.on_main(lambda: ItemLosses.are_known(path, self.job, heldout)):
            return
        if self.progress.step:
            metrics.say(f"what it changes of its held-out data is not known: {BEFORE}, from before its first step, is not there")
            return
        found = evaluate(self.trainer, heldout, self.heldout_references)
        self._keep_items(found, heldout, path)
        metrics.say(f"held-out loss {found.figures['loss']:.4f} before the first step")

    def _is_measured(self) -> bool:
        """Whether a stage whose steps are all done has the figures of its end, those of held-out items included."""
        path, heldout = self.job.run_dir / AFTER, self.heldout
        if heldout is None:
            return True
        if not self.progress.heldout:
            return False
        return not has_items(self.job.stage) or self.trainer.ranks.on_main(lambda: ItemLosses.are_known(path, self.job, heldout))

    def _evaluate(self, metrics: Metrics) -> None:
        if self.heldout is not None:
            found = evaluate(self.trainer, self.heldout, self.heldout_references)
            if self.progress.step == self.plan.steps:
                self._keep_items(found, self.heldout, self.job.run_dir / AFTER)
            self.progress.heldout = found.figures
            metrics.evaluation(self.progress.step - 1, found.figures)

    def _keep_items(self, found: Evaluation, heldout: Stream, path: Path) -> None:
        if (items := found.items) is not None:
            self.trainer.ranks.on_main(lambda: ItemLosses.of(items, self.job, heldout).write(path))

    def _save(self, pause: "Pause") -> None:
        started = time.monotonic()
        self.progress.seconds = started - self.began
        self.checkpoints.begin(self.trainer.policy.model, self.trainer.optimizer, self.progress)
        pause.begin(time.monotonic() - started)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """The block ends when the latest checkpoint is whole; where something else ends it, it is waited for if that can be."""
        try:
            yield
            self.checkpoints.finish()
        except KeyboardInterrupt:  # a second signal: it does not wait
            self.checkpoints.give_up()
            raise
        except BaseException:
            self.checkpoints.leave()
            raise

    def _metrics(self) -> Metrics:
        return Metrics(
            self.job.run_dir,
            self.job.stage.name,
            self.progress.step,
            self.plan.steps,
            active=self.trainer.ranks.is_main,
            boards=self.job.boards,
            alarms=Alarms(self.job.stage),
        )


class Pause:
    """The time between checkpoints that are written by the clock."""

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, cost: float) -> None:
        """A checkpoint has been written, which took `cost` seconds."""
        self._end = time.monotonic() + max(SAVE_SECONDS, cost / SAVE_SHARE)

    def over(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() >= self._end


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
