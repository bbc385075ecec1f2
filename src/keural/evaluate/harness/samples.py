"""lm-eval's record of a document as this package's record of an item.

In: the samples of a document, one for each filter of its task. Out: an `ItemResult`. Its score is the first metric that is a number
between 0 and 1, by the first filter; all others stand among the details.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keural.evaluate.results.records import ItemResult, Kind
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.verifiers.languages import language_of

_KINDS: dict[str, Kind] = {
    "multiple_choice": "choice",
    "loglikelihood": "choice",
    "loglikelihood_rolling": "rolling",
    "generate_until": "generate",
}
SHOWN = 500
"""Characters of a text whose bits are counted."""


@dataclass(frozen=True)
class Sampled:
    """A document's record, and the chance of who knows nothing."""

    record: ItemResult
    chance: float | None

    @property
    def id(self) -> str:
        """The record's."""
        return self.record.id

    def numbered(self, number: int) -> "Sampled":
        """The same for a document that comes again."""
        return Sampled(replace(self.record, id=f"{self.id}-{number}"), self.chance)


def kind_of(config: Mapping[str, Any]) -> Kind:
    """How a task of lm-eval asks."""
    return _KINDS[str(config.get("output_type"))]


def item_of(kind: Kind, entries: Sequence[Mapping[str, Any]], asking: Asking) -> Sampled:
    """The record of a document."""
    first = entries[0]
    arguments = _arguments(first)
    scores = {
        f"{name},{entry['filter']}": float(entry[name])
        for entry in entries
        for name in entry["metrics"]
        if _is_number(entry.get(name))
    }
    chance, logprobs, given = None, None, ""
    details: dict[str, Any] = {}
    score = next((value for value in scores.values() if 0 <= value <= 1), 0.0)
    expected = str(first["target"])
    if kind == "choice":
        answers = [_likelihood(response) for response in first["resps"]][: len(arguments)]
        logprobs = tuple(total for total, _ in answers)
        choices = [str(pair[1]) for pair in arguments]
        given = choices[max(range(len(logprobs)), key=lambda place: logprobs[place])] if logprobs else ""
        chance = 1 / len(choices) if len(choices) > 1 else None
        if isinstance(first["target"], int) and 0 <= first["target"] < len(choices):
            expected = choices[first["target"]]
        details = {"choices": choices}
    elif kind == "rolling":
        text = str(arguments[0][0])
        size = len(text.encode())
        score = -float(_first(first["resps"])) / math.log(2)
        details = {"bytes": size, "bits_per_byte": score / max(size, 1)}
    else:
        given = str(_first(first["filtered_resps"]))
        details = {"answers": [str(text) for group in first["resps"] for text in group]}
    tokens = sum(len(asking.tokenizer.encode(part)) for pair in arguments for part in pair[:2] if isinstance(part, str))
    question = str(arguments[0][0])
    record = ItemResult(
        id=str(first["doc_hash"])[:16],
        cluster=None,
        score=score,
        question=question[:SHOWN] if kind == "rolling" else question,
        expected="" if kind == "rolling" else expected,
        given=given,
        logprobs=logprobs,
        tokens=tokens,
        details={"scores": scores, **details},
    )
    return Sampled(record, chance)


def language_of_samples(records: Sequence[ItemResult]) -> str:
    """The language that most of the first questions are in; lm-eval does not say it."""
    found = [language_of(record.question[-SHOWN:]) or "en" for record in records[:20]]
    return max(set(found), key=found.count) if found else "en"


def _arguments(sample: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What the model was asked: pairs of texts, or a text with settings."""
    found = sample["arguments"]
    if isinstance(found, Mapping):  # as lm-eval's log has them
        found = [tuple(group.values()) for group in found.values()]
    return [tuple(each) if isinstance(each, list | tuple) else (each,) for each in found]


def _likelihood(response: Any) -> tuple[float, bool]:
    while isinstance(response, list) and response and isinstance(response[0], list | tuple):
        response = response[0]
    return float(response[0]), str(response[1]) == "True"


def _first(value: Any) -> Any:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or type(value).__module__ == "numpy"
