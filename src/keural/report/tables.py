"""The tables of a report.

In: a `Run`. Out: `Table`s of finished text, with shares as numbers where a bar is drawn. What an evaluation holds beyond the known
measures is listed as it is, so that nothing measured stays out of the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from keural.report.collect import Run, Stage
from keural.report.format import ABSENT, duration, large, number, percent
from keural.report.panels import objective_color, objective_label

KNOWN_MEASURES = {
    "accuracy", "accuracy_stderr", "stderr", "by_task", "by_language", "by_task_and_language", "preference_accuracy",
    "polite_rate", "items", "pairs", "n", "before", "bits_per_byte",
    "stages", "tax",
}  # fmt: skip
MOST_NAMED = 10
PACKERS = {"xz": "xz -9", "zstd": "zstd -19"}
"""What packs the same text, by its key in a measure."""
TRAINED = "trained parameters"
CellT = TypeVar("CellT")


@dataclass(frozen=True)
class Cell:
    """Text of a cell; `share` in [0, 1] draws a bar, `tag` is a color class for a label, `strong` marks the best, `small` stands
    below the text.
    """

    text: str
    numeric: bool = False
    share: float | None = None
    tag: str = ""
    strong: bool = False
    small: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, rows and a remark; a column is right-aligned when its first cell is numeric."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    numeric: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        right = frozenset(index for row in self.rows for index, cell in enumerate(row) if cell.numeric)
        object.__setattr__(self, "numeric", right)


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: (label, value, remark)."""
    evaluation, planned = run.evaluation, run.recipe.get("stages") or run.stages
    finished = sum(stage.finished for stage in run.stages)
    items = [("stages finished", f"{finished} of {len(planned)}", ""), ("training time", duration(run.seconds), "")]
    items.append(("tokens trained", large(run.tokens), ""))
    if run.parameters:
        items.append(("parameters", large(run.parameters[0]), f"{large(run.parameters[1])} active per token"))
    before = evaluation.get("before") or {}
    if "accuracy" in evaluation:
        items.append(("accuracy", percent(evaluation["accuracy"]), _was(before.get("accuracy"))))
    if "preference_accuracy" in evaluation:
        items.append(("preference accuracy", percent(evaluation["preference_accuracy"]), _was(before.get("preference_accuracy"))))
    polite = evaluation.get("polite_rate")
    if polite is not None:
        after, earlier = (polite.get("after"), polite.get("before")) if isinstance(polite, Mapping) else (polite, None)
        items.append(("polite Korean answers", percent(after), _was(earlier)))
    return items


def stages(run: Run) -> Table:
    """One row per stage; how many parameters each trained where some trained another number than the model has."""
    columns = [
        "stage",
        "objective",
        "starts from",
        TRAINED,
        "time",
        "steps",
        "tokens",
        "tokens/s",
        "loss, first → last",
        "held out",
    ]
    note = "Held out: the loss on the stage's own held-out data at its end, of conversations also before its first step."
    note += _left_out(run)
    rows = [_stage_row(stage) for stage in run.stages]
    if all(stage.done.get("trained", 0) in (0, (run.parameters or (0, 0))[0]) for stage in run.stages):
        place = columns.index(TRAINED)
        columns, rows = _without(columns, place), [_without(row, place) for row in rows]
    return Table("Stages", columns, rows, note)


def _without(cells: list[CellT], place: int) -> list[CellT]:
    return cells[:place] + cells[place + 1 :]


def _left_out(run: Run) -> str:
    """Which steps were not taken, and why."""
    found = [(stage.name, step) for stage in run.stages for step in stage.steps if "skipped" in step]
    why = {"asked": "asked for"}
    said = [f"{name} {step['step']} ({why.get(step['skipped'], step['skipped'])})" for name, step in found[:MOST_NAMED]]
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return f" Left out were the steps {', '.join(said)}{more}." if said else ""


def evaluation(run: Run) -> list[Table]:
    """Accuracy by task and language, before and after the last DPO stage where there are both, and remaining measures."""
    figures = run.evaluation
    before = figures.get("before") or {}
    tables = [table for table in (_summary_of(figures, before), *_groups(figures, before), _by_both(figures)) if table.rows]
    rest = {key: value for key, value in figures.items() if key not in KNOWN_MEASURES and value not in ({}, [], None)}
    if rest:
        rows = [[Cell(name), Cell(value)] for name, value in _flat(rest)]
        tables.append(Table("Further figures", ["measure", "value"], rows))
    return tables


def bits_per_byte(run: Run) -> Table:
    """Bits per byte of held-out text for each model, packers beside it; the lowest figure of a row is marked."""
    measured = run.evaluation.get("bits_per_byte") or []
    models = list(dict.fromkeys(name for row in measured for name in row.get("models", {})))
    packers = {key: label for key, label in PACKERS.items() if any(key in row for row in measured)}
    rows = [_bits_row(row, models, list(packers)) for row in measured]
    note = "Bits per UTF-8 byte of held-out text; lower is better. xz -9 and zstd -19 pack the same text."
    return Table("Bits per byte", ["text", "language", "documents", "bytes", *models, *packers.values()], rows, note)


def data(run: Run) -> list[Table]:
    """What was read, kept and dropped, one table per stage."""
    found = run.summary.get("data") or {}
    groups = found.items() if isinstance(found, Mapping) else [("Data", found)]
    return [_data_table(str(name), rows) for name, rows in groups if isinstance(rows, list) and rows]


def _stage_row(stage: Stage) -> list[Cell]:
    seconds, tokens = stage.total("seconds"), stage.total("tokens")
    losses = stage.series("loss")[1]
    first = stage.done.get("loss_first", losses[0] if losses else None)
    last = stage.done.get("loss_last", losses[-1] if losses else None)
    steps = number(stage.done.get("steps", len(stage.steps)))
    if left_out := sum("skipped" in step for step in stage.steps):
        steps = f"{steps} ({number(left_out)} left out)"
    heldout = stage.done.get("heldout") or (stage.heldout[-1]["heldout"] if stage.heldout else {})
    return [
        Cell(stage.name if stage.finished else f"{stage.name} (interrupted)"),
        Cell(objective_label(stage.objective) or ABSENT, tag=objective_color(stage.objective)),
        Cell(str(stage.done.get("init_from") or stage.settings.get("init_from") or ABSENT)),
        Cell(large(trained) if (trained := stage.done.get("trained")) else ABSENT, numeric=True),
        Cell(duration(seconds), numeric=True),
        Cell(steps, numeric=True),
        Cell(large(tokens), numeric=True),
        Cell(large(tokens / seconds) if seconds else ABSENT, numeric=True),
        Cell(f"{number(first)} → {number(last)}", numeric=True),
        Cell(_heldout_text(heldout, stage.done.get("heldout_change") or {}), numeric=True),
    ]


def _heldout_text(heldout: Mapping[str, Any], change: Mapping[str, Mapping[str, Any]]) -> str:
    """The held-out loss, of conversations also that before the first step; of documents also bits per byte; for DPO the margin and
    the share of pairs ranked right.
    """
    before = f"{number(change['all']['before'])} → " if change else ""
    parts = [f"{before}{number(heldout.get('loss'))}"]
    if "bits_per_byte" in heldout:
        parts.append(f"{number(heldout['bits_per_byte'])} bits per byte")
    if "reward_margin" in heldout:
        parts.append(f"margin {number(heldout['reward_margin'])}")
    if "reward_accuracy" in heldout:
        parts.append(f"{percent(heldout['reward_accuracy'])} right")
    return ", ".join(parts)


def _summary_of(figures: Mapping[str, Any], before: Mapping[str, Any]) -> Table:
    polite = figures.get("polite_rate")
    polite = polite if isinstance(polite, Mapping) else {"after": polite}
    measures = [
        (f"exact match ({_count(figures, 'items')}greedy)", before.get("accuracy"), figures.get("accuracy")),
        (f"preferred answer more probable ({_count(figures, 'pairs')}summed log-probability)",
         before.get("preference_accuracy"), figures.get("preference_accuracy")),
        ("polite Korean answers (존댓말)", polite.get("before"), polite.get("after")),
    ]  # fmt: skip
    error = figures.get("accuracy_stderr", figures.get("stderr"))
    note = f"Standard error of the exact match: {percent(error)}." if error is not None else ""
    return _compared("Held-out measures", "measure", [m for m in measures if m[2] is not None], before, note)


def _groups(figures: Mapping[str, Any], before: Mapping[str, Any]) -> Iterable[Table]:
    for key, title in (("by_task", "Exact match by task"), ("by_language", "Exact match by language")):
        earlier = before.get(key) or {}
        rows = [(name, _share_of(earlier.get(name)), _share_of(value)) for name, value in (figures.get(key) or {}).items()]
        yield _compared(title, key.removeprefix("by_"), rows, before)


def _by_both(figures: Mapping[str, Any]) -> Table:
    nested = figures.get("by_task_and_language") or {}
    languages = sorted({language for row in nested.values() for language in row})
    rows = [[Cell(task), *(_share_cell(row.get(language)) for language in languages)] for task, row in nested.items()]
    return Table("Exact match by task and language", ["task", *languages], rows)


def _compared(title: str, what: str, rows: Iterable[tuple[str, Any, Any]], before: Mapping[str, Any], note: str = "") -> Table:
    """A table with the final figures, and those before the last DPO stage when there are any."""
    rows = list(rows)
    if any(earlier is not None for _, earlier, _ in rows):
        name = before.get("stage")
        columns = [what, f"before ({name})" if name else "before", "final model"]
        cells = [[Cell(label), _share_cell(earlier), _share_cell(value)] for label, earlier, value in rows]
        return Table(title, columns, cells, note)
    return Table(title, [what, "final model"], [[Cell(label), _share_cell(value)] for label, _, value in rows], note)


def _bits_row(row: Mapping[str, Any], models: Sequence[str], packers: Sequence[str]) -> list[Cell]:
    values = [row.get("models", {}).get(name) for name in models] + [row.get(key) for key in packers]
    best = min((value for value in values if value is not None), default=None)
    head = [Cell(str(row.get("name", ABSENT))), Cell(str(row.get("language") or ABSENT))]
    counts = [Cell(number(row.get(key)), numeric=True) for key in ("documents", "bytes")]
    figures = [Cell(ABSENT if v is None else f"{v:.3f}", numeric=True, strong=v is not None and v == best) for v in values]
    return [*head, *counts, *figures]


def _data_table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_data_cell(row.get(key)) for key in columns] for row in rows]
    return Table(name, [column.replace("_", " ") for column in columns], cells)


def _data_cell(value: Any) -> Cell:
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{reason} {number(count)}" for reason, count in value.items()) or ABSENT)
    if isinstance(value, list | tuple):
        return Cell(", ".join(map(str, value)) or ABSENT)
    return Cell(ABSENT if value in (None, "") else number(value), numeric=isinstance(value, int | float))


def _share_of(value: Any) -> Any:
    return value.get("accuracy") if isinstance(value, Mapping) else value


def _share_cell(value: Any) -> Cell:
    known = isinstance(value, int | float)
    return Cell(percent(value), numeric=True, share=min(max(float(value), 0.0), 1.0) if known else None)


def _count(figures: Mapping[str, Any], key: str) -> str:
    return f"{number(figures[key])} {key}, " if key in figures else ""


def _was(value: Any) -> str:
    return f"{percent(value)} before the last DPO" if value is not None else ""


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted names and texts of nested figures."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, number(value)
