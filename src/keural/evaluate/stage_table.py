"""The table of a run: what every model of it scored on every task, and what each stage changed.

In: results, item by item, of the untrained model and of the finished stages. Out: `{stage: {"tasks": {task: {...}}}}` for
`summary.json`: `score`, `low`, `high`, `n`, `chance`, `items` (the file of the items, from the run directory) and, for stages that
start from another model of the table, `change`: the paired difference from it on the same items.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from keural.evaluate.bench import UNTRAINED, Bench
from keural.evaluate.results.records import TaskResults
from keural.evaluate.statistics import CONFIDENCE, Difference, holm, paired_difference
from keural.evaluate.statistics.summary import summarize


def stage_table(bench: Bench, found: Mapping[str, Sequence[TaskResults]]) -> dict[str, Any]:
    """The table, its stages in the order of `found`."""
    table = {}
    for name, results in found.items():
        tasks = {one.task: summarize(one, bench.items_file(name, one)).to_json() for one in results}
        before = None if name == UNTRAINED else bench.recipe.stage(name).predecessor or UNTRAINED
        if before in found:
            for task, change in changes(found[before], results).items():
                tasks[task]["change"] = {"from": before, **change}
        table[name] = {"tasks": tasks}
    return table


def changes(before: Sequence[TaskResults], after: Sequence[TaskResults]) -> dict[str, dict[str, Any]]:
    """What changed in each task that both models were asked: the difference with its interval, Holm's p over all of these tasks,
    and whether that is below 1 - `CONFIDENCE`.
    """
    earlier = {one.task: {item.id: item.score for item in one.items} for one in before}
    compared: dict[str, Difference] = {}
    for one in after:
        pairs = [(earlier[one.task][item.id], item.score) for item in one.items if item.id in earlier.get(one.task, {})]
        if pairs:
            compared[one.task] = paired_difference([score for score, _ in pairs], [score for _, score in pairs])
    adjusted = holm([difference.p for difference in compared.values()])
    return {
        task: {
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "gained": difference.gained,
            "lost": difference.lost,
            "p": p,
            "significant": p < 1 - CONFIDENCE,
        }
        for (task, difference), p in zip(compared.items(), adjusted, strict=True)
    }
