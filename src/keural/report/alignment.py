"""What a report says of a stage's health: alarms, checks before its first step, held-out figures by source, length of answers.

In: a `Run`. Out: lines and `Table`s, empty where a run has none.
"""

from collections.abc import Mapping
from typing import Any

from keural.report.collect import Run, Stage
from keural.report.format import ABSENT, number, percent
from keural.report.scores.figures import PLAIN, scaled, signed
from keural.report.scores.side_tables import DOWN, UP
from keural.report.tables import Cell, Table

FOUND = {
    "empty_mask": "nothing trained",
    "empty_side": "a side with nothing trained",
    "empty_row": "rows with nothing trained",
    "open_answer": "end of an answer not trained",
    "cut_answer": "ends within an answer",
    "identical_sides": "identical answers",
    "swapped_pair": "also swapped",
    "own_answer": "not beside another answer",
    "other_label": "also with the other label",
    "one_label": "of the commoner label",
    "lost_to_length": "cut or left out for length",
}
"""What a report calls the findings of `keural.train.checks.stores`; one that is not here keeps its name."""


def alarms(run: Run) -> list[str]:
    """What left its range, a line each."""
    return [
        f"{stage.name}, step {int(line['step']) + 1}: {line.get('message', '')}" for stage in run.stages for line in stage.alarms
    ]


def checks(run: Run) -> Table:
    """What each stage was checked for before its first step."""
    rows = [
        [
            Cell(stage.name),
            Cell(str(found.get("store", ABSENT))),
            Cell(FOUND.get(str(found.get("check")), str(found.get("check")))),
            Cell(f"{found.get('count', 0):,} of {found.get('looked_at', 0):,}", numeric=True),
            Cell(percent(found.get("allowed")), numeric=True),
        ]
        for stage in run.stages
        for found in stage.checks.get("findings", ())
    ]
    probes = [f"{stage.name}: {text}" for stage in run.stages if (text := _probes(stage))]
    return Table("Checks before the first step", ["stage", "data", "looked for", "found", "allowed"], rows, "; ".join(probes))


def _probes(stage: Stage) -> str:
    isolation, difference = stage.checks.get("isolation"), stage.checks.get("reference_difference")
    parts = [
        f"a packed neighbour moves log-probabilities by {isolation:.1e} of what a document's own token does"
        if isolation is not None
        else "",
        f"policy and reference differ by {difference:.1e} per token" if difference is not None else "",
        _balance(stage.checks.get("labels") or {}),
    ]
    return ", ".join(part for part in parts if part)


def _balance(labels: Mapping[str, Any]) -> str:
    """How many labelled answers are good and bad ones, and what they weigh."""
    if not labels:
        return ""
    ratio = labels.get("ratio")
    weighed = f", together weighed {ratio:.2f} to 1" if ratio is not None else ""
    return f"{labels.get('desirable', 0):,} good and {labels.get('undesirable', 0):,} bad answers{weighed}"


def by_source(run: Run) -> list[Table]:
    """The held-out figures of each source and language, a table for each stage that has several: of conversations what the stage
    changed, of others the latest figures.
    """
    tables = []
    for stage in run.stages:
        heldout = stage.done.get("heldout") or (stage.heldout[-1]["heldout"] if stage.heldout else {})
        rows = [_source_row(name, figures) for name, figures in _grouped(heldout).items()]
        if len(change := stage.done.get("heldout_change") or {}) > 1:
            tables.append(_change_table(stage.name, change))
        elif rows:
            columns = ["source or language", "items", "loss", "margin", "ranked right", "log-probability, good", "bad"]
            width = 7 if any(row[3].text != ABSENT for row in rows) else 3
            tables.append(Table(f"Held out, {stage.name}", columns[:width], [row[:width] for row in rows]))
    return tables


def _change_table(stage: str, change: Mapping[str, Mapping[str, Any]]) -> Table:
    groups = _grouped({f"{group}/{name}": value for group, figures in change.items() for name, value in figures.items()})
    rows = [_change_row(name, figures) for name, figures in {**groups, "all": change["all"]}.items()]
    note = (
        "Mean loss per trained token of the same conversations before the stage's first step and after its last, and the paired "
        f"difference ± its standard error. {DOWN} fell and {UP} rose, where that is significant after Holm's adjustment."
    )
    return Table(f"Held out, {stage}", ["source or language", "conversations", "loss before", "after", "change"], rows, note)


def _change_row(name: str, figures: Mapping[str, Any]) -> list[Cell]:
    better = figures["better"]
    mark, tone = {True: (f" {DOWN}", "good"), False: (f" {UP}", "bad"), None: ("", "")}[better]
    cells = [Cell(number(figures["items"]), numeric=True)]
    cells += [Cell(scaled(figures[key], PLAIN), numeric=True) for key in ("before", "after")]
    change = f"{signed(figures['difference'], PLAIN)} ± {scaled(figures['error'], PLAIN)}{mark}"
    return [Cell(name), *cells, Cell(change, numeric=True, tag=tone)]


def _grouped(heldout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures by source and language, from keys such as `source/NAME/loss`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in heldout.items():
        group, separator, rest = key.partition("/")
        if separator and group in ("source", "language"):
            name, _, figure = rest.rpartition("/")
            found.setdefault(f"{name}" if group == "source" else f"language {name}", {})[figure] = value
    return found


def _source_row(name: str, figures: Mapping[str, Any]) -> list[Cell]:
    accuracy = figures.get("reward_accuracy")
    cells = [Cell(f"{figures.get('items', 0):,.0f}", numeric=True)]
    cells += [Cell(number(figures.get(key)), numeric=True) for key in ("loss", "reward_margin")]
    cells.append(Cell(percent(accuracy) if accuracy is not None else ABSENT, numeric=True))
    sides = (("logprob_chosen", "logprob_desirable"), ("logprob_rejected", "logprob_undesirable"))
    cells += [Cell(number(figures.get(pair, figures.get(answer))), numeric=True) for pair, answer in sides]
    return [Cell(name), *cells]


def lengths(run: Run) -> Table:
    """How far length alone explains the preferences that a stage trains on."""
    rows = [
        [
            Cell(stage.name),
            Cell(str(found.get("store", ABSENT))),
            Cell(str(found.get("source") or "all")),
            Cell(f"{found.get('pairs', 0):,}", numeric=True),
            Cell(percent(found.get("longer")), numeric=True, share=found.get("longer")),
            Cell(f"{found.get('chosen_tokens', 0.0):.0f}", numeric=True),
            Cell(f"{found.get('rejected_tokens', 0.0):.0f}", numeric=True),
        ]
        for stage in run.stages
        for found in stage.checks.get("lengths", ())
    ]
    columns = ["stage", "data", "source", "pairs", "longer answer chosen", "tokens, chosen", "rejected"]
    note = "An accuracy says something only as far as it is above what length alone gives: the share of longer ones, or the rest."
    return Table("Preference by length", columns, rows, note)
