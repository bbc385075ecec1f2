"""One training stage, from directories to a trained model in memory: `train_stage`.

In: a `StageJob`: settings, stores, initial weights, run directory. Out: a `StageResult`; in the run directory `metrics.jsonl`,
`plan.json` and `checkpoints/`, for DPO also reference values, there or where the job says. Calling it again with the same job goes
on from the newest checkpoint and ends with the same weights, bit for bit, as if it had never been stopped.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from keural.data.loading.batch import Batch
from keural.data.loading.corpus import Corpus
from keural.data.loading.row_layout import RowShape
from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint as fingerprint_of
from keural.lora.layers import TrainedAdapter, adapt, store_frozen
from keural.lora.merge import weights_digest
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.stored_model import open_network
from keural.recipe import OBJECTIVES, StageSpec, TrainSpec, length_of
from keural.train import step_plan
from keural.train.alarms import Alarms
from keural.train.checkpoint import Checkpoints, Progress, Stored, newest_progress, tensors
from keural.train.checks.record import CHECKS_FILE, ChecksFile, check_data, probe
from keural.train.health import IN_A_ROW, SpikeGuard, Watchdog, check_disk, enough_memory
from keural.train.heldout import evaluate, heldout_batches
from keural.train.initial_weights import initial_model
from keural.train.loop import ASKED, StepReport, batch_of, left_out, train_step
from keural.train.metrics import Metrics
from keural.train.objectives.registry import LOSSES
from keural.train.optimizer import Optimizer, build_optimizer, build_split_optimizer
from keural.train.parallel import check_ranks, full_state_dict, prepare_layers, reshard, shard
from keural.train.policy import Compute, Policy, needs_engine
from keural.train.ranks import Ranks, session
from keural.train.reference.cache import ReferenceCache
from keural.train.reference.of_stage import identity_of, is_cached, is_online, place_of, weights_fingerprint
from keural.train.reference.online import OnlineReference, Reference, values_by
from keural.train.schedule import learning_rate
from keural.train.split import SplitAdamW
from keural.train.trainable import count_all, count_trained, freeze
from keural.train.trainer import Trainer

__all__ = ["StageJob", "StageResult", "full_state_dict", "make_references", "train_stage"]

LOSSES_KEPT = 10
COMPILED_ROWS = 128
"""Rows of pairs are filled up to a multiple of so many tokens under `train.compile`: each length is compiled once."""
SAVE_SECONDS = 600.0
"""Without `train.save_every`: so long after a checkpoint the next one is written."""
SAVE_SHARE = 0.05
""".. but saving may take no larger share of the time: a checkpoint that takes a minute is written every twenty."""


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
    references: Path | None = None
    """Where reference values are kept, by what they are computed from; None: `reference` in `run_dir`."""


@dataclass(frozen=True)
class StageResult:
    """What came out. `seconds`, `tokens` (non-padding tokens seen) and `steps` include earlier runs of an interrupted stage;
    `loss_first` and `loss_last` are the mean task loss of the first and last tenth of the steps, at most ten of each; `model`
    has float32 weights in every precision, and is sharded under torchrun; `trained` of its parameters were trained.
    """

    name: str
    seconds: float
    tokens: int
    steps: int
    loss_first: float
    loss_last: float
    heldout: dict[str, float]
    model: KeuralMoECausalLM
    trained: int
    interrupted: bool
    adapter: TrainedAdapter | None = None
    """Of a stage with `lora`; `model` is the base then, with PEFT's layers in it."""


def train_stage(job: StageJob, ranks: Ranks | None = None) -> StageResult:
    """Train a stage to its end, or until SIGINT, SIGTERM or SIGHUP: then the step is finished and saved; `interrupted` is True.

    Under torchrun every rank calls it, inside a `ranks.session` whose ranks are given if the model is used afterwards.

    Raises `UserError` for everything the user can mend: a store that does not fit, a damaged checkpoint, a full disk, a loss
    that is not finite.
    """
    started = time.monotonic()
    with session() as found, reproducible(found.device), StopSignals(found.world) as stop:
        run = open_stage(job, ranks or found, stop, started)
        interrupted = run.train(stop)
        return run.result(interrupted)


def open_stage(job: StageJob, ranks: Ranks, stop: "StopSignals", started: float) -> "StageRun":
    """The stage before its next step: with its plan, its references, and the state of its newest checkpoint.

    `started` is when this process began with it (`time.monotonic`). Raises `UserError` as `train_stage` does.
    """
    stage = job.stage
    check_ranks(stage, ranks.world)
    stream = _stream(job, job.train_store, ranks)
    heldout = _stream(job, job.heldout_store, ranks) if job.heldout_store else None
    checks = _check_data(job, stream, heldout, ranks)
    objective = LOSSES[stage.objective](stage)
    policy, optimizer, frozen = _policy(job, objective.uniform, ranks)
    checkpoints = Checkpoints(job.run_dir / "checkpoints", stage, job.fingerprint, ranks, frozen)
    online = _online(job, policy, objective.uniform, ranks) if is_online(stage) else None
    make_trainer = partial(Trainer, stage, policy, optimizer, objective, stream, ranks)

    def make_plan() -> step_plan.StepPlan:
        references = online or step_plan.no_references(ranks.device)
        measured = make_trainer(learning_rate=step_plan.no_learning, references=references)
        return _make_plan(job, measured, heldout, started)

    latest = ranks.on_main(lambda: newest_progress(checkpoints.directory))
    plan = _plan(job, latest, ranks, make_plan)
    references: tuple[Reference | None, Reference | None] = (online, online)
    if is_cached(stage):
        references = _references(job, plan.steps, policy, stream, heldout, stop, ranks, fills=False)
    guard = SpikeGuard(stage.train.skip_spikes)
    trainer = make_trainer(learning_rate=_schedule(stage, plan), references=references[0], guard=guard)
    progress = _resume(job, plan, latest, checkpoints, trainer)
    if latest is None:
        probe(job.run_dir / CHECKS_FILE, checks, trainer)
    return StageRun(job, trainer, plan, heldout, references[1], checkpoints, progress, started - progress.seconds)


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

    def train(self, stop: "StopSignals") -> bool:
        """Do the remaining steps; True when a signal came before the last one was begun."""
        progress, spec, steps = self.progress, self.job.stage.train, self.plan.steps
        saved, pause = progress.step, Pause()
        self._check_disk()
        with self._metrics() as metrics, Watchdog(spec.stuck_after, self.trainer.ranks.rank) as watchdog:
            while progress.step < steps:
                stopped, late = self.trainer.ranks.any_of([stop.requested, spec.save_every is None and pause.over()])
                if saved != progress.step and (stopped or late):
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
        if isinstance(self.trainer.optimizer, SplitAdamW):
            self.trainer.optimizer.restore_masters()
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
        self.trainer.ranks.on_main(lambda: check_disk(job.run_dir, job.stage.name, checkpoint, spec.keep_checkpoints, there, whole))

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

    def _evaluate(self, metrics: Metrics) -> None:
        if self.heldout is not None:
            self.progress.heldout = evaluate(self.trainer, self.heldout, self.heldout_references)
            metrics.evaluation(self.progress.step - 1, self.progress.heldout)

    def _save(self, pause: "Pause") -> None:
        started = time.monotonic()
        self.progress.seconds = started - self.began
        self.checkpoints.save(self.trainer.policy.model, self.trainer.optimizer, self.progress)
        pause.begin(time.monotonic() - started)

    def _metrics(self) -> Metrics:
        return Metrics(
            self.job.run_dir,
            self.job.stage.name,
            self.progress.step,
            self.plan.steps,
            active=self.trainer.ranks.is_main,
            tensorboard=self.job.tensorboard,
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


def _stream(job: StageJob, store: Path | Corpus, ranks: Ranks) -> Stream:
    """The stream over a store of this job; refuses one made with another tokenizer."""
    stage = job.stage
    rows = None if stage.train.batch_tokens is None else stage.train.batch_tokens // stage.data.sequence_length
    corpus = store if isinstance(store, Corpus) else Corpus((store,))
    settings = (stage.objective, stage.data.sequence_length, rows, stage.train.batch_pairs, job.seed)
    return corpus.stream(*settings, job.tokenizer_sha, job.model_config.vocab_size, _pair_rows(stage, ranks))


def _pair_rows(stage: StageSpec, ranks: Ranks) -> RowShape:
    """Where attention goes by documents a row of pairs is a forward pass; where it masks rows, it has room for two sequences."""
    spec = stage.train
    has_kernels = ranks.device.type == "cuda" and spec.compute_dtype == "bfloat16" and _has_engine(stage, ranks)
    goes_by_documents = _by_documents(spec, ranks) or has_kernels
    limit = spec.micro_batch_tokens if goes_by_documents else 2 * stage.data.sequence_length
    return RowShape(limit, COMPILED_ROWS if spec.compile else 1)


def _has_engine(stage: StageSpec, ranks: Ranks) -> bool:
    """Whether the training engine computes the stage."""
    return stage.lora is not None or needs_engine(stage.train, ranks)


def _by_documents(spec: TrainSpec, ranks: Ranks) -> bool:
    """Whether the model's own layers attend to one document after another; they cannot be compiled then."""
    return ranks.device.type == "cpu" and not spec.compile


def _check_data(job: StageJob, stream: Stream, heldout: Stream | None, ranks: Ranks, keep: bool = True) -> ChecksFile:
    """What the stage's data was checked for. Raises `UserError` as the checks do."""
    path = job.run_dir / CHECKS_FILE if keep else None
    streams = {"training": stream} | ({"held-out": heldout} if heldout else {})
    found, lines = ranks.on_main(lambda: check_data(path, job.stage, job.model_config, streams))
    for line in lines:
        ranks.log_once(f"{job.stage.name}: {line}")
    return found


def _policy(job: StageJob, uniform: bool, ranks: Ranks) -> tuple[Policy, Optimizer, str]:
    """Model and optimizer with their initial values, sharded over the ranks; and the digest of what is frozen."""
    spec = job.stage.train
    chats = OBJECTIVES[job.stage.objective].store != "documents"
    settings = (job.model_config, job.init, job.seed, ranks.device, spec.compile, job.tokenizer_sha)
    model = initial_model(*settings, chats=chats, say=ranks.log_once)
    adapter = _adapter(job, model)
    frozen = adapter.base_digest if adapter else freeze(model, job.stage.router)
    if (trained := count_trained(model)) < (total := count_all(model)):
        ranks.log_once(f"{job.stage.name}: trains {trained:,} of {total:,} parameters")
    engine = _engine(job, uniform, ranks)
    policy = Policy(model, getattr(torch, spec.compute_dtype), engine, adapter, by_documents=_by_documents(spec, ranks)).train()
    if spec.precision != "fp32":
        optimizer = build_split_optimizer(model, spec, ranks.device)
        policy.to(ranks.device)  # what the optimizer has not moved
        return policy, optimizer, frozen
    if ranks.world == 1:
        policy.to(ranks.device)
    if policy.engine is None:
        prepare_layers(model, spec)
    shard(policy, model, spec, ranks)  # brings it to the device
    return policy, build_optimizer(model, spec), frozen


def _online(job: StageJob, policy: Policy, uniform: bool, ranks: Ranks) -> OnlineReference:
    """What computes reference values in each step: the policy with its adapter off, or a second one whose weights stay."""
    return OnlineReference(policy if policy.adapter is not None else _policy(job, uniform, ranks)[0], job.stage.dpo.ld_alpha)


def _adapter(job: StageJob, model: KeuralMoECausalLM) -> TrainedAdapter | None:
    """Adapters around the model's layers, where the stage trains them. Raises `UserError` for a model that had to be changed."""
    lora = job.stage.lora
    if lora is None:
        return None
    assert job.init is not None, "the recipe refuses adapters of random weights"
    stored = open_network(job.init, verify=False)  # the model's weights were verified when they were read
    if stored.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{job.stage.name}: {job.init} has no rows for the two ChatML ids, and an adapter has no place for new ones; import it "
            "again with --grow-vocabulary, or train the whole model"
        )
    adapter = adapt(model, lora, job.seed, job.init, weights_digest(stored.weights))
    store_frozen(model, getattr(torch, lora.base_dtype))
    return adapter


def _engine(job: StageJob, uniform: bool, ranks: Ranks) -> Compute | None:
    """The training engine, where the stage needs it, as adapters do; importing it takes seconds."""
    if not _has_engine(job.stage, ranks):
        return None
    from keural.train.engine import engine_for

    return engine_for(job.stage.train, job.model_config, ranks.device, uniform)


def _plan(job: StageJob, latest: Stored | None, ranks: Ranks, make: Callable[[], step_plan.StepPlan]) -> step_plan.StepPlan:
    """The plan as it was made before the first step.

    Of a stage with a budget a checkpoint has it, too, for where the file is gone.
    """
    wanted = fingerprint_of([job.fingerprint, length_of(job.stage.train)])
    if latest is not None and job.stage.train.budget_share is not None:
        known = step_plan.plan_of(latest.progress.plan)
        return step_plan.load_or_make(job.run_dir / "plan.json", wanted, ranks, lambda: known)
    return step_plan.load_or_make(job.run_dir / "plan.json", wanted, ranks, make)


def _make_plan(job: StageJob, measured: Trainer, heldout: Stream | None, started: float) -> step_plan.StepPlan:
    """As the settings say, or as many steps as fit into the budget by what `measured` takes."""
    stage, stream = job.stage, measured.stream
    if stage.train.budget_share is None:
        return step_plan.fixed_plan(stage, stream)
    assert job.budget_seconds is not None, "a stage with a budget_share needs budget_seconds"
    costs = step_plan.measure(measured, heldout, job.budget_seconds)
    left = job.budget_seconds - (time.monotonic() - started)
    made = step_plan.budget_plan(stage, left, costs, stream.steps_per_epoch)
    measured.ranks.log_once(
        f"{stage.name}: {costs.step:.2f} s per step, {made.steps} steps ({made.warmup_steps} of warm-up) "
        f"in {job.budget_seconds:.0f} s"
    )
    return made


def _schedule(stage: StageSpec, plan: step_plan.StepPlan) -> Callable[[int], float]:
    """The learning rate of each step."""
    return partial(learning_rate, steps=plan.steps, peak=stage.train.lr, minimum=stage.train.min_lr, warmup_steps=plan.warmup_steps)


def _references(
    job: StageJob,
    steps: int,
    policy: Policy,
    stream: Stream,
    heldout: Stream | None,
    stop: "StopSignals",
    ranks: Ranks,
    fills: bool,
) -> tuple[ReferenceCache, ReferenceCache | None]:
    """Reference log-probabilities of what `steps` steps and an evaluation will use; what is missing is computed by the policy with
    its initial weights, unless the recipe names a directory that has them, and `fills` does not ask for it.
    """
    stage = job.stage
    weights = ranks.on_main(lambda: weights_fingerprint(job.init, job.seed))
    identity = identity_of(stage, job.model_config, job.tokenizer_sha, weights)
    place = ranks.on_main(lambda: place_of(stage, identity, job.references or job.run_dir / "reference"))

    def found(name: str, stream: Stream, batches: Callable[[], Iterable[Batch]]) -> ReferenceCache:
        assert isinstance(stream.store, TokenStore)  # of pairs
        cache = place.cache(stream.store, ranks)
        if place.given and not fills:
            place.check(cache, batches(), name)
            return cache
        compute = values_by(policy, recording=stage.train.compile, ld_alpha=stage.dpo.ld_alpha)
        with policy.without_adapter():
            done = cache.fill(compute, batches(), stage.train.micro_batch_tokens, lambda: stop.requested)
        reshard(policy)
        if done:
            ranks.log_once(f"{stage.name}: reference log-probabilities of {done} {name} batches computed")
        return cache

    training = found("train", stream, lambda: (stream.batch(step, ranks.rank, ranks.world) for step in range(steps)))
    if heldout is None:
        return training, None
    return training, found("heldout", heldout, lambda: heldout_batches(stage, heldout, ranks))


def make_references(job: StageJob, ranks: Ranks | None = None) -> bool:
    """Compute the reference values that a stage is going to need, and nothing else; False when a signal stopped it before the end.

    Every rank calls it. Raises `UserError` as `train_stage` does, and for a stage that keeps no reference values.
    """
    if not is_cached(job.stage):
        raise UserError(f"{job.stage.name}: keeps no reference values; train it without --reference-only")
    with session() as found, reproducible(found.device), StopSignals(found.world) as stop:
        ranks = ranks or found
        check_ranks(job.stage, ranks.world)
        stream = _stream(job, job.train_store, ranks)
        heldout = _stream(job, job.heldout_store, ranks) if job.heldout_store else None
        _check_data(job, stream, heldout, ranks, keep=False)
        policy, *_ = _policy(job, LOSSES[job.stage.objective](job.stage).uniform, ranks)
        measured = job.stage.train.budget_share is not None
        steps = stream.steps_per_epoch if measured else step_plan.fixed_plan(job.stage, stream).steps
        training, _ = _references(job, steps, policy, stream, heldout, stop, ranks, fills=True)
        if ranks.any(stop.requested):
            return False
        ranks.log_once(f"{job.stage.name}: the reference values of its pairs are in {training.file.directory}")
        return True


def _resume(job: StageJob, plan: step_plan.StepPlan, latest: Stored | None, checkpoints: Checkpoints, trainer: Trainer) -> Progress:
    """Take up the newest checkpoint, where there is one. Raises `UserError` when it was made for a plan that begins otherwise."""
    if latest is None:
        return Progress(plan=asdict(plan))
    progress = checkpoints.load(latest.path, trainer.policy.model, trainer.optimizer)
    if progress.tokens_per_expert:
        trainer.previous.counts = torch.tensor(progress.tokens_per_expert, device=trainer.ranks.device)
    made_for = step_plan.plan_of(progress.plan)
    trainer.guard.taken, trainer.guard.in_a_row = progress.taken, progress.spikes_in_a_row
    if why_not := step_plan.why_not_continued(made_for, plan, progress.step, job.stage.train):
        raise UserError(
            f"{latest.path}: was made for {made_for.steps} steps, {made_for.warmup_steps} of warm-up, and "
            f"{job.run_dir / 'plan.json'} says {plan.steps}, {plan.warmup_steps} of warm-up: {why_not}; delete that "
            "file, or the checkpoints"
        )
    progress.plan = asdict(plan)
    trainer.ranks.log_once(f"{job.stage.name}: resumed at step {progress.step} of {plan.steps}")
    return progress


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP (a closed terminal) instead of dying of them; only the main thread can listen.

    A second signal has its usual effect, except among several ranks: torchrun sends every worker another one at once. SIGHUP
    stays ignored where it is, as under nohup.
    """

    def __init__(self, world: int = 1) -> None:
        self.requested = False
        self._once = world == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
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
