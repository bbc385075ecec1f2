"""What was measured of a run's stages by `keural evaluate`, kept in the run, so that its summary and report have it.

In: results of tasks by stage. Out: figures with differences, alignment tax, contamination and wrong answers; `results/scores.json`,
and a new `summary.json` and `report.html`. Figures of a stage that was trained again are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from keural.data.records import AnyRecord
from keural.evaluate.comparison.stages import Figures, complete
from keural.evaluate.contamination import beside, looked_for, remembered_search
from keural.evaluate.models import UNTRAINED
from keural.evaluate.results.records import TaskResults
from keural.evaluate.results.store import read_results
from keural.evaluate.statistics.summary import BITS, summarize
from keural.files import CheckedFile, read_checked_text
from keural.parsing import parse_yaml
from keural.pipeline.run_contents import read_run
from keural.pipeline.run_directory import DONE, RECIPE, RESULTS, SUMMARY, Done, Summary
from keural.pipeline.training_texts import trained_on
from keural.pretrained.lineage import read_record
from keural.pretrained.location import model_directory
from keural.recipe import OBJECTIVES
from keural.report.html import write_report
from keural.terminal import note

SCORES = "scores.json"
PACKED = {"xz": "xz_9", "zstd": "zstd_19"}
"""What packs held-out texts, as their measure and as tasks call it."""
BEGINNING = "random"
"""What a stage says it starts from when it starts from the untrained model."""


class ScoresFile(CheckedFile):
    """`results/scores.json`: what was measured of each stage, and which training of the stage that was."""

    remedy: ClassVar[str] = "delete it and evaluate again"

    trained: dict[str, str]
    """Fingerprint of each stage when it was measured."""
    stages: dict[str, dict[str, Any]]
    """Figures of each stage's tasks, by their names."""


@dataclass(frozen=True)
class Measured:
    """A task as a stage did it."""

    results: TaskResults
    file: Path
    """Where its items are."""
    records: Mapping[str, AnyRecord]
    """What was asked, by the items' ids: to be looked for in training data."""
    limit: int | None = None
    """Only the first so many items of the set were asked."""


def keep(run: Path, measured: Mapping[str, Sequence[Measured]], tell: Callable[[str], None] = lambda text: None) -> Figures:
    """Keep what was measured of a run's stages, and write its summary and report anew.

    `tell` is told which stage's data is searched. Returns the figures of these tasks, items as paths from the run directory. Raises
    `UserError` for damaged files.
    """
    figures: Figures = {"stages": {name: {"tasks": _figures(run, name, found, tell)} for name, found in measured.items()}}
    known = ScoresFile.find(run / RESULTS / SCORES) or ScoresFile(trained={}, stages={})
    current = _current(run, known)
    for name, stage in figures["stages"].items():
        before = current.get(name, {})
        current[name] = before | {task: new for task, new in stage["tasks"].items() if not _has_more(before.get(task, {}), new)}
        for task in stage["tasks"]:
            if current[name][task] is not stage["tasks"][task]:
                note(f"({name}: {task}: the run's table keeps the score of more items, {current[name][task]['score']:.3f})")
    trained = {name: _fingerprint(run, name) or "" for name in current}
    ScoresFile(trained=trained, stages=current).write(run / RESULTS / SCORES)
    if (summary := Summary.find(run / SUMMARY)) is not None:
        summary.model_copy(update={"evaluation": with_kept(run, summary.evaluation)}).write(run / SUMMARY)
        write_report(read_run(run))
    return _completed(run, figures)


def with_kept(run: Path, evaluation: Figures) -> Figures:
    """A run's evaluation with what `keural evaluate` has measured of its stages as they are now."""
    known = ScoresFile.find(run / RESULTS / SCORES)
    if known is None or not (kept := _current(run, known)):
        return evaluation
    stages: dict[str, Figures] = evaluation.get("stages") or {}
    names = sorted({*stages, *kept}, key=_order(run))
    joined = {name: {"tasks": (stages.get(name) or {}).get("tasks", {}) | kept.get(name, {})} for name in names}
    return _completed(run, evaluation | {"stages": joined})


def scores_of(path: Path) -> dict[str, Figures] | None:
    """What the run that a model lies in has measured of it, by task, the bits per byte of held-out texts, too; None where the model
    is no stage's as it was measured.
    """
    directory = model_directory(path)
    if len(directory.parents) < 2 or (summary := Summary.find(directory.parents[1] / SUMMARY)) is None:
        return None
    trained = {stage.name: stage.fingerprint for stage in summary.stages}
    stage = directory.parent.name
    if trained.get(stage) is None or trained[stage] != read_record(directory).get("fingerprint"):
        return None
    found: dict[str, Figures] = dict((summary.evaluation.get("stages") or {}).get(stage, {}).get("tasks") or {})
    for row in summary.evaluation.get("bits_per_byte") or ():
        if stage in row["models"]:
            packers = {name: row[key] for key, name in PACKED.items() if key in row}
            counts = {"language": row["language"], "n": row["documents"]}
            name = row["name"] if row["name"] not in found else f"{row['name']}, held-out text of the recipe"
            found[name] = {"score": row["models"][stage], "kind": BITS, **counts, "baselines": packers, "heldout": True}
    return found or None


def _figures(run: Path, name: str, found: Sequence[Measured], tell: Callable[[str], None]) -> Figures:
    """The figures of a stage's tasks, with what its training data held of them."""
    trained = trained_on(run, name)
    if trained:
        tell(f"{name}: looking for {sum(len(one.records) for one in found):,} items in its training data")
    asked = {one.results.digest: {key: looked_for(record) for key, record in one.records.items()} for one in found}
    looked = remembered_search(asked, trained, run / RESULTS)
    tasks = {}
    for one in found:
        items = one.file.resolve().relative_to(run.resolve()).as_posix()
        score = summarize(one.results, items).to_json() if one.results.items else _nothing(one.results, items)
        if trained and one.results.items:
            score["contamination"] = beside(one.results, looked)
        model = read_results(one.file).header.model
        score["asked"] = f"{model.prompting}, {model.dtype}"
        tasks[one.results.task] = score | ({} if one.limit is None else {"limit": one.limit})
    return tasks


def _has_more(known: Figures, new: Figures) -> bool:
    """Whether a figure that is kept is of more of the same results: asked alike, with the same questions, and a larger limit."""
    if known.get("items") != new["items"] or known.get("score") is None or "limit" not in new:
        return False
    return "limit" not in known or bool(known["limit"] > new["limit"])


def _nothing(results: TaskResults, items: str) -> Figures:
    """Figures of a task of which no item could be asked."""
    return {"score": None, "low": None, "high": None, "n": 0, "chance": results.chance, "items": items}


def _completed(run: Path, figures: Figures) -> Figures:
    stages = list(figures["stages"])
    limits = {task["items"]: task.get("limit") for stage in figures["stages"].values() for task in stage["tasks"].values()}
    done = {name: found for name in stages if (found := Done.find(run / name / DONE)) is not None}
    predecessors = {name: UNTRAINED if one.init_from == BEGINNING else one.init_from for name, one in done.items()}
    documents = [name for name, one in done.items() if OBJECTIVES[one.objective].store == "documents"]
    return complete(figures, lambda path: read_results(run / path).results(limits[path]), predecessors, *documents[-1:])


def _current(run: Path, known: ScoresFile) -> dict[str, Figures]:
    """The figures of the stages that have not been trained again."""
    return {name: tasks for name, tasks in known.stages.items() if known.trained.get(name) == _fingerprint(run, name)}


def _fingerprint(run: Path, name: str) -> str | None:
    """Of a stage as it is trained now; of the untrained model that of the first stage, whose network it is."""
    if name == UNTRAINED:
        first = next(iter(_finished(run)), None)
        return None if first is None else first.fingerprint
    done = Done.find(run / name / DONE)
    return None if done is None else done.fingerprint


def _finished(run: Path) -> list[Done]:
    """The stages of the run's recipe that are finished, in their order."""
    listed = parse_yaml(read_checked_text(run / RECIPE))["stages"]
    return [done for stage in listed if (done := Done.find(run / stage["name"] / DONE)) is not None]


def _order(run: Path) -> Callable[[str], tuple[int, str]]:
    names = [UNTRAINED, *(stage.name for stage in _finished(run))]
    return lambda name: (names.index(name) if name in names else len(names), name)
