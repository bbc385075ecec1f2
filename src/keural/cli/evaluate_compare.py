"""`keural evaluate compare`: two models' results on the same items. No network is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keural.terminal import note, show, show_table

if TYPE_CHECKING:
    from keural.evaluate.comparison.chosen import Chosen
    from keural.evaluate.comparison.paired import Comparison, TaskComparison

Side = Literal["left", "right"]
SCORES: dict[str, Side] = {"task": "left", "items": "right", "A": "right", "B": "right", "B - A": "right", "95%": "right"}
GROUNDS: dict[str, Side] = {
    "task": "left", "higher/lower": "right", "p": "right", "p (Holm)": "right", "least seen": "right", "B is": "left"
}  # fmt: skip
FOUND = {True: "better", False: "worse", None: ""}


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="an evaluated model, RUN_DIR/STAGE, or a directory of results")],
    after: Annotated[Path, typer.Argument(metavar="B", help="results to compare with A's")],
    results: Annotated[Path | None, typer.Option(metavar="DIR", help="where `keural evaluate` kept the results of models")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures for programs")] = None,
) -> None:
    """Compare two models' results task by task on the items that both have; only results are read, no network is loaded."""
    from keural.errors import UserError
    from keural.evaluate.comparison.paired import compare as compared
    from keural.files import check_output, write_json
    from keural.pipeline.evaluated import evaluated_before
    from keural.pretrained.location import CONFIG

    if json_file is not None:
        check_output(json_file, "--json")
    if results is not None and not any((path / CONFIG).is_file() for path in (before, after)):
        raise UserError(f"--results {results}: is for models, and neither {before} nor {after} is one; leave it out")
    first, second = evaluated_before(before, results), evaluated_before(after, results)
    found = compared(first.tasks, second.tasks)
    if json_file is not None:
        write_json(json_file, {"before": first.label, "after": second.label, **found.to_json()})
    show(f"A: {first.label}\nB: {second.label}")
    show_table("B against A, on the items that both have", SCORES, [_scores(task) for task in found.tasks])
    show_table("what that rests on", GROUNDS, [_grounds(task) for task in found.tasks])
    show("higher/lower: items whose score rose or fell. p: exact McNemar, or a bootstrap where scores are graded or items come in")
    show("clusters; Holm adjusts it for the number of tasks. least seen: what would have been found in 8 of 10 such comparisons.")
    _tell_rest(first, second, found)


def _scores(task: "TaskComparison") -> list[str]:
    from keural.evaluate.statistics.summary import BITS

    change, unit = task.difference, " b/B" if task.kind == BITS else ""
    scores = [f"{score:.3f}{unit}" for score in (task.before, task.after)]
    return [task.task, f"{change.n:,}", *scores, f"{change.value:+.3f}", f"{change.low:+.3f} to {change.high:+.3f}"]


def _grounds(task: "TaskComparison") -> list[str]:
    change = task.difference
    p_values = [_probability(change.p), _probability(task.p_holm)]
    return [task.task, f"{change.gained:,}/{change.lost:,}", *p_values, f"{change.least:.3f}", FOUND[task.better]]


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _tell_rest(first: "Chosen", second: "Chosen", found: "Comparison") -> None:
    """Say what was left out, and where the two were not asked alike."""
    for task in found.tasks:
        for count, side in ((task.only_before, "A"), (task.only_after, "B")):
            if count:
                note(f"{task.task}: {count:,} items that only {side} has are left out")
    for names, side in ((found.only_before, "A"), (found.only_after, "B")):
        if names:
            note(f"only {side} has {', '.join(names)}")
    ways = [{(one.prompting, one.dtype, one.engine) for one in chosen.asked} for chosen in (first, second)]
    if ways[0] != ways[1]:
        told = [" and ".join(sorted(", ".join(way) for way in side)) for side in ways]
        note(f"the two were not asked alike: A {told[0]}; B {told[1]}")
