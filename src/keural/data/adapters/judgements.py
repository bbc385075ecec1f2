"""Which answer is the better one: what labels and scores say, and the pairs that follow from scores.

In: values of a row's fields, and what a source's options say of them. Out: meanings, numbers, and pairs of places. A value that is
not there drops its row; one that is there and of no declared meaning refuses its source: it may be the one that shows that the
others are misread.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from keural.data.adapters.base import NOTHING, BadRow, Undeclared, plain

FIRST, SECOND, TIE, NONE = "first", "second", "tie", "none"
MEANINGS = (FIRST, SECOND, TIE, NONE)
"""What a value of a label may mean: the first or the second answer is the better, neither is, or nobody said."""
LABELS = {"1": FIRST, "2": SECOND}
"""What a label means where option `labels` does not say it."""
POLICIES = ("best_vs_worst", "adjacent", "all")
"""Which pairs ranked answers give: the best against the worst, each against the next worse one, or each against all worse ones."""
UNRANKED = "unranked_answer_left_out"
"""Noted of pairs whose row has an answer without a score."""
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_NUMBERED = re.compile(r"[^\W\d]_?([0-9]+)$")
"""A number at the end of a field's name; behind a point it is a place in a list."""
_ABSENT = NOTHING | {"", "nan", "null"}
_NO_SCORE = "scores are numbers; name another field in the option scores"


def label_key(value: Any) -> str | None:
    """A value of a label as it is compared: 1, 1.0, "1" and "1 " are the same, so are `A` and `a`, `true` and true; None where
    there is nothing: null, NaN or empty text.
    """
    value = plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return str(value).casefold()
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):
        return text.casefold() or None
    number = float(text)
    return text if not math.isfinite(number) else str(int(number)) if number.is_integer() else str(number)


def check_labels(labels: Mapping[Any, Any]) -> str | None:
    """What is wrong with the option `labels`: a value that says nothing, two that are the same, an unknown meaning, or one answer
    that no value can mean.
    """
    meanings: dict[str, str] = {}
    for value, meaning in labels.items():
        key = label_key(value)
        if meaning not in MEANINGS:
            return f"option 'labels': {meaning!r} is no meaning; there are {', '.join(MEANINGS)}"
        if key is None:
            return f"option 'labels': {value!r} says nothing; rows without a label are dropped"
        if meanings.setdefault(key, meaning) != meaning:
            return f"option 'labels': {value!r} means {meanings[key]} and {meaning}"
    if lacking := [meaning for meaning in (FIRST, SECOND) if meaning not in meanings.values()]:
        return f"option 'labels' must say which value means {lacking[0]}"
    return None


def _default_labels(answers: Sequence[str | int]) -> Mapping[str, str]:
    """What labels mean where nobody says it: nothing where the answers are themselves numbered, but not 1 and 2."""
    numbers = [found[1] for name in answers if (found := _NUMBERED.search(str(name)))]
    return {} if len(numbers) == 2 and [int(number) for number in numbers] != [1, 2] else LABELS


def meaning_of(value: Any, field: str | int, labels: Mapping[Any, str] | None, answers: Sequence[str | int]) -> str:
    """Which answer a label prefers: first or second. Raises `BadRow` for a tie and where there is none, `Undeclared` for a value of
    no declared meaning. `answers` are the names of both, for the message.
    """
    key = label_key(value)
    if key is None:
        raise BadRow("missing_label", f"no {field}")
    known = _default_labels(answers) if labels is None else {str(label_key(each)): meaning for each, meaning in labels.items()}
    meaning = known.get(key)
    if meaning is None:
        names = f"{FIRST} ({answers[0]}), {SECOND} ({answers[1]}), {TIE} or {NONE}"
        raise Undeclared(field, plain(value), f"options: {{labels: {{VALUES}}}} says what each means: {names}")
    if meaning == TIE:
        raise BadRow("label_tie", said(field, value))
    if meaning == NONE:
        raise BadRow("no_preference", said(field, value))
    return meaning


def said(field: str | int, value: Any) -> str:
    """What a label says, in the words of a table."""
    return f"{field} is {plain(value)!r:.40}"


def number_of(value: Any, field: str | int, remedy: str = _NO_SCORE) -> float | None:
    """A score or rank, also as text; None where there is none. Raises `Undeclared` for anything else that is there."""
    value = plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _ABSENT:
            return None
        value = float(text) if _NUMBER.fullmatch(text) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Undeclared(field, value, remedy)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Undeclared(field, value, remedy)
    return number


def check_order(better: float, worse: float, min_margin: float = 0.0) -> None:
    """Raise `BadRow` unless the first number is larger, and by at least `min_margin`."""
    if better == worse:
        raise BadRow("score_tie")
    if better < worse:
        raise BadRow("score_reversed")
    if better - worse < min_margin:
        raise BadRow("small_margin")


def ranked_pairs(scores: Sequence[float], policy: str) -> list[tuple[int, int]]:
    """Places of the better and the worse answer, by scores of which higher is better. Of equal ones the first stands first; they
    are paired like others, so that whoever takes the pairs can count ties.
    """
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    if policy == "all":
        return list(combinations(order, 2))
    return list(pairwise(order)) if policy == "adjacent" else [(order[0], order[-1])]
