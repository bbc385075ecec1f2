"""A stage's directory: whether it is finished, and what becomes of what is there when the stage is run again.

In: a stage directory and the settings of the stage as they are now. Out: whether its result is there and whole; a directory in
which the stage goes on or begins, and a line that says what became of earlier work, and why.
"""

import contextlib
import os
from pathlib import Path

import yaml

from keural.errors import UserError
from keural.files import fingerprint, read_checked_text, remembered_check, write_checked_text
from keural.pipeline.run_directory import (
    CHECKPOINTS,
    DONE,
    MODEL,
    MODEL_CHECKED,
    PLAN,
    STAGE,
    STAGE_TEXT,
    Done,
    Settings,
    StageMarker,
    changes,
    set_aside,
)
from keural.pipeline.workspace import Workspace, open_stream
from keural.pretrained.lineage import check_sums
from keural.recipe import StageSpec, length_of
from keural.terminal import say
from keural.train.checkpoints.manifest import newest_progress
from keural.train.stage.step_plan import PlanFile, fixed_plan, plan_of, why_not_continued


def find_done(directory: Path, wanted: str) -> Done | None:
    """The marker of a finished stage of exactly these settings; its model is another matter (`model_problem`)."""
    done = Done.find(directory / DONE)
    return done if done is not None and done.fingerprint == wanted else None


def model_problem(directory: Path) -> str | None:
    """What is wrong with the model of a finished stage; None when it is whole. Files that have not changed are not read again."""
    model = directory / MODEL
    if not (model / "keural.json").is_file():
        return f"its model is gone ({model})"
    try:
        remembered_check(model, directory / MODEL_CHECKED, lambda: check_sums(model))
    except UserError as error:
        return f"its model is damaged ({error})"
    return None


def is_finished(directory: Path, wanted: str) -> bool:
    """Whether a stage directory holds the finished result of exactly these settings, its model whole."""
    return find_done(directory, wanted) is not None and model_problem(directory) is None


def _adopt(directory: Path, settings: Settings, trajectory: str) -> StageMarker | None:
    """The marker of a stage directory; None where there is no such directory.

    A marker that is gone is written again where another file shows that the directory was made from these very settings. Raises
    `UserError` when nothing shows that this package has made the directory.
    """
    if not os.path.lexists(directory) or _is_empty(directory):
        return None
    marker = StageMarker.find(directory / STAGE)
    if marker is not None:
        return marker
    done, progress = Done.find(directory / DONE), newest_progress(directory / CHECKPOINTS)
    made_from = progress.fingerprint if progress is not None else None
    if (done is not None and done.fingerprint == fingerprint(settings)) or made_from == trajectory:
        marker = StageMarker.of(settings)
        marker.write(directory / STAGE)
        return marker
    with contextlib.suppress(UserError):
        read_checked_text(directory / STAGE_TEXT)
        return StageMarker.of({})  # its settings are not known, or are others
    if done is not None or made_from is not None or PlanFile.find(directory / PLAN) is not None:
        return StageMarker.of({})
    raise UserError(f"{directory}: is in the way: nothing there shows that a run has made it (no {STAGE}); move it away")


def _is_empty(directory: Path) -> bool:
    """Whether there is nothing but what a killed process began to write."""
    return directory.is_dir() and not directory.is_symlink() and all(path.name.startswith(".") for path in directory.iterdir())


def _write_stage(directory: Path, stage: StageSpec, settings: Settings) -> None:
    """Say what a stage directory is made from."""
    directory.mkdir(parents=True, exist_ok=True)
    StageMarker.of(settings).write(directory / STAGE)
    write_checked_text(directory / STAGE_TEXT, yaml.safe_dump(stage.model_dump(), allow_unicode=True, sort_keys=False))


def open_directory(workspace: Workspace, stage: StageSpec) -> None:
    """Make a stage's directory, or take up the one that is there: of these settings, or of another length where that is possible.

    Another one is set aside. What becomes of earlier work is said, and why.
    """
    directory, settings = workspace.out / stage.name, workspace.stage_settings(stage)
    earlier = _adopt(directory, settings, trajectory(workspace, stage))
    if earlier is not None and earlier.fingerprint != fingerprint(settings):
        told = "; ".join(_changes(workspace, earlier.settings, settings)) if earlier.settings else "others, which are not known"
        why_not = _why_not_continued(workspace, stage, earlier.settings)
        if why_not is None:
            (directory / DONE).unlink(missing_ok=True)
            say(f"{stage.name}: its steps changed ({told}); it goes on from what is done")
        else:
            done = "it was finished" if (directory / DONE).is_file() else "it was begun"
            kept = set_aside(directory)
            say(
                f"{stage.name}: {done} with other settings ({told}){f'; {why_not}' if why_not else ''}; what was made is kept as "
                f"{kept}, its checkpoints are not used, and the stage starts from step 0"
            )
    _write_stage(directory, stage, settings)


def _changes(workspace: Workspace, earlier: Settings, settings: Settings) -> list[str]:
    """What differs; of a seed that only follows from the recipe's, what that is for."""
    if earlier.get("seed") == settings["seed"] or earlier.get("seed") not in workspace.orders:
        return changes(earlier, settings)
    order = "the order of its data, another one now where a stage before it reads some of the same"
    return [*changes(earlier, settings | {"seed": earlier["seed"]}), order]


def trajectory(workspace: Workspace, stage: StageSpec) -> str:
    """Fingerprint of everything that determines each step of a stage; checkpoints have it."""
    return fingerprint(workspace.stage_settings(stage, length=False))


def _why_not_continued(workspace: Workspace, stage: StageSpec, earlier: Settings) -> str | None:
    """Why a stage with other settings than `earlier` ones cannot go on from what is done; empty when it is not its length alone."""
    train, lengths = dict(earlier.get("stage", {}).get("train", {})), length_of(stage.train).keys()
    measured = "budget" in earlier or train.get("budget_share") is not None or stage.train.budget_share is not None
    same = {key: value for key, value in earlier.items() if key != "budget"}
    if same:
        same["stage"] = same["stage"] | {"train": {key: value for key, value in train.items() if key not in lengths}}
    if fingerprint(same) != trajectory(workspace, stage):
        return ""
    if measured:
        return "the length of a stage with a budget is measured before its first step, and stays"
    newest = newest_progress(workspace.out / stage.name / CHECKPOINTS)
    if newest is None:
        return None
    plan = fixed_plan(stage, open_stream(workspace, stage))
    return why_not_continued(plan_of(newest.progress.plan), plan, newest.progress.step, stage.train)
