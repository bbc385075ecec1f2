"""The kinds of tasks: how each makes requests of an item, and a result of the answers.

In: the name of a kind. Out: a `TaskKind`. A new kind is a row here and a file of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keural.data.records import Kind as RecordKind
from keural.evaluate.generated import kind as generate
from keural.evaluate.results.records import ItemResult, Kind
from keural.evaluate.tasks import choice, pair, rolling
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.tasks.items import Draft, Item
from keural.evaluate.tasks.spec import TaskSpec

Answers = Iterator[Sequence[tuple[int, Sequence[Any]]]]
"""Batches; of each group in one its number and the answers to its requests, in their order. Every group comes once."""


@dataclass(frozen=True)
class TaskKind:
    """One kind of tasks."""

    records: tuple[RecordKind, ...]
    """What its items are made of."""
    draft: Callable[[TaskSpec, Any], Draft]
    """What is asked of a record. Raises `Unusable`."""
    requests: Callable[[TaskSpec, Item, Asking], tuple[Sequence[Any], dict[str, Any]]]
    """What a model is asked about an item, and details to keep. Raises `Unusable`."""
    judge: Callable[[TaskSpec, Item, Sequence[Any], Sequence[Any], dict[str, Any]], ItemResult]
    """The result of an item from its requests, the answers to them and the details."""
    answer: Callable[[Any, Sequence[Sequence[Any]]], Answers]
    """Lets an opened model answer the requests of many items, a group each."""
    chance: Callable[[Sequence[Item]], float | None] = lambda items: None
    """Score of who knows nothing."""
    baselines: Callable[[Sequence[Item]], dict[str, float]] | None = None
    """Scores of who does not read; None where there are none."""


def _likelihoods(model: Any, groups: Sequence[Sequence[Any]]) -> Answers:
    answers: Answers = model.likelihoods(groups)
    return answers


KINDS: Mapping[Kind, TaskKind] = {
    "choice": TaskKind(("evaluation",), choice.draft, choice.requests, choice.judge, _likelihoods, choice.chance),
    "generate": TaskKind(("evaluation",), generate.draft, generate.requests, generate.judge, generate.answer),
    "pair": TaskKind(
        ("pairs", "evaluation"), pair.draft, pair.requests, pair.judge, _likelihoods, lambda items: 0.5, pair.baselines
    ),
    "rolling": TaskKind(("documents",), rolling.draft, rolling.requests, rolling.judge, _likelihoods, baselines=rolling.baselines),
}
