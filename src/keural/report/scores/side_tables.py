"""Tables beside the scores: bits per byte, and every figure with what it rests on.

In: figures by stage and task. Out: `Table`s of finished text.
"""

from collections.abc import Sequence

from keural.report.format import ABSENT, number
from keural.report.scores.figures import (
    PERCENT,
    PLAIN,
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
from keural.report.tables import Cell, Table

PACKERS = {"xz_9": "xz -9", "zstd_19": "zstd -19"}
"""What packs the same text, as a reader knows it, by its name among a task's `baselines`."""
UP, DOWN = "▲", "▼"


def bits_table(measured: Measured, tasks: Sequence[str]) -> Table | None:
    """Bits per byte of each text for every stage, with those of packers; None without any."""
    if not tasks:
        return None
    latest = {task: latest_of(measured, task) for task in tasks}
    ordered = sorted(tasks, key=lambda task: language_order(str(latest[task].get("language") or "")))
    names = list(dict.fromkeys(name for found in latest.values() for name in part(found, "baselines")))
    packers = {name: PACKERS.get(name, name) for name in names}
    rows = [_bits_row(task, latest[task], [found.get(task, {}) for found in measured.values()], list(packers)) for task in ordered]
    note = (
        "Bits per UTF-8 byte of held-out text ± half the 95% interval; lower is better, the lowest of a row is bold. "
        f"{DOWN} fewer and {UP} more bits than the stage that it starts from, where the paired difference is significant."
    )
    return Table("Bits per byte", ["text", "language", "texts", *measured, *packers.values()], rows, note)


def _bits_row(task: str, latest: Figures, stages: Sequence[Figures], packers: Sequence[str]) -> list[Cell]:
    values = [one.get("score") for one in stages] + [part(latest, "baselines").get(key) for key in packers]
    best = min((value for value in values if is_number(value)), default=None)
    marks = [*map(_mark, stages), *[""] * len(packers)]
    halves = [*(half_interval(one, PLAIN) for one in stages), *[""] * len(packers)]
    head = [Cell(task), Cell(language_name(latest.get("language")) or ABSENT), Cell(number(latest.get("n")), numeric=True)]
    return head + [
        Cell(f"{scaled(value, PLAIN)}{mark}", numeric=True, strong=is_number(value) and value == best, small=half)
        for value, mark, half in zip(values, marks, halves, strict=True)
    ]


def _mark(figures: Figures) -> str:
    better = part(figures, "change").get("better")
    return "" if better is None else f" {DOWN if better else UP}"


def details_table(measured: Measured, tasks: Sequence[str]) -> Table:
    """Every figure: n, interval, the difference against the stage before, and what training data held."""
    rows = [_details_row(task, stage, found[task]) for task in tasks for stage, found in measured.items() if task in found]
    columns = ["task", "stage", "score", "95% interval", "n", "against", "difference", "higher / lower", "p (Holm)", "least seen"]
    note = (
        "Differences are paired on the same items; higher / lower counts the items whose score rose and fell. p is of the exact "
        "McNemar test, or of a bootstrap where scores are graded or items come in clusters, adjusted by Holm over the tasks of a "
        "stage. Least seen: the true difference that would have been found in 8 of 10 such evaluations."
    )
    return Table("", [*columns, "in training data"], rows, note)


def _details_row(task: str, stage: str, figures: Figures) -> list[Cell]:
    scale = PLAIN if is_bits(figures) else PERCENT
    change = part(figures, "change")
    texts = [scaled(figures.get("score"), scale), interval(figures, scale), number(figures.get("n"))]
    after = [ABSENT] * 4
    if change:
        after = [
            f"{signed(change.get('difference'), scale)} {signed_interval(change, scale)}",
            f"{number(change.get('gained'))} / {number(change.get('lost'))}",
            probability(change.get("p_holm")),
            scaled(change.get("least"), scale),
        ]
    after.append(number(seen_items(figures)) if "contamination" in figures else ABSENT)
    cells = [Cell(text, numeric=True) for text in texts]
    return [Cell(task), Cell(stage), *cells, Cell(str(change.get("against") or ABSENT)), *(Cell(t, numeric=True) for t in after)]
