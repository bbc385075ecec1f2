"""A run's stages beside each other: what each changed against the one it starts from, and what that cost since pretraining.

In: the figures of the stages as `--json` and `summary.json` hold them, and the items that they name. Out: the same figures with the
paired differences, the alignment tax and some wrong answers, from which a table is drawn without any further file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from keural.evaluate.comparison.paired import TaskComparison, compare
from keural.evaluate.results.records import TaskResults
from keural.evaluate.statistics import least_difference
from keural.evaluate.statistics.quantiles import two_sided_normal
from keural.evaluate.statistics.summary import BITS

WRONG = 10
"""Wrong answers that are shown of a task."""
LONGEST = 600
"""Characters of a text of theirs; the middle of a longer one is left out."""
Figures = dict[str, Any]


def complete(
    figures: Figures,
    read: Callable[[str], TaskResults],
    predecessors: Mapping[str, str] | None = None,
    pretrained: str | None = None,
) -> Figures:
    """The figures of a run's stages with everything that a table of them shows.

    Args:
        figures: `{"stages": {name: {"tasks": {name: {"score", .., "items"}}}}}`, the stages in their order. Tasks with different
            values of `asked` are not compared.
        read: reads the items of a task from the path that stands under `items`. Raises `UserError` where that fails.
        predecessors: the stage that each starts from; the one before it where none is given.
        pretrained: the last pretraining stage, against which the alignment tax is measured; without it there is no tax.

    Returns:
        The figures. Each task has besides what `TaskResults` says of it (`language`, `kind`, `digest`, `left_out`, `baselines`)
        and, where its stage has a predecessor with the same task, `change`: `TaskComparison.to_json` and the stage it is `against`.
        Tasks of the last stage have `wrong` answers. `tax` has for each language the mean difference of each later stage against
        `pretrained`.
    """
    stages = list(figures["stages"])
    results = {name: _results(figures["stages"][name], read) for name in stages}
    before = {name: earlier for earlier, name in pairwise(stages)} | dict(predecessors or {})
    completed = {name: _stage(figures["stages"][name], results[name]) for name in stages}
    for name in stages:
        against = before.get(name)
        if against is not None and against in results and against != name:
            for one in _changes(results[against], results[name], _asked_alike(figures, against, name)):
                completed[name]["tasks"][one.task]["change"] = one.to_json() | {"against": against}
    if stages:
        for task, found in results[stages[-1]].items():
            completed[stages[-1]]["tasks"][task]["wrong"] = wrong_answers(found)
    tax = _tax(figures, results, pretrained) if pretrained is not None and pretrained in results else []
    return figures | {"stages": completed, "tax": tax}


def wrong_answers(results: TaskResults, most: int = WRONG) -> list[dict[str, str]]:
    """Some items of a task that got no full score: question, right answer, given answer. Which ones depends on their ids alone."""
    if results.kind == BITS:
        return []
    wrong = sorted((item for item in results.items if item.score < 1), key=lambda item: item.id)
    return [
        {"question": _shortened(item.question), "expected": _shortened(item.expected), "given": _shortened(item.given)}
        for item in wrong[:most]
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def _results(stage: Figures, read: Callable[[str], TaskResults]) -> dict[str, TaskResults]:
    return {name: read(task["items"]) for name, task in stage.get("tasks", {}).items() if task.get("items")}


def _stage(stage: Figures, results: Mapping[str, TaskResults]) -> Figures:
    tasks = {name: dict(task) for name, task in stage.get("tasks", {}).items()}
    for name, found in results.items():
        tasks[name] |= {
            "language": found.language,
            "kind": found.kind,
            "digest": found.digest,
            "left_out": dict(found.left_out),
            "baselines": dict(getattr(found, "baselines", {})),
        }
    return stage | {"tasks": tasks}


def _asked_alike(figures: Figures, before: str, after: str) -> Callable[[str], bool]:
    """Whether two stages were asked a task in the same way, as far as their figures say: not one in a chat, the other as text."""
    ways = [
        {task: found.get("asked") for task, found in figures["stages"][name].get("tasks", {}).items()} for name in (before, after)
    ]
    return lambda task: ways[0].get(task) == ways[1].get(task)


def _changes(
    before: Mapping[str, TaskResults], after: Mapping[str, TaskResults], alike: Callable[[str], bool]
) -> Sequence[TaskComparison]:
    """The tasks that both stages have measured in the same way, and what changed."""
    same = [name for name, found in after.items() if name in before and before[name].digest == found.digest and alike(name)]
    same = [name for name in same if before[name].items and after[name].items]
    return compare([before[name] for name in same], [after[name] for name in same]).tasks if same else []


def _tax(figures: Figures, results: Mapping[str, Mapping[str, TaskResults]], pretrained: str) -> list[Figures]:
    """For each language, and for all where there are several, what each stage after pretraining scores more or less than it."""
    stages = list(figures["stages"])
    later = stages[stages.index(pretrained) + 1 :]
    changed = {name: _changes(results[pretrained], results[name], _asked_alike(figures, pretrained, name)) for name in later}
    changes = {name: [one for one in found if one.kind != BITS] for name, found in changed.items()}
    languages = list(dict.fromkeys(one.language for found in changes.values() for one in found))
    groups = [*([None] if len(languages) > 1 else []), *languages]
    rows = []
    for language in groups:
        means = {name: _mean([c for c in found if language in (None, c.language)]) for name, found in changes.items()}
        if known := {name: mean for name, mean in means.items() if mean is not None}:
            rows.append({"language": language, "against": pretrained, "stages": known})
    return rows


def _mean(changes: Sequence[TaskComparison]) -> Figures | None:
    """The mean of several tasks' differences, which are independent of each other, with its interval."""
    if not changes:
        return None
    value = sum(one.difference.value for one in changes) / len(changes)
    error = math.sqrt(sum(one.difference.error**2 for one in changes)) / len(changes)
    reach = two_sided_normal(0.95) * error
    known = math.isfinite(error)
    return {
        "value": value,
        "low": value - reach if known else None,
        "high": value + reach if known else None,
        "least": least_difference(error) if known else None,
        "tasks": len(changes),
    }
