"""Which of two answers to one prompt is the more probable, and how far length alone would have told.

In: preference pairs, or answers with labels of which pairs are made. Out: two requests for each, and a score of 1 where the
preferred answer is the more probable one, one half where both are alike.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from keural.data.records import Drop, EvaluationItem, PreferencePair
from keural.evaluate.results.records import ItemResult
from keural.evaluate.tasks.asking import Asking, lengths_of, with_cut
from keural.evaluate.tasks.choice import tokens_read
from keural.evaluate.tasks.items import Draft, Item, Likelihood, LogProb, Unusable
from keural.evaluate.tasks.spec import PairingSpec, TaskSpec
from keural.evaluate.tasks.template import fill
from keural.tokenizer import Message

_NAMES = {"system": "", "user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}


def paired(pairing: PairingSpec, records: Iterable[Any]) -> Iterator[PreferencePair | Drop]:
    """Pairs of the answers to each question, in the order of the questions: each good one with each bad one.

    An item's only choice is its answer, its only answer the label. What has another label is a drop, and so is an answer to whose
    question there is none of the other side.
    """
    groups: dict[str, tuple[list[EvaluationItem], list[EvaluationItem]]] = defaultdict(lambda: ([], []))
    for record in records:
        label = record.answers[0].strip() if isinstance(record, EvaluationItem) and record.answers else ""
        if isinstance(record, Drop):
            yield record
        elif not record.choices or label not in (*pairing.good, *pairing.bad):
            yield Drop("no_label", record.where)
        else:
            groups[record.question][label in pairing.bad].append(record)
    for question, (good, bad) in groups.items():
        prompt = (Message("user", question),)
        for better in good:
            yield from (PreferencePair(prompt, better.choices[0], worse.choices[0], better.where) for worse in bad)
        if not (good and bad):
            yield from (Drop("no_counterpart", record.where) for record in good + bad)


def draft(spec: TaskSpec, record: PreferencePair) -> Draft:
    """What is asked of a pair."""
    values: dict[str, Any] = {"question": as_text(record.prompt)}
    try:
        question = fill(spec.question, values)
    except ValueError as error:
        raise Unusable("template", str(error)) from error
    return Draft(question, (record.chosen, record.rejected), (True, False), values, record.prompt, f"{question} {record.chosen}")


def as_text(messages: Sequence[Message]) -> str:
    """A conversation for a model that knows no chats; a single question stands for itself."""
    if len(messages) == 1:
        return messages[0].text
    return "\n\n".join(f"{_NAMES.get(message.role, '')}{message.text}" for message in messages)


def requests(spec: TaskSpec, item: Item, asking: Asking) -> tuple[list[Likelihood], dict[str, Any]]:
    """One request for each answer, and what is to be noted of the item. Raises `Unusable`."""
    if asking.prompting == "chat":
        found = [asking.answer(item.messages, choice) for choice in item.choices]
    else:
        found = [asking.likelihood(item.prompt, f"{spec.delimiter}{choice}") for choice in item.choices]
    return with_cut(found)


def judge(spec: TaskSpec, item: Item, asked: Sequence[Likelihood], found: Sequence[LogProb], details: dict[str, Any]) -> ItemResult:
    """The item's score by the task's first rule; the other rules' and the length's among the details."""
    logprobs = [each.total for each in found]
    lengths = lengths_of(item.choices, asked)
    scores = {
        rule: _preferred(*(value / max(size, 1) for value, size in zip(logprobs, lengths[rule], strict=True)))
        for rule in spec.scoring
    }
    score = scores[spec.scoring[0]]
    return ItemResult(
        id=item.id,
        cluster=item.cluster,
        score=score,
        question=item.prompt,
        expected=item.choices[0],
        given=item.choices[0] if score == 1 else item.choices[1] if score == 0 else "",
        logprobs=tuple(logprobs),
        tokens=tokens_read(asked),
        details={"scores": scores, "longer": longer(item), "choice_tokens": lengths["per_token"], **details},
    )


def longer(item: Item) -> float:
    """1 where the preferred answer is the longer one in characters, one half where both are as long."""
    return _preferred(*(len(choice) for choice in item.choices))


def baselines(items: Sequence[Item]) -> dict[str, float]:
    """Score of who only looks at the length, in the direction that suits the set better."""
    share = sum(map(longer, items)) / len(items)
    return {"longer": share, "length_only": max(share, 1 - share)}


def _preferred(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)
