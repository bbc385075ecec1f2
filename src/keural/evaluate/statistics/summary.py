"""The figures of a task: its score with an interval, from the records of its items.

In: `TaskResults`. Out: a `TaskScore`, as it stands in `summary.json` and in what `keural evaluate --json` writes.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from keural.errors import UserError
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.statistics.intervals import Estimate, ratio_interval, share_interval

BITS = "rolling"
"""The kind of task whose score is bits per byte, of which less is better."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on a task."""

    score: float
    """In [0, 1], or bits per byte."""
    low: float | None
    """Lower end of the 95% interval; None where the items cannot tell it."""
    high: float | None
    n: int
    """Items."""
    chance: float | None
    """Score of who knows nothing."""
    items: str | None = None
    """The file with the items, as a path from the file that this stands in."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def summarize(results: TaskResults, items: str | None = None) -> TaskScore:
    """The score of a task with its 95% interval: shares by Wilson, other scores by Student's t, both robust for clusters; of texts
    the bits per byte. `items` is the path of the file with the items, which is only passed on.

    Raises `UserError` for a task without items, and for scores that are not finite or outside [0, 1].
    """
    try:
        found = estimate(results)
    except UserError as error:
        raise UserError(f"{results.task}: {error}") from error
    return TaskScore(found.value, finite(found.low), finite(found.high), found.n, results.chance, items)


def estimate(results: TaskResults) -> Estimate:
    """As `summarize`, with the standard error."""
    scores, clusters = [item.score for item in results.items], [item.cluster for item in results.items]
    if results.kind != BITS:
        return share_interval(scores, clusters)
    found = ratio_interval(scores, [size_of(item) for item in results.items], clusters)
    return Estimate(found.value, max(found.low, 0.0), found.high, found.error, found.n, found.units)


def size_of(item: ItemResult) -> float:
    """Bytes of a text whose bits were counted. Raises `UserError` where they are not there."""
    size = item.details.get("bytes")
    if isinstance(size, bool) or not isinstance(size, int | float) or not (np.isfinite(size) and size > 0):
        raise UserError(f"item {item.id}: the number of its bytes is {size!r}; measure the task again")
    return float(size)


def finite(value: float) -> float | None:
    """A number as JSON can say it: None for what is not finite."""
    return value if math.isfinite(value) else None
