"""Which of several texts is the most probable after a question: multiple choice.

In: items of a benchmark. Out: one request for each choice, and from the log-probabilities who is right, by every rule of the task.
Of equally probable choices the first counts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keural.data.records import EvaluationItem
from keural.evaluate.results.records import ItemResult
from keural.evaluate.tasks.asking import Asking, lengths_of, with_cut
from keural.evaluate.tasks.items import Draft, Item, Likelihood, LogProb, Unusable
from keural.evaluate.tasks.spec import Rule, TaskSpec
from keural.evaluate.tasks.template import LETTERS, fill


def draft(spec: TaskSpec, record: EvaluationItem) -> Draft:
    """What is asked of a record. Raises `Unusable` where it has no right choice."""
    values = values_of(spec, record)
    texts, right = _choices(spec, record, values)
    try:
        question = fill(spec.question, values)
    except ValueError as error:
        raise Unusable("template", str(error)) from error
    if not any(right):
        raise Unusable("no_right_choice")
    if len(texts) < 2:
        raise Unusable("too_few_choices")
    shown = f"{question}{spec.delimiter}{texts[right.index(True)]}"
    return Draft(question, texts, right, values, shown=shown)


def values_of(spec: TaskSpec, record: EvaluationItem) -> dict[str, Any]:
    """What templates know of a record. Raises `Unusable` for a value that the task has no word for."""
    values: dict[str, Any] = {
        "question": record.question,
        "passage": record.passage,
        "choices": list(record.choices),
        "answers": list(record.answers),
        **dict(record.fields),
    }
    for name, words in spec.words.items():
        value = str(values.get(name, "")).strip()
        if value not in words:
            raise Unusable("no_word", f"{name} is {value!r:.40}, for which the task has no word")
        values[name] = words[value]
    return values


def _choices(spec: TaskSpec, record: EvaluationItem, values: dict[str, Any]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    if spec.labelled is not None:
        pairs = dict(record.labelled).get(spec.labelled)
        if not pairs:
            raise Unusable("no_choices", f"the row has no list {spec.labelled}")
        return tuple(text for text, _ in pairs), tuple(right for _, right in pairs)
    if record.gold is None:
        raise Unusable("no_right_choice", f"its label names none of the {len(record.choices)} choices")
    if isinstance(spec.choices, list):
        try:
            texts = tuple(fill(template, values) for template in spec.choices)
        except ValueError as error:
            raise Unusable("template", str(error)) from error
    else:
        texts = record.choices if spec.choices == "own" else tuple(LETTERS[: len(record.choices)])
    return texts, tuple(number == record.gold for number in range(len(texts)))


def chance(items: Sequence[Item]) -> float:
    """Score of choosing blindly: the mean share of right choices."""
    return float(np.mean([sum(item.right) / len(item.right) for item in items]))


def requests(spec: TaskSpec, item: Item, asking: Asking) -> tuple[list[Likelihood], dict[str, Any]]:
    """One request for each choice, and what is to be noted of the item. Raises `Unusable`."""
    found = [asking.likelihood(item.prompt, f"{spec.delimiter}{choice}") for choice in item.choices]
    return with_cut(found)


def judge(spec: TaskSpec, item: Item, asked: Sequence[Likelihood], found: Sequence[LogProb], details: dict[str, Any]) -> ItemResult:
    """The item's score by the task's first rule, the other rules' among the details."""
    logprobs = [each.total for each in found]
    lengths = lengths_of(item.choices, asked)
    chosen = {rule: _best(logprobs, lengths[rule]) for rule in spec.scoring if rule in lengths}
    scores = {rule: _score(rule, item.right, logprobs, chosen.get(rule, 0)) for rule in spec.scoring}
    first = spec.scoring[0]
    return ItemResult(
        id=item.id,
        cluster=item.cluster,
        score=scores[first],
        question=item.prompt,
        expected=item.choices[item.right.index(True)],
        given=item.choices[chosen.get(first, _best(logprobs, lengths["sum"]))],
        logprobs=tuple(logprobs),
        tokens=tokens_read(asked),
        details={
            "scores": scores,
            "choices": list(item.choices),
            "right": [number for number, right in enumerate(item.right) if right],
            "chosen": chosen,
            "choice_tokens": lengths["per_token"],
            **details,
        },
    )


def tokens_read(asked: Sequence[Likelihood]) -> int:
    """Tokens of some requests, those that all of them begin with once."""
    contexts = {request.context for request in asked}
    return sum(map(len, contexts)) + sum(len(request.continuation) for request in asked)


def _best(logprobs: Sequence[float], lengths: Sequence[int]) -> int:
    return int(np.argmax(np.asarray(logprobs) / np.maximum(lengths, 1)))


def _score(rule: Rule, right: Sequence[bool], logprobs: Sequence[float], chosen: int) -> float:
    if rule != "mass":
        return float(right[chosen])
    values = np.asarray(logprobs)
    shares = np.exp(values - values.max())
    return float(shares[np.asarray(right)].sum() / shares.sum())
