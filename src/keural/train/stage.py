"""One training stage, from directories to a trained model in memory: `train_stage`.

In: a `StageJob`: settings, stores, initial weights, run directory. Out: a `StageResult`; in the run directory `metrics.jsonl`,
`plan.json`, `checkpoints/` and, for DPO, `reference/`. Calling it again with the same job goes on from the newest checkpoint
and ends with the same weights, bit for bit, as if it had never been stopped.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from keural.data.loading.corpus import Corpus
from keural.data.loading.stream import Stream
from keural.errors import UserError
from keural.files import fingerprint as fingerprint_of
from keural.files import sha256_file
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.recipe import StageSpec, length_of
from keural.train import step_plan
from keural.train.checkpoint import Checkpoints, Progress, Stored, newest_progress
from keural.train.heldout import evaluate, heldout_batches
from keural.train.initial_weights import initial_model
from keural.train.loop import StepReport, Trainer, train_step
from keural.train.metrics import Metrics
from keural.train.objectives.base import References
from keural.train.objectives.registry import OBJECTIVES
from keural.train.optimizer import build_optimizer
from keural.train.parallel import full_state_dict, prepare_layers, reshard, shard
from keural.train.policy import Policy
from keural.train.ranks import Ranks, session
from keural.train.reference import ReferenceCache
from keural.train.schedule import learning_rate
from keural.train.step_plan import StepPlan

__all__ = ["StageJob", "StageResult", "full_state_dict", "train_stage"]

LOSSES_KEPT = 10


@dataclass(frozen=True)
class StageJob:
    """What to train, on what, from where, and where to put it."""

    stage: StageSpec
    seed: int
    model_config: KeuralConfig
    init: Path | None
    """Model directory to start from; None draws random weights from `seed`."""
    train_store: Path | Corpus
    heldout_store: Path | None
    tokenizer_sha: str
    run_dir: Path
    fingerprint: str
    """Of everything that determines a step of the stage, whatever their number; checkpoints with another one are refused."""
    budget_seconds: float | None = None
    """Time for the stage, where it has a `budget_share`."""
    tensorboard: bool = False


@dataclass(frozen=True)
class StageResult:
    """What came out. `seconds`, `tokens` (real tokens seen) and `steps` include earlier runs of an interrupted stage;
    `loss_first` and `loss_last` are the mean task loss of the first and last tenth of the steps, at most ten of each; `model`
    is sharded under torchrun.
    """

    name: str
    seconds: float
    tokens: int
    steps: int
    loss_first: float
    loss_last: float
    heldout: dict[str, float]
    model: KeuralMoECausalLM
    interrupted: bool


def train_stage(job: StageJob, ranks: Ranks | None = None) -> StageResult:
    """Train a stage to its end, or until SIGINT or SIGTERM: then the step is finished and saved, and `interrupted` is True.

    Under torchrun every rank calls it, inside a `ranks.session` whose ranks are given if the model is used afterwards.

    Raises `UserError` for everything the user can mend: a store that does not fit, a damaged checkpoint, a full disk, a loss
    that is not finite.
    """
    started = time.monotonic()
    with session() as found, reproducible(found.device), StopSignals(found.world) as stop:
        run = StageRun(job, ranks or found, started)
        run.prepare(stop)
        interrupted = run.train(stop)
        return run.result(interrupted)


class StageRun:
    """The parts of a stage while it runs."""

    def __init__(self, job: StageJob, ranks: Ranks, started: float) -> None:
        self.job, self.ranks, self.started = job, ranks, started
        stage = job.stage
        self.stream = _stream(job, job.train_store, stage.train.batch_pairs)
        self.heldout = _stream(job, job.heldout_store, stage.train.batch_pairs) if job.heldout_store else None
        self.heldout_references: References | None = None
        self.checkpoints = Checkpoints(job.run_dir / "checkpoints", stage, job.fingerprint, ranks)
        self.progress = Progress()
        self.trainer = _trainer(job, self.stream, ranks)

    def prepare(self, stop: "StopSignals") -> None:
        """Fix the plan, compute references, and take up the newest checkpoint."""
        latest = self.ranks.on_main(lambda: newest_progress(self.checkpoints.directory))
        self.plan = self._fixed_plan(latest)
        spec = self.job.stage.train
        self.trainer.learning_rate = lambda step: learning_rate(step, peak=spec.lr, minimum=spec.min_lr, **asdict(self.plan))
        if self.job.stage.objective == "dpo":
            self._compute_references(stop)
        if latest is not None:
            model = self.trainer.policy.model
            self.progress = self.checkpoints.load(latest.path, model, self.trainer.optimizer)
            if why_not := step_plan.why_not_continued(StepPlan(**self.progress.plan), self.plan, self.progress.step, spec):
                raise UserError(
                    f"{latest.path}: was made for {self.progress.plan}, {self.job.run_dir / 'plan.json'} says {asdict(self.plan)}: "
                    f"{why_not}; delete that file to go on with the checkpoint's plan, or delete the checkpoints"
                )
            self.ranks.say(f"{self.job.stage.name}: resumed at step {self.progress.step} of {self.plan.steps}")
        self.progress.plan = asdict(self.plan)
        self.seconds_before = self.progress.seconds

    def train(self, stop: "StopSignals") -> bool:
        """Do the remaining steps; True when a signal came before the last one was begun."""
        progress, spec, steps = self.progress, self.job.stage.train, self.plan.steps
        saved = progress.step
        with self._metrics() as metrics:
            while progress.step < steps:
                if self.ranks.any(stop.requested):
                    if saved != progress.step:
                        self._save()
                    return True
                report = train_step(self.trainer, progress.step)
                self._advance(report)
                metrics.step(report, progress.tokens, progress.seconds)
                if progress.step == steps or _due(spec.evaluate_every, progress.step):
                    self._evaluate(metrics)
                if progress.step == steps or _due(spec.save_every, progress.step):
                    self._save()
                    saved = progress.step
        return False

    def result(self, interrupted: bool) -> StageResult:
        """The figures so far and the model."""
        progress = self.progress
        number = max(1, min(LOSSES_KEPT, progress.step // 10))
        first, latest = progress.first_losses[:number], progress.last_losses[-number:]
        self.trainer.optimizer.zero_grad(set_to_none=True)
        reshard(self.trainer.policy)
        return StageResult(
            name=self.job.stage.name,
            seconds=round(progress.seconds, 3),
            tokens=progress.tokens,
            steps=progress.step,
            loss_first=_mean(first),
            loss_last=_mean(latest),
            heldout=progress.heldout,
            model=self.trainer.policy.model,
            interrupted=interrupted,
        )

    def _advance(self, report: StepReport) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += report.tokens
        progress.seconds = self.seconds_before + time.monotonic() - self.started
        if len(progress.first_losses) < LOSSES_KEPT:
            progress.first_losses.append(report.loss)
        progress.last_losses = [*progress.last_losses, report.loss][-LOSSES_KEPT:]

    def _evaluate(self, metrics: Metrics) -> None:
        if self.heldout is not None:
            self.progress.heldout = evaluate(self.trainer, self.heldout, self.heldout_references)
            metrics.evaluation(self.progress.step - 1, self.progress.heldout)

    def _save(self) -> None:
        self.progress.seconds = self.seconds_before + time.monotonic() - self.started
        self.checkpoints.save(self.trainer.policy.model, self.trainer.optimizer, self.progress)

    def _metrics(self) -> Metrics:
        return Metrics(
            self.job.run_dir,
            self.job.stage.name,
            self.progress.step,
            self.plan.steps,
            active=self.ranks.is_main,
            tensorboard=self.job.tensorboard,
        )

    def _fixed_plan(self, latest: Stored | None) -> StepPlan:
        """The plan as it was made before the first step.

        Of a stage with a budget a checkpoint has it, too, for where the file is gone.
        """
        train = self.job.stage.train
        wanted = fingerprint_of([self.job.fingerprint, length_of(train)])
        measured = train.budget_share is not None and latest is not None
        known = StepPlan(**latest.progress.plan) if measured and latest else None
        make = (lambda: known) if known else self._make_plan
        return step_plan.load_or_make(self.job.run_dir / "plan.json", wanted, self.ranks, make)

    def _make_plan(self) -> StepPlan:
        if self.job.stage.train.budget_share is None:
            return step_plan.fixed_plan(self.job.stage, self.stream)
        assert self.job.budget_seconds is not None, "a stage with a budget_share needs budget_seconds"
        costs = step_plan.measure(self.trainer, step_plan.evaluation_rows(self.heldout), self.job.budget_seconds)
        left = self.job.budget_seconds - (time.monotonic() - self.started)
        made = step_plan.budget_plan(self.job.stage, left, costs, self.stream.steps_per_epoch)
        self.ranks.say(
            f"{self.job.stage.name}: {costs.step:.2f} s per step, {made.steps} steps ({made.warmup_steps} of warm-up) "
            f"in {self.job.budget_seconds:.0f} s"
        )
        return made

    def _compute_references(self, stop: "StopSignals") -> None:
        """Reference log-probabilities of the pairs that training and evaluation will use."""
        job, ranks, spec = self.job, self.ranks, self.job.stage.train
        weights = ranks.on_main(lambda: _weights_fingerprint(job))
        policy, exact = self.trainer.policy, spec.compile
        parts: list[tuple[str, Stream]] = [("train", self.stream)]
        if self.heldout is not None:
            parts.append(("heldout", self.heldout))
        caches = {}
        for name, stream in parts:
            key = fingerprint_of([job.fingerprint, weights, stream.store.fingerprint])
            cache = ReferenceCache(job.run_dir / "reference" / name, key, stream.store.num_sequences, ranks)
            training = (stream.batch(step, ranks.rank, ranks.world) for step in range(self.plan.steps))
            batches = training if name == "train" else heldout_batches(self.trainer, stream)
            done = cache.fill(policy, batches, spec.micro_batch_tokens, exact, lambda: stop.requested)
            if done:
                ranks.say(f"{job.stage.name}: reference log-probabilities of {done} {name} batches computed")
            caches[name] = cache
        self.trainer.references = caches["train"]
        self.heldout_references = caches.get("heldout")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _stream(job: StageJob, store: Path | Corpus, batch_pairs: int | None) -> Stream:
    """The stream over a store of this job; refuses one made with another tokenizer."""
    stage = job.stage
    rows = None if stage.train.batch_tokens is None else stage.train.batch_tokens // stage.data.sequence_length
    corpus = store if isinstance(store, Corpus) else Corpus((store,))
    settings = (stage.objective, stage.data.sequence_length, rows, batch_pairs, job.seed)
    return corpus.stream(*settings, job.tokenizer_sha, job.model_config.vocab_size)


def _trainer(job: StageJob, stream: Stream, ranks: Ranks) -> Trainer:
    """Model, optimizer and objective with their initial values, sharded over the ranks."""
    spec = job.stage.train
    policy = Policy(
        initial_model(job.model_config, job.init, job.seed, ranks.device, spec.compile), getattr(torch, spec.compute_dtype)
    )
    policy.train().to(ranks.device)
    prepare_layers(policy.model, spec)
    shard(policy, policy.model, spec, ranks)
    optimizer = build_optimizer(policy.model.named_parameters(), spec)
    objective = OBJECTIVES[job.stage.objective](job.stage)
    return Trainer(job.stage, policy, optimizer, objective, stream, ranks, learning_rate=lambda step: spec.lr)


def _weights_fingerprint(job: StageJob) -> str:
    if job.init is None:
        return f"random {job.seed}"
    return fingerprint_of({path.name: sha256_file(path) for path in sorted(job.init.glob("*.safetensors"))})


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them; only the main thread can listen.

    A second signal has its usual effect, except among several ranks: torchrun sends every worker another one at once.
    """

    def __init__(self, world: int = 1) -> None:
        self.requested = False
        self._once = world == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._once:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms inside the block: enforced on a CPU; on an accelerator chosen where they exist, with a warning
    elsewhere.
    """
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    memory.fill_uninitialized_memory = False  # only costs time: nothing here reads memory it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = filled
