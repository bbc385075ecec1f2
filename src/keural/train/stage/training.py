"""One training stage, from directories to a trained model in memory: `train_stage`.

In: a `StageJob`: settings, stores, initial weights, run directory. Out: a `StageResult`; in the run directory `metrics.jsonl`,
`plan.json` and `checkpoints/`, for DPO also reference values, there or where the job says. Calling it again with the same job goes
on from the newest checkpoint and ends with the same weights, bit for bit, as if it had never been stopped.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

import torch

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint as fingerprint_of
from keural.recipe import length_of
from keural.train.checkpoints.checkpoints import Checkpoints
from keural.train.checkpoints.manifest import Progress, Stored, newest_progress
from keural.train.checks.record import CHECKS_FILE, probe
from keural.train.network.policy import Policy
from keural.train.objectives.registry import LOSSES
from keural.train.processes.parallel import reshard
from keural.train.processes.ranks import Ranks, session
from keural.train.reference.cache import ReferenceCache
from keural.train.reference.of_stage import identity_of, is_cached, is_online, place_of, weights_fingerprint
from keural.train.reference.online import Reference, values_by
from keural.train.stage import step_plan
from keural.train.stage.building import computing_policy, online_reference, open_data, policy_of
from keural.train.stage.health import SpikeGuard
from keural.train.stage.heldout import heldout_batches
from keural.train.stage.job import StageJob, StageResult
from keural.train.stage.kept import choose_kept
from keural.train.stage.run import StageRun
from keural.train.stage.signals import StopSignals, reproducible
from keural.train.trainer import Trainer


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


def open_stage(job: StageJob, ranks: Ranks, stop: StopSignals, started: float) -> StageRun:
    """The stage before its next step: with its plan, its references, and the state of its newest checkpoint.

    `started` is when this process began with it (`time.monotonic`). Raises `UserError` as `train_stage` does.
    """
    stage = job.stage
    stream, heldout, checks = open_data(job, ranks)
    objective = LOSSES[stage.objective](stage)
    policy, optimizer, frozen = policy_of(job, objective.uniform, ranks)
    checkpoints = Checkpoints(job.run_dir / "checkpoints", stage, job.fingerprint, ranks, frozen)
    online = online_reference(job, policy, objective.uniform, ranks) if is_online(stage) else None
    make_trainer = partial(Trainer, stage, policy, optimizer, objective, stream, ranks)

    def make_plan() -> step_plan.StepPlan:
        references = online or step_plan.no_references(ranks.device)
        measured = make_trainer(learning_rate=step_plan.no_learning, references=references)
        return _make_plan(job, measured, heldout, started)

    latest = ranks.on_main(lambda: newest_progress(checkpoints.directory))
    plan = _plan(job, latest, ranks, make_plan)
    _tell_kept(job, ranks)
    references: tuple[Reference | None, Reference | None] = (online, online)
    if is_cached(stage):
        references = _references(job, plan.steps, policy, stream, heldout, stop, ranks, fills=False)
    guard = SpikeGuard(stage.train.skip_spikes)
    rate, wait = step_plan.rate_of(stage.train, plan), checkpoints.wait_for_copy
    trainer = make_trainer(learning_rate=rate, references=references[0], guard=guard, before_update=wait)
    progress = _resume(job, plan, latest, checkpoints, trainer)
    if latest is None and not ranks.any(stop.requested):  # a pass for reference values that was stopped has not made all of them
        probe(job.run_dir / CHECKS_FILE, checks, trainer)
    return StageRun(job, trainer, plan, heldout, references[1], checkpoints, progress, started - progress.seconds)


def _tell_kept(job: StageJob, ranks: Ranks) -> None:
    """Say what each layer keeps where that was chosen, and write it down."""
    kept = choose_kept(job.stage, job.model_config, ranks)
    if kept is not None:
        ranks.log_once(f"{job.stage.name}: {kept}")
    ranks.on_main(lambda: step_plan.note_layers(job.run_dir / "plan.json", kept.mix._asdict() if kept else None))


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
    room = step_plan.budget_plan(stage, left, costs, stream.steps_per_epoch)
    made = step_plan.bounded_plan(stage, room, stream)
    told = f"{stage.name}: {costs.step:.2f} s per step, {made.steps} steps ({made.warmup_steps} of warm-up) "
    if made.steps == room.steps:
        told += f"in {job.budget_seconds:.0f} s"
    else:
        told += f"by train.max_epochs {stage.train.max_epochs:g}; {room.steps} would fit into its {job.budget_seconds:.0f} s"
    measured.ranks.log_once(told)
    return made


def _references(
    job: StageJob,
    steps: int,
    policy: Policy,
    stream: Stream,
    heldout: Stream | None,
    stop: StopSignals,
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
        stream, heldout, _ = open_data(job, ranks, keep=False)
        policy = computing_policy(job, LOSSES[job.stage.objective](job.stage).uniform, ranks)
        if job.stage.train.budget_share is None:
            steps = step_plan.fixed_plan(job.stage, stream).steps
        else:
            steps = min(stream.steps_per_epoch, step_plan.most_steps(job.stage, stream) or stream.steps_per_epoch)
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
    if progress.step == plan.steps != made_for.steps:
        progress.heldout = {}  # of a step before, as it was not the last one
    trainer.ranks.log_once(f"{job.stage.name}: resumed at step {progress.step} of {plan.steps}")
    return progress
