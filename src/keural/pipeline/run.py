"""The pipeline: a recipe's stages in order, each from directories to directories.

`run` prepares the tokenizer and every stage's data, trains the stages, evaluates, and writes `summary.json` and `report.html`.
Each part has a fingerprint of everything that determines its result: a finished part with the same fingerprint is skipped, an
interrupted stage is resumed, a part whose settings changed is set aside (never overwritten) and made again.

    runs/<recipe>/  recipe.yaml  tokenizer/  data/<fingerprint>/{train,heldout}  <stage>/{checkpoints,model}  final -> <stage>/model
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from keural.errors import UserError
from keural.evaluate.scorecard import check_measurable, score
from keural.files import fingerprint, read_json, read_object, write_atomic, write_json
from keural.pipeline.run_directory import (
    fingerprint_in,
    is_done,
    link_final,
    only_run_in,
    open_stage_directory,
)
from keural.pipeline.workspace import Workspace, check_inputs, init_directory, prepare_all, select_stages, with_ancestors
from keural.pretrained.directory import save_model_directory
from keural.pretrained.lineage import check_sums
from keural.recipe import VERSION, Recipe, StageSpec, parse_duration
from keural.report.html import write_report
from keural.train.parallel import full_state_dict
from keural.train.ranks import Ranks, session
from keural.train.stage import StageJob, StageResult, train_stage


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its directory, and whether a signal stopped it before the end."""

    directory: Path
    interrupted: bool


def run(recipe: Recipe, out: Path, *, until: str | None = None, only: str | None = None, tensorboard: bool = False) -> Outcome:
    """Run a recipe's stages in order into `out`; finished parts are skipped, an interrupted stage is resumed.

    `until` stops after that stage, `only` runs just that stage (the one it starts from must be finished). Under torchrun
    every rank calls this; rank 0 prepares and exports. Raises `UserError` for anything the user can mend, before the first
    step where possible.
    """
    stages = select_stages(recipe, until=until, only=only)
    with session() as ranks, contextlib.ExitStack() as stack:
        started = time.monotonic()
        ranks.on_main(lambda: check_inputs(recipe, stages, out))
        ranks.on_main(lambda: stack.enter_context(only_run_in(out)))
        ranks.on_main(lambda: _open_run(recipe, stages, out))
        workspace = prepare_all(recipe, stages, out)
        for stage in stages:
            if _train(workspace, stage, ranks, tensorboard):
                return Outcome(out, interrupted=True)
        ranks.on_main(lambda: _finish(workspace, started))
    return Outcome(out, interrupted=False)


def _open_run(recipe: Recipe, stages: list[StageSpec], out: Path) -> None:
    """Keep the resolved recipe, prepare the data: once, before other ranks open it."""
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.resolved(), allow_unicode=True, sort_keys=False))
    workspace = prepare_all(recipe, stages, out)
    check_measurable(recipe, workspace.data)


def _train(workspace: Workspace, stage: StageSpec, ranks: Ranks, tensorboard: bool) -> bool:
    """Bring one stage to its end unless it is there already; True when a signal stopped it."""
    directory, wanted = workspace.out / stage.name, workspace.stage_fingerprint(stage)
    if is_done(directory, wanted):
        ranks.log_once(f"{stage.name}: finished already, skipped")
        return False
    for row in workspace.data[stage.name].table:
        if row.survey:
            ranks.log_once(f"{stage.name}: {row.survey}")
    ranks.on_main(lambda: _check_ready(workspace, stage))
    ranks.on_main(lambda: open_stage_directory(directory, stage, wanted))
    result = train_stage(_job(workspace, stage, wanted, tensorboard), ranks)
    if not result.interrupted:
        export_stage(workspace, stage, result, wanted, ranks)
    return result.interrupted


def _check_ready(workspace: Workspace, stage: StageSpec) -> None:
    """Refuse to start from a stage that is not finished, or from weights that are not those that were saved."""
    if stage.init_from == "random":
        return
    if stage.predecessor is not None:
        before = workspace.recipe.stage(stage.predecessor)
        if not is_done(workspace.out / before.name, workspace.stage_fingerprint(before)):
            raise UserError(
                f"{stage.name}: starts from {before.name}, which is not finished in {workspace.out}; run that stage first"
            )
    check_sums(init_directory(workspace.out, stage))


def _job(workspace: Workspace, stage: StageSpec, wanted: str, tensorboard: bool) -> StageJob:
    budget, share = workspace.recipe.spec.budget, stage.train.budget_share
    prepared = workspace.data[stage.name]
    return StageJob(
        stage=stage,
        seed=workspace.recipe.spec.seed,
        model_config=workspace.model_config,
        init=None if stage.init_from == "random" else init_directory(workspace.out, stage),
        train_store=prepared.corpus,
        heldout_store=prepared.heldout,
        tokenizer_sha=workspace.tokenizer.sha256,
        run_dir=workspace.out / stage.name,
        fingerprint=wanted,
        budget_seconds=parse_duration(budget) * share if budget and share else None,
        tensorboard=tensorboard,
    )


def export_stage(workspace: Workspace, stage: StageSpec, result: StageResult, wanted: str, ranks: Ranks) -> None:
    """Write the stage's model directory, then the marker that it is done."""
    weights = full_state_dict(result.model)
    ranks.on_main(lambda: _save_stage(workspace, stage, result, weights or {}, wanted))


def _save_stage(workspace: Workspace, stage: StageSpec, result: StageResult, weights: dict[str, Tensor], wanted: str) -> None:
    directory, spec = workspace.out / stage.name, workspace.recipe.spec
    chain = list(reversed(with_ancestors(workspace.recipe, stage)))
    lineage = {"recipe": spec.name, "stage": stage.name, "fingerprint": wanted, "chain": chain}
    save_model_directory(directory / "model", workspace.model_config, weights, workspace.tokenizer, lineage, spec.chat)
    done = {"name": stage.name, "objective": stage.objective, "init_from": stage.init_from, "fingerprint": wanted}
    done["init"] = workspace.init_fingerprint(stage)
    measured = ("seconds", "tokens", "steps", "loss_first", "loss_last", "heldout")
    write_json(directory / "done.json", done | {name: getattr(result, name) for name in measured})


def _finish(workspace: Workspace, started: float) -> None:
    """Link the last finished stage's model, evaluate it when the recipe is complete, and write the summary and the report.

    Stages that this run left alone (`until`, `only`) count, too, unless the stage they start from has been made again.
    """
    out, recipe = workspace.out, workspace.recipe
    stages = [stage for stage in recipe.stages if _is_current(workspace, stage)]
    link_final(out, stages[-1].name)
    complete = len(stages) == len(recipe.stages)
    if complete and workspace.data.keys() != {stage.name for stage in stages}:
        workspace = prepare_all(recipe, stages, out)
        complete = all(is_done(out / stage.name, workspace.stage_fingerprint(stage)) for stage in stages)
    summary: dict[str, Any] = {
        "recipe": recipe.spec.name,
        "seconds": 0.0,
        "stages": [read_json(out / stage.name / "done.json") for stage in stages],
        "data": {stage.name: _table(workspace, stage) for stage in stages if stage.name in workspace.data},
        "evaluation": {},
        "samples": [],
    }
    if complete:
        summary |= _evaluated(workspace)
    summary["seconds"] = round(time.monotonic() - started, 3)
    write_json(out / "summary.json", summary)
    write_report(out)


def _table(workspace: Workspace, stage: StageSpec) -> list[dict[str, Any]]:
    """The table of a stage's sources as plain data."""
    return [row.to_json() for row in workspace.data[stage.name].table]


def _is_current(workspace: Workspace, stage: StageSpec) -> bool:
    """Whether a stage is finished, and from what its predecessor is now."""
    directory = workspace.out / stage.name
    if stage.name in workspace.data:
        return is_done(directory, workspace.stage_fingerprint(stage))
    marker = directory / "done.json"
    if not marker.is_file():
        return False
    if stage.predecessor is None:
        return read_object(marker).get("init") == workspace.init_fingerprint(stage)
    before = workspace.recipe.stage(stage.predecessor)
    made_from = read_object(marker).get("init")
    return _is_current(workspace, before) and made_from == fingerprint_in(workspace.out / before.name / "done.json")


def _evaluated(workspace: Workspace) -> dict[str, Any]:
    """Evaluation and sample answers of the finished recipe, reused when nothing they depend on has changed."""
    cache = workspace.out / "evaluation.json"
    wanted = fingerprint(
        {
            "version": VERSION,
            "evaluation": workspace.recipe.spec.evaluation.determining("evaluation"),
            "chat": workspace.recipe.spec.chat.determining("evaluation"),
            "stages": [workspace.stage_fingerprint(stage) for stage in workspace.recipe.stages],
        }
    )
    if cache.is_file() and fingerprint_in(cache) == wanted:
        return dict(read_json(cache)["result"])
    result = score(workspace.recipe, workspace.out, workspace.tokenizer, workspace.model_config, workspace.data)
    write_json(cache, {"fingerprint": wanted, "result": result})
    return result
