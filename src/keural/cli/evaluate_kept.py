"""What an evaluation of a run adds to it: differences between stages, what training data held, the table of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keural.terminal import note, show, work_progress

if TYPE_CHECKING:
    from keural.data.records import AnyRecord
    from keural.evaluate.evaluation import Evaluated
    from keural.evaluate.tasks.loading import LoadedTask

Figures = dict[str, Any]


def keep_in_run(run: Path, found: "Mapping[str, Sequence[Evaluated]]", limit: int | None) -> Figures:
    """Keep what was measured of a run's stages in it, say what training data held, and return the figures of these tasks."""
    from keural.pipeline.run_directory import SUMMARY
    from keural.pipeline.scores import Measured, keep

    measured = {
        stage: [Measured(one.results, one.file, _records(one.task), limit if _cuts(limit, one.task) else None) for one in tasks]
        for stage, tasks in found.items()
    }
    with work_progress() as tell:
        kept = keep(run, measured, tell)
    _tell_seen(kept)
    if (run / SUMMARY).is_file():
        show(f"report: {run / 'report.html'}")
    return kept


def _records(task: "LoadedTask | None") -> "dict[str, AnyRecord]":
    """What was asked, by the items' ids; of a task that lm-eval asked it is not known."""
    return {} if task is None else {item.id: item.record for item in task.items}


def _cuts(limit: int | None, task: "LoadedTask | None") -> bool:
    return limit is not None and (task is None or limit < len(task.items))


def _tell_seen(kept: Figures) -> None:
    """Say which scores rest on items that were trained on, and whose training data could not be searched."""
    unknown: dict[str, str] = {}
    for stage, figures in kept["stages"].items():
        for task, score in figures["tasks"].items():
            seen = score.get("contamination", {})
            unknown |= seen.get("unknown", {})
            if seen.get("found"):
                clean = seen["clean"]
                others = "none is left without them" if clean is None else f"{clean['score']:.3f} without them"
                show(f"{stage}: {task}: {seen['found']:,} of {score['n']:,} items are in its training data; {others}")
    for stage, reason in unknown.items():
        note(f"{stage}: its training data was not searched for these items: {reason}")


def with_run_figures(figures: Figures, kept: Figures) -> Figures:
    """The figures for programs with what `keep_in_run` found out."""
    for stage, more in kept["stages"].items():
        for task, score in more["tasks"].items():
            own = figures["stages"][stage]["tasks"][task]
            own |= {name: value for name, value in score.items() if name not in own}
    return figures | {"tax": kept["tax"]}
