"""What a report shows of a run: everything in its directory that is for people, read and checked.

In: a run directory, finished or not. Out: a `keural.report.collect.Run`.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.files import read_checked_text, read_object
from keural.model import KeuralConfig, count_parameters
from keural.parsing import parse_yaml
from keural.pipeline.run_directory import DONE, METRICS, MODEL, RECIPE, STAGE_TEXT, SUMMARY, Done, Summary
from keural.report.collect import Run, Stage
from keural.terminal import say
from keural.train.checks.record import CHECKS_FILE, ChecksFile
from keural.train.stage.metrics import read_metrics


def read_run(directory: Path) -> Run:
    """What a report shows of a run, whole or not: stages may be missing or interrupted, an evaluation may not be there.

    Raises `UserError` when the directory is no run's, or a file of it is damaged. Lines of metrics that are damaged are left out,
    and said; of a killed run the last line may be half-written.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a run directory such as runs/toy")
    recipe_text = read_checked_text(directory / RECIPE) if (directory / RECIPE).is_file() else ""
    resolved = parse_yaml(recipe_text) if recipe_text else {}
    summary = Summary.find(directory / SUMMARY)
    listed: dict[str, dict[str, Any]] = {stage["name"]: stage for stage in resolved.get("stages", ())}
    for finished in summary.stages if summary else ():
        listed.setdefault(finished.name, {})
    if not listed:
        found = sorted(directory.glob(f"*/{METRICS}"), key=lambda file: (file.stat().st_mtime, file.parent.name))
        listed = {file.parent.name: {} for file in found if ".old-" not in file.parent.name}
    stages = [_read_stage(directory / name, settings) for name, settings in listed.items()]
    stages = [stage for stage in stages if stage.finished or stage.steps]
    if not (resolved or summary or stages):
        raise UserError(f"{directory}: is not a run directory (no {RECIPE}, {SUMMARY} or stage)")
    recipe = resolved.get("recipe", {})
    return Run(
        name=str((summary.recipe if summary else None) or recipe.get("name") or directory.resolve().name),
        directory=directory,
        recipe=recipe,
        recipe_text=recipe_text,
        stages=stages,
        summary=summary.model_dump() if summary else {},
        parameters=_parameters(directory, stages),
        ended=_ended(directory, stages),
        evaluation=summary.evaluation if summary else {},
    )


def _read_stage(directory: Path, settings: dict[str, Any]) -> Stage:
    lines, damaged = read_metrics(directory / METRICS)
    if damaged:
        say(f"{directory / METRICS}: {damaged} lines are damaged, and left out of the report")
    # A resumed stage repeats the steps after its last checkpoint; the later line counts.
    steps = {line["step"]: line for line in lines if "loss" in line or "skipped" in line}
    heldout = {line["step"]: line for line in lines if isinstance(line.get("heldout"), dict)}
    alarms = {line["alarm"]: line for line in lines if isinstance(line.get("alarm"), str)}
    checks = ChecksFile.find(directory / CHECKS_FILE)
    done, text = Done.find(directory / DONE), directory / STAGE_TEXT
    if done is not None and (missing := done.steps - len(steps)) > 0:
        say(f"{directory / METRICS}: {missing} of {done.steps} steps are missing there, and in the report")
    return Stage(
        name=directory.name,
        settings=settings or (parse_yaml(read_checked_text(text)) if text.is_file() else {}),
        done=done.model_dump() if done else {},
        steps=[steps[step] for step in sorted(steps)],
        heldout=[heldout[step] for step in sorted(heldout)],
        alarms=sorted(alarms.values(), key=lambda line: int(line["step"])),
        checks=checks.model_dump() if checks else {},
    )


def _parameters(directory: Path, stages: list[Stage]) -> tuple[int, int] | None:
    for stage in reversed(stages):
        file = directory / stage.name / MODEL / "config.json"
        if file.is_file():
            count = count_parameters(KeuralConfig.from_dict(read_object(file)))
            return count.total, count.active
    return None


def _ended(directory: Path, stages: list[Stage]) -> datetime | None:
    """When the run last wrote something."""
    files = [directory / SUMMARY, *(directory / stage.name / METRICS for stage in stages)]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return datetime.fromtimestamp(max(times)).astimezone() if times else None
