"""`keural evaluate compare`: two models' results on the same items. No model is opened."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keural.terminal import note, show, show_table

if TYPE_CHECKING:
    from keural.evaluate.comparison.chosen import Chosen
    from keural.evaluate.comparison.paired import Comparison, TaskComparison

Side = Literal["left", "right"]
COLUMNS: dict[str, Side] = {
    "task": "left", "items": "right", "A": "right", "B": "right", "B - A": "right", "95%": "right", "gained/lost": "right",
    "p": "right", "p (Holm)": "right", "least seen": "right", "": "left",
}  # fmt: skip
FOUND = {True: "better", False: "worse", None: ""}


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="results: a directory with a model's, or RUN_DIR/STAGE")],
    after: Annotated[Path, typer.Argument(metavar="B", help="results to compare with A's")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures for programs")] = None,
) -> None:
    """Compare two models' results task by task on the items that both have; only results are read, never a model."""
    from keural.errors import UserError
    from keural.evaluate.comparison.chosen import results_of
    from keural.evaluate.comparison.paired import compare as compared

    if json_file is not None and json_file.is_dir():
        raise UserError(f"--json {json_file}: is a directory; name a file")
    first, second = results_of(before), results_of(after)
    found = compared(first.tasks, second.tasks)
    if json_file is not None:
        from keural.files import write_json

        write_json(json_file, {"before": first.label, "after": second.label, **found.to_json()})
    show(f"A: {first.label}\nB: {second.label}")
    show_table("B against A", COLUMNS, [_row(task) for task in found.tasks])
    show("Differences are paired; p: exact McNemar, or a bootstrap where scores are graded or items come in clusters.")
    show("least seen: the true difference that would have been found in 8 of 10 such comparisons.")
    _tell_rest(first, second, found)


def _row(task: "TaskComparison") -> list[str]:
    from keural.evaluate.statistics.summary import BITS

    change, digits = task.difference, 3
    unit = " b/B" if task.kind == BITS else ""
    return [
        task.task,
        f"{change.n:,}",
        f"{task.before:.{digits}f}{unit}",
        f"{task.after:.{digits}f}{unit}",
        f"{change.value:+.{digits}f}",
        f"{change.low:+.{digits}f} to {change.high:+.{digits}f}",
        f"{change.gained:,}/{change.lost:,}",
        f"{change.p:.{digits}g}",
        f"{task.p_holm:.{digits}g}",
        f"{change.least:.{digits}f}",
        FOUND[task.better],
    ]


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
