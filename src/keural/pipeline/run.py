"""The pipeline: a recipe's stages in order, each from directories to directories.

`run` prepares the tokenizer and every stage's data, trains the stages, evaluates, and writes `summary.json` and `report.html`.
Each part has a fingerprint of everything that determines its result: a finished part with the same fingerprint is skipped if what
it made is still whole, an interrupted stage is resumed, a part whose settings changed is set aside (never overwritten) and made
again; what was done with earlier work, and why, is always said. `run_directory` says what lies where.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keural.data.prepare import clear_parts
from keural.errors import UserError
from keural.evaluate.bench import Bench
from keural.evaluate.scorecard import check_measurable, score
from keural.files import fingerprint
from keural.lora.layers import write_adapter
from keural.lora.merge import write_merged
from keural.pipeline.heldout_change import heldout_change
from keural.pipeline.read_later import check_read_later
from keural.pipeline.run_contents import read_run
from keural.pipeline.run_directory import (
    ADAPTER,
    DATA,
    DONE,
    EVALUATION,
    MODEL,
    REFERENCE,
    SUMMARY,
    Done,
    EvaluationFile,
    Summary,
    claim,
    link_final,
    only_run_in,
    write_recipe,
)
from keural.pipeline.scores import with_kept
from keural.pipeline.stage_directory import find_done, is_finished, model_problem, open_directory, trajectory
from keural.pipeline.workspace import (
    Workspace,
    check_inputs,
    check_starts,
    init_directory,
    prepare_all,
    prepare_tokenizer,
    select_stages,
    with_ancestors,
)
from keural.pretrained.directory import write_model_directory
from keural.pretrained.lineage import UNKNOWN, check_sums, read_record
from keural.pretrained.weights import Weights
from keural.recipe import VERSION, Recipe, StageSpec, parse_duration
from keural.report.html import write_report
from keural.train.processes.gathering import with_gathered
from keural.train.processes.ranks import Ranks, session
from keural.train.reference.of_stage import is_cached
from keural.train.stage.dry_run import Tried
from keural.train.stage.dry_run import dry_run as dry_run_of
from keural.train.stage.job import StageJob, StageResult
from keural.train.stage.kept import check_memory_is_known
from keural.train.stage.training import make_references, train_stage


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its directory, whether a signal stopped it before the end, and whether stages were to be trained."""

    directory: Path
    interrupted: bool
    trains: bool = True
    tried: tuple[Tried, ...] = ()
    """What a dry run found, stage by stage."""


def run(
    recipe: Recipe,
    out: Path,
    *,
    until: str | None = None,
    only: str | None = None,
    boards: tuple[str, ...] = (),
    reference_only: bool = False,
    dry_run: bool = False,
    on_data: Callable[[Workspace], object] | None = None,
) -> Outcome:
    """Run a recipe's stages in order into `out`; finished parts are skipped, an interrupted stage is resumed.

    `until` stops after that stage, `only` runs just that stage (the one it starts from must be finished); `reference_only` trains
    none and computes the reference values that those of them need whose starting model is finished, or refuses; `dry_run` trains
    none and takes the largest step of each on weights that are thrown away. Under torchrun
    every rank calls this; rank 0 prepares and exports, and shows `on_data` what there is to train on. Raises `UserError` for
    anything the user can mend, before the first step where possible.
    """
    if dry_run and reference_only:
        raise UserError("--dry-run and --reference-only: give one of them; the first keeps nothing")
    if boards and (dry_run or reference_only):
        raise UserError(
            f"--{boards[0]} shows steps that are trained, and {'--dry-run' if dry_run else '--reference-only'} trains none"
        )
    stages = select_stages(recipe, until=until, only=only)
    if reference_only:
        stages = _with_reference(stages)
    with session() as ranks, contextlib.ExitStack() as stack:
        started = time.monotonic()
        ranks.on_main(lambda: check_inputs(recipe, stages, out, trains=True))
        for stage in stages:
            check_memory_is_known(stage, ranks.device)
        ranks.on_main(lambda: claim(out, recipe))
        ranks.on_main(lambda: stack.enter_context(only_run_in(out)))
        ranks.on_main(lambda: _open_run(recipe, stages, out, on_data))
        workspace = prepare_all(recipe, stages, out)
        if reference_only:
            finished = all(_make_references(workspace, stage, ranks) for stage in stages)
            return Outcome(out, interrupted=not finished, trains=False)
        if dry_run:
            return Outcome(out, interrupted=False, trains=False, tried=tuple(_try(workspace, stage, ranks) for stage in stages))
        for stage in stages:
            if _train(workspace, stage, ranks, boards):
                return Outcome(out, interrupted=True)
        ranks.on_main(lambda: _finish(workspace, started))
    return Outcome(out, interrupted=False)


def _with_reference(stages: list[StageSpec]) -> list[StageSpec]:
    """Those that keep reference values. Raises `UserError` when none does."""
    found = [stage for stage in stages if is_cached(stage)]
    if not found:
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"--reference-only: no stage keeps reference values ({names}); leave it out to train")
    return found


def _make_references(workspace: Workspace, stage: StageSpec, ranks: Ranks) -> bool:
    """Compute what reference values of a stage are missing; False when a signal stopped it."""
    ranks.on_main(lambda: _check_ready(workspace, stage))
    return make_references(_job(workspace, stage), ranks)


def _open_run(recipe: Recipe, stages: list[StageSpec], out: Path, on_data: Callable[[Workspace], object] | None) -> None:
    """Keep the resolved recipe, prepare the data: once, before other ranks open it."""
    check_read_later(recipe, out)
    write_recipe(out, recipe)
    check_starts(recipe, stages, prepare_tokenizer(recipe, out), out)
    workspace = prepare_all(recipe, stages, out)
    if on_data is not None:
        on_data(workspace)
    check_measurable(recipe, workspace.data)


def _try(workspace: Workspace, stage: StageSpec, ranks: Ranks) -> Tried:
    """The largest step of a stage, from random weights where the stage that it starts from is not finished."""
    before = None if stage.predecessor is None else workspace.recipe.stage(stage.predecessor)
    missing = before is not None and ranks.on_main(
        lambda: find_done(workspace.out / before.name, workspace.stage_fingerprint(before)) is None
    )
    if missing and stage.lora is not None:
        raise UserError(
            f"{stage.name}: adapters belong to a model, and {stage.predecessor} is not finished in {workspace.out}; run that stage "
            "first, or leave this one out with --until"
        )
    job = _job(workspace, stage)
    ranks.log_once(f"{stage.name}: {'random weights' if missing else 'its own start'}, the largest batch")
    return dry_run_of(replace(job, init=None) if missing else job, ranks)


def _train(workspace: Workspace, stage: StageSpec, ranks: Ranks, boards: tuple[str, ...]) -> bool:
    """Bring one stage to its end unless it is there already; True when a signal stopped it."""
    directory, wanted = workspace.out / stage.name, workspace.stage_fingerprint(stage)
    if ranks.on_main(lambda: find_done(directory, wanted) is not None):
        problem = ranks.on_main(lambda: model_problem(directory))
        if problem is None:
            ranks.log_once(f"{stage.name}: finished already, skipped")
            return False
        ranks.log_once(f"{stage.name}: was finished, but {problem}; it is made again, from its last checkpoint where there is one")
    for row in workspace.data[stage.name].table:
        if row.survey:
            ranks.log_once(f"{stage.name}: {row.survey}")
    ranks.on_main(lambda: _check_ready(workspace, stage))
    ranks.on_main(lambda: open_directory(workspace, stage))
    result = train_stage(_job(workspace, stage, boards), ranks)
    if not result.interrupted:
        export_stage(workspace, stage, result, wanted, ranks)
    return result.interrupted


def _check_ready(workspace: Workspace, stage: StageSpec) -> None:
    """Refuse to start from a stage that is not finished, or from weights that are not those that were saved."""
    if stage.init_from == "random":
        return
    if stage.predecessor is not None:
        before = workspace.recipe.stage(stage.predecessor)
        directory = workspace.out / before.name
        problem = model_problem(directory) if find_done(directory, workspace.stage_fingerprint(before)) else ""
        if problem is not None:
            raise UserError(
                f"{stage.name}: starts from {before.name}, which is not finished in {workspace.out}"
                f"{f' any more: {problem}' if problem else ''}; run that stage first"
            )
    check_sums(init_directory(workspace.out, stage))


def _job(workspace: Workspace, stage: StageSpec, boards: tuple[str, ...] = ()) -> StageJob:
    budget, share = workspace.recipe.spec.budget, stage.train.budget_share
    prepared = workspace.data[stage.name]
    return StageJob(
        stage=stage,
        seed=workspace.seed(stage),
        model_config=workspace.model_config,
        init=None if stage.init_from == "random" else init_directory(workspace.out, stage),
        train_store=prepared.corpus,
        heldout_store=prepared.heldout,
        tokenizer_sha=workspace.tokenizer.sha256,
        run_dir=workspace.out / stage.name,
        fingerprint=trajectory(workspace, stage),
        budget_seconds=parse_duration(budget) * share if budget and share else None,
        boards=boards,
        references=workspace.out / REFERENCE,
    )


def export_stage(workspace: Workspace, stage: StageSpec, result: StageResult, wanted: str, ranks: Ranks) -> None:
    """Write the stage's model directory, then the marker that it is done."""
    if result.adapter is None:
        with_gathered(result.model, ranks, lambda weights: _save_stage(workspace, stage, result, weights, wanted))
    else:
        ranks.on_main(lambda: _save_stage(workspace, stage, result, None, wanted))


def _save_stage(workspace: Workspace, stage: StageSpec, result: StageResult, weights: Weights | None, wanted: str) -> None:
    """Write what a stage has made: its model, and the adapter that is merged into it where the stage trained one."""
    directory, spec = workspace.out / stage.name, workspace.recipe.spec
    chain = list(reversed(with_ancestors(workspace.recipe, stage)))
    trained: dict[str, Any] = {"chain": chain, "objectives": _objectives(workspace, stage)}
    if (tools := _tool_conversations(workspace, stage)) is not None:
        trained["tool_conversations"] = tools
    lineage = {"recipe": spec.name, "stage": stage.name, "fingerprint": wanted, **trained}
    if weights is not None:
        write_model_directory(directory / MODEL, workspace.model_config, weights, workspace.tokenizer, lineage, spec.chat)
    else:
        assert result.adapter is not None
        write_adapter(directory / ADAPTER, result.adapter, lineage, spec.chat)
        write_merged(directory / ADAPTER, result.adapter.base, directory / MODEL, workspace.tokenizer, spec.chat)
    Done(
        name=stage.name,
        objective=stage.objective,
        init_from=stage.init_from,
        fingerprint=wanted,
        init=workspace.init_fingerprint(stage),
        seconds=result.seconds,
        tokens=result.tokens,
        steps=result.steps,
        loss_first=result.loss_first,
        loss_last=result.loss_last,
        heldout=result.heldout,
        heldout_change=heldout_change(directory),
        trained=result.trained,
        data=[_below(workspace.out, path) for path in workspace.data[stage.name].corpus.paths],
        shards=workspace.data[stage.name].corpus.shards,
    ).write(directory / DONE)


def _below(out: Path, path: Path) -> str:
    """A path as it is found again when the run directory is moved: from there, where it lies in it."""
    path, out = path.resolve(), out.resolve()
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else str(path)


def _objectives(workspace: Workspace, stage: StageSpec) -> list[str]:
    """What a stage's model was trained for, oldest first, with what is known of the directory that its first stage started from."""
    stages = list(reversed(with_ancestors(workspace.recipe, stage).values()))
    before: list[str] = []
    if stages[0].starts_from_directory:
        before = read_record(init_directory(workspace.out, stages[0])).get("objectives", [UNKNOWN])
    return [*before, *(stage.objective for stage in stages)]


def _tool_conversations(workspace: Workspace, stage: StageSpec) -> int | None:
    """How many records with calls of tools a stage's model was trained on, its predecessors' included; None: no record tells."""
    before = 0 if stage.init_from == "random" else read_record(init_directory(workspace.out, stage)).get("tool_conversations")
    table = workspace.data[stage.name].table
    counts = [before, *(row.tool_calls for row in table if row.split == "train" and row.left_out is None)]
    known = [count for count in counts if count is not None]
    return sum(known) if any(known) or len(known) == len(counts) else None


def _finish(workspace: Workspace, started: float) -> None:
    """Link the last finished stage's model, evaluate it and those before it, and write the summary and the report.

    Stages that this run left alone (`until`, `only`) count, too, unless the stage they start from has been made again.
    """
    out, recipe = workspace.out, workspace.recipe
    stages = [stage for stage in recipe.stages if _is_current(workspace, stage)]
    link_final(out, stages[-1].name)
    complete = len(stages) == len(recipe.stages)
    if complete and workspace.data.keys() != {stage.name for stage in stages}:
        workspace = prepare_all(recipe, stages, out)
        complete = all(is_finished(out / stage.name, workspace.stage_fingerprint(stage)) for stage in stages)
    if complete:
        clear_parts(out / DATA)
    measured = _evaluated(workspace, stages, complete)
    measured["evaluation"] = with_kept(out, measured["evaluation"])
    Summary(
        recipe=recipe.spec.name,
        seconds=round(time.monotonic() - started, 3),
        stages=[Done.read(out / stage.name / DONE) for stage in stages],
        data={stage.name: _table(workspace, stage) for stage in stages if stage.name in workspace.data},
        **measured,
    ).write(out / SUMMARY)
    write_report(read_run(out))


def _table(workspace: Workspace, stage: StageSpec) -> list[dict[str, Any]]:
    """The table of a stage's sources as plain data."""
    return [row.to_json() for row in workspace.data[stage.name].table]


def _is_current(workspace: Workspace, stage: StageSpec) -> bool:
    """Whether a stage is finished, and from what its predecessor is now."""
    directory = workspace.out / stage.name
    if stage.name in workspace.data:
        return is_finished(directory, workspace.stage_fingerprint(stage))
    done = Done.find(directory / DONE)
    if done is None or model_problem(directory) is not None:
        return False
    if stage.predecessor is None:
        return done.init == workspace.init_fingerprint(stage)
    before = workspace.recipe.stage(stage.predecessor)
    return _is_current(workspace, before) and done.init == Done.read(workspace.out / before.name / DONE).fingerprint


def _evaluated(workspace: Workspace, stages: Sequence[StageSpec], complete: bool) -> dict[str, Any]:
    """Evaluation of the finished stages, and sample answers where all are, reused when nothing they depend on has changed."""
    cache = workspace.out / EVALUATION
    wanted = fingerprint(
        {
            "version": VERSION,
            "evaluation": workspace.recipe.spec.evaluation.determining("evaluation"),
            "chat": workspace.recipe.spec.chat.determining("evaluation"),
            "stages": [Done.read(workspace.out / stage.name / DONE).fingerprint for stage in stages],
            "complete": complete,
        }
    )
    known = EvaluationFile.find(cache)
    if known is not None and known.fingerprint == wanted:
        return known.result
    names = [stage.name for stage in stages]
    bench = Bench(workspace.recipe, workspace.out, workspace.tokenizer, workspace.model_config, workspace.data, names)
    result = score(bench)
    EvaluationFile(fingerprint=wanted, result=result).write(cache)
    return result
