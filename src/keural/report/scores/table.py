"""What a run's stages score: one table of tasks and stages, from the figures that `summary.json` and `--json` hold.

In: `{"stages": {name: {"tasks": {name: figures}}}, "tax": [...]}` as `keural.evaluate.comparison.stages.complete` leaves it; what
is not there is not shown. Out: a `Scores` of finished text and small drawings. Marks stand only where a paired difference against
the stage before is significant after Holm's adjustment over the tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from keural.report.format import ABSENT, number
from keural.report.scores.course import course
from keural.report.scores.figures import (
    Figures,
    Measured,
    half_interval,
    interval,
    is_bits,
    is_number,
    language_name,
    language_order,
    latest_of,
    part,
    probability,
    scaled,
    seen_items,
    signed,
    signed_interval,
)
from keural.report.scores.side_tables import DOWN, UP, bits_table, details_table
from keural.report.tables import Table

SEEN = "†"
ALL = "all tasks"
LENGTH = "length_only"
"""Of a task's `baselines`: the score of who looks at nothing but the length of answers."""


@dataclass(frozen=True)
class Score:
    """A cell: the score, half its interval, a mark with its color class, and what is said under the pointer."""

    text: str
    half: str = ""
    mark: str = ""
    tone: str = ""
    hint: str = ""
    weight: float = 0.0
    """How far the score is from chance (0) to everything right (1), which shades the cell."""


@dataclass(frozen=True)
class Row:
    """A task: its name, number of items, remark (contamination), chance, course over the stages, a cell for each stage."""

    name: str
    n: str
    remark: str
    chance: str
    length: str
    """Score of who looks at nothing but the length of answers, of pairs."""
    course: Markup
    cells: Sequence[Score]


@dataclass(frozen=True)
class Exchanges:
    """Wrong answers to a task: `question`, `expected`, `given` of each."""

    task: str
    answers: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Scores:
    """The table of a run; empty where nothing was measured."""

    stages: Sequence[str] = ()
    groups: Sequence[tuple[str, Sequence[Row]]] = ()
    """Language and its tasks."""
    tax: Sequence[tuple[str, Sequence[Score]]] = ()
    against: str = ""
    """The stage that the tax is measured against."""
    bits: Table | None = None
    details: Table | None = None
    wrong: Sequence[Exchanges] = ()
    seen: bool = False
    """Whether training data held items of any task."""


def scores(evaluation: Figures) -> Scores:
    """The table of a run's `evaluation`."""
    measured: Measured = {name: part(stage, "tasks") for name, stage in part(evaluation, "stages").items()}
    tasks = list(dict.fromkeys(name for found in measured.values() for name in found))
    if not tasks:
        return Scores()
    latest = {task: latest_of(measured, task) for task in tasks}
    tax = evaluation.get("tax") or ()
    return Scores(
        stages=list(measured),
        groups=list(_groups(measured, {task: one for task, one in latest.items() if not is_bits(one)})),
        tax=[(language_name(row.get("language")) or ALL, _tax_cells(part(row, "stages"), measured)) for row in tax],
        against=next((str(row.get("against", "")) for row in tax), ""),
        bits=bits_table(measured, [task for task in tasks if is_bits(latest[task])]),
        details=details_table(measured, tasks),
        wrong=[Exchanges(task, one["wrong"]) for task, one in latest.items() if one.get("wrong")],
        seen=any(seen_items(figures) for found in measured.values() for figures in found.values()),
    )


def _groups(measured: Measured, latest: Mapping[str, Figures]) -> Iterator[tuple[str, list[Row]]]:
    """The tasks of each language."""
    codes = {task: str(figures.get("language") or "") for task, figures in latest.items()}
    for code in sorted(set(codes.values()), key=language_order):
        yield language_name(code), [_row(measured, task, latest[task]) for task in latest if codes[task] == code]


def _row(measured: Measured, task: str, latest: Figures) -> Row:
    figures = [found.get(task) for found in measured.values()]
    return Row(
        name=task,
        n=number(latest.get("n")),
        remark=_remark(latest),
        chance=scaled(latest.get("chance")),
        length=scaled(length) if is_number(length := part(latest, "baselines").get(LENGTH)) else "",
        course=course(task, figures, latest.get("chance")),
        cells=[Score(ABSENT) if one is None else _score(one, stage) for stage, one in zip(measured, figures, strict=True)],
    )


def _score(figures: Figures, stage: str) -> Score:
    value, better = figures.get("score"), part(figures, "change").get("better")
    chance = figures["chance"] if is_number(figures.get("chance")) else 0.0
    above = (value - chance) / (1 - chance) if is_number(value) and chance < 1 else 0.0
    return Score(
        text=scaled(value) + (SEEN if seen_items(figures) else ""),
        half=half_interval(figures),
        mark="" if better is None else UP if better else DOWN,
        tone="" if better is None else "good" if better else "bad",
        hint="\n".join(_hint(figures, stage)),
        weight=round(min(max(above, 0.0), 1.0), 2),
    )


def _hint(figures: Figures, stage: str) -> Iterator[str]:
    """What is known of a score, a line each."""
    yield f"{stage}: {scaled(figures.get('score'))}, 95% interval {interval(figures)}, n {number(figures.get('n'))}"
    if change := part(figures, "change"):
        yield f"against {change.get('against')}: {signed(change.get('difference'))} {signed_interval(change)}"
        counts = f"{number(change.get('gained'))} items higher, {number(change.get('lost'))} lower"
        yield f"{counts}, p {probability(change.get('p_holm'))} (Holm)"
    if found := seen_items(figures):
        clean = part(part(figures, "contamination"), "clean")
        yield f"{number(found)} items in training data; the others: {scaled(clean.get('score'))}, {interval(clean)}"


def _remark(figures: Figures) -> str:
    """What training data held of a task, as far as it is known."""
    known, parts = part(figures, "contamination"), []
    if found := seen_items(figures):
        clean = part(known, "clean")
        others = f"without them {scaled(clean.get('score'))} {half_interval(clean)}" if clean else "none is left without them"
        parts.append(f"{SEEN} {number(found)} of {number(figures.get('n'))} items in training data; {others}")
    if unknown := known.get("unknown"):
        parts.append(f"training text of {', '.join(unknown)} is not there to be searched")
    if short := known.get("too_short"):
        parts.append(f"{number(short)} items too short to be looked for")
    return "; ".join(parts)


def _tax_cells(figures: Figures, measured: Measured) -> list[Score]:
    return [_tax_cell(part(figures, stage)) for stage in measured]


def _tax_cell(figures: Figures) -> Score:
    value, low, high = (figures.get(key) for key in ("value", "low", "high"))
    if not is_number(value):
        return Score(ABSENT)
    sure = is_number(low) and is_number(high) and (low > 0 or high < 0)
    hint = f"mean of {number(figures.get('tasks'))} tasks: {signed(value)} {signed_interval(figures)}"
    return Score(signed(value), half_interval(figures), tone=("good" if value > 0 else "bad") if sure else "", hint=hint)
