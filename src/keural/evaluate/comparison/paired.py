"""Two models' results compared task by task on the items that both have.

In: the `TaskResults` of both. Out: a `Comparison`: for each task both scores, the paired difference with its interval, its p, and p
adjusted for the number of tasks. No model is opened.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from keural.errors import UserError
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.statistics import Difference, holm, paired_difference
from keural.evaluate.statistics.summary import BITS, finite, size_of

ALPHA = 0.05
"""A difference counts as found when its adjusted p is at most this."""


@dataclass(frozen=True)
class TaskComparison:
    """A task as two models did it."""

    task: str
    language: str
    kind: str
    before: float
    """The first model's score on the common items."""
    after: float
    difference: Difference
    p_holm: float
    """`difference.p` adjusted by Holm for the tasks that were compared."""
    only_before: int
    """Items that only the first has; they are left out."""
    only_after: int

    @property
    def found(self) -> bool:
        """Whether the difference is significant after the adjustment."""
        return self.p_holm <= ALPHA

    @property
    def better(self) -> bool | None:
        """Whether the second is better (bits: less is better); None where the difference is not significant."""
        return (self.difference.value < 0) == (self.kind == BITS) if self.found else None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what cannot be told is null."""
        change = self.difference
        return {
            "language": self.language,
            "kind": self.kind,
            "n": change.n,
            "before": self.before,
            "after": self.after,
            "difference": change.value,
            "low": finite(change.low),
            "high": finite(change.high),
            "p": change.p,
            "p_holm": self.p_holm,
            "test": change.test,
            "least": finite(change.least),
            "gained": change.gained,
            "lost": change.lost,
            "only_before": self.only_before,
            "only_after": self.only_after,
            "better": self.better,
        }


@dataclass(frozen=True)
class Comparison:
    """What two models have in common."""

    tasks: Sequence[TaskComparison]
    only_before: Sequence[str]
    """Tasks that only the first has."""
    only_after: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, the tasks by name."""
        tasks = {task.task: task.to_json() for task in self.tasks}
        return {"tasks": tasks, "only_before": list(self.only_before), "only_after": list(self.only_after)}


def compare(before: Sequence[TaskResults], after: Sequence[TaskResults]) -> Comparison:
    """What changed from one model to another, on the items of each task that both have.

    A task that was measured in several ways (other examples, other settings) is compared way by way.

    Raises:
        UserError: when no task is in both, when the two have measured different things under one name (other digests), or when
            a task has no common item.
    """
    first, second = _by_task(before), _by_task(after)
    common = [name for name in first if name in second]
    if not common:
        raise UserError(
            f"no task is in both: the first has {_listed(first)}, the second {_listed(second)}; evaluate both on the same"
        )
    compared = [one for name in common for one in _task(name, first[name], second[name])]
    adjusted = holm([one.difference.p for one in compared])
    return Comparison(
        [replace(one, p_holm=p) for one, p in zip(compared, adjusted, strict=True)],
        [name for name in first if name not in second],
        [name for name in second if name not in first],
    )


def _by_task(results: Sequence[TaskResults]) -> dict[str, dict[str, TaskResults]]:
    found: dict[str, dict[str, TaskResults]] = {}
    for one in results:
        found.setdefault(one.task, {})[one.digest] = one
    return found


def _listed(names: dict[str, Any]) -> str:
    return ", ".join(names) or "none"


def _task(name: str, before: dict[str, TaskResults], after: dict[str, TaskResults]) -> list[TaskComparison]:
    common = [digest for digest in before if digest in after]
    if not common:
        raise UserError(
            f"{name}: the two were measured differently (task {', '.join(d[:12] for d in before)} and "
            f"{', '.join(d[:12] for d in after)}: other settings, examples or files); evaluate both again in one way"
        )
    label = {digest: name if len(common) == 1 else f"{name} ({digest[:8]})" for digest in common}
    return [_compared(label[digest], before[digest], after[digest]) for digest in common]


def _compared(name: str, before: TaskResults, after: TaskResults) -> TaskComparison:
    first, second = _numbered(before.items), _numbered(after.items)
    common = [key for key in first if key in second]
    if not common:
        raise UserError(f"{name}: the two have no item in common ({len(first)} and {len(second)}); evaluate both again")
    pairs = [(first[key], second[key]) for key in common]
    scores = [item.score for item, _ in pairs], [item.score for _, item in pairs]
    weights = _sizes(name, pairs) if before.kind == BITS else None
    try:
        change = paired_difference(*scores, [item.cluster for item, _ in pairs], weights=weights)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    total = len(pairs) if weights is None else sum(weights)
    return TaskComparison(
        task=name,
        language=before.language,
        kind=before.kind,
        before=sum(scores[0]) / total,
        after=sum(scores[1]) / total,
        difference=change,
        p_holm=change.p,
        only_before=len(first) - len(common),
        only_after=len(second) - len(common),
    )


def _numbered(items: Sequence[ItemResult]) -> dict[tuple[str, int], ItemResult]:
    """Items by id; a set may hold an item twice, which then are its first and second."""
    seen: Counter[str] = Counter()
    found = {}
    for item in items:
        found[item.id, seen[item.id]] = item
        seen[item.id] += 1
    return found


def _sizes(name: str, pairs: Sequence[tuple[ItemResult, ItemResult]]) -> list[float]:
    sizes = [(size_of(before), size_of(after)) for before, after in pairs]
    if any(one != other for one, other in sizes):
        raise UserError(f"{name}: the same texts have other numbers of bytes in the two; evaluate both again")
    return [one for one, _ in sizes]
