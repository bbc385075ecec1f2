"""One model asked one task: what is known already is read, the rest is computed and kept as it comes.

In: an `EvaluatedModel`, a `LoadedTask`, the directory of results. Out: `TaskResults` and the file that has them. A second time
nothing is computed, and no weights are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.evaluate.models import EvaluatedModel
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.results.store import Header, LeftOut, ResultsWriter, finished_results, open_results, results_file
from keural.evaluate.tasks.items import Item, Unusable
from keural.evaluate.tasks.kinds import KINDS
from keural.evaluate.tasks.loading import LoadedTask

TOO_LONG = "too_long"


@dataclass(frozen=True)
class Evaluated:
    """A model's results on a task."""

    results: TaskResults
    file: Path
    computed: int
    """Items that were computed now."""
    task: LoadedTask | None = None
    """What was asked; None for a task that lm-eval asked."""


def evaluate(
    model: EvaluatedModel,
    task: LoadedTask,
    directory: Path,
    limit: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluated:
    """Ask a model the first `limit` items of a task, or all.

    `tell` is told how far it is. Raises `UserError` for damaged results, and for a model that cannot be read.
    """
    items = task.items[:limit]
    header = _header(model, task)
    path = results_file(directory, header)
    kept = finished_results(path, header)
    needs_baselines = KINDS[task.spec.kind].baselines is not None
    if kept is not None and not _missing(model, items, kept.items) and (len(items) in kept.baselines or not needs_baselines):
        return Evaluated(kept.results(limit), path, 0, task)
    with open_results(path, header) as writer:
        if needs_baselines and len(items) not in writer.baselines:
            writer.append_baselines(len(items), task.baselines(limit))
        missing = _missing(model, items, writer.items)
        _ask(model, task, missing, writer, tell)
        return Evaluated(writer.kept().results(limit), path, len(missing), task)


def _header(model: EvaluatedModel, task: LoadedTask) -> Header:
    return Header(
        model=model.identity,
        task=task.spec.name,
        language=task.spec.language,
        kind=task.spec.kind,
        chance=task.chance,
        digest=task.digest,
        size=len(task.items),
        shots=task.shots,
        left_out=task.left_out,
    )


def _missing(model: EvaluatedModel, items: Sequence[Item], known: Any) -> list[Item]:
    """Items of which there is no result, or one that what is asked for now does not admit."""
    cuts = model.conditions.too_long == "cut"

    def is_known(item: Item) -> bool:
        if item.id not in known:
            return False
        entry = known[item.id][1]
        if isinstance(entry, LeftOut):
            return not (cuts and entry.reason == TOO_LONG)
        return cuts or not entry.details.get("cut")

    return [item for item in items if not is_known(item)]


def _ask(
    model: EvaluatedModel, task: LoadedTask, items: Sequence[Item], writer: ResultsWriter, tell: Callable[[str], None]
) -> None:
    kind, spec = KINDS[task.spec.kind], task.spec
    asked: list[tuple[Item, Sequence[Any], dict[str, Any]]] = []
    left_out: list[tuple[int, ItemResult | LeftOut]] = []
    for item in items:
        try:
            requests, details = kind.requests(spec, item, model.asking)
            asked.append((item, requests, details))
        except Unusable as unusable:
            left_out.append((item.number, LeftOut(item.id, unusable.reason, unusable.detail)))
    if left_out:
        writer.append(left_out)
    done = 0
    tell(f"{model.name}: {spec.name}: 0 of {len(asked):,}")
    for batch in kind.answer(model.network, [requests for _, requests, _ in asked]) if asked else ():
        found = []
        for number, answers in batch:
            item, requests, details = asked[number]
            found.append((item.number, kind.judge(spec, item, requests, answers, details)))
        writer.append(found)
        done += len(found)
        tell(f"{model.name}: {spec.name}: {done:,} of {len(asked):,}")
