"""IFEval in Korean: the kinds of the 342 published rows (allganize/IFEval-Ko), which are IFEval's by name and argument.

In: an answer and arguments. Out: whether it follows. Two beliefs of the English checks do not hold in Korean and are replaced here:
a word ends where its letters end (a particle follows: 금지어를), and sentences are English. Texts are compared with composed
syllables. Definitions of our own: the publisher's code was not at hand.
"""

import functools
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from keural.evaluate.verifiers.base import Registry, compare
from keural.evaluate.verifiers.ifeval import IFEVAL
from keural.evaluate.verifiers.korean_text import sentences


def _forbidden_words(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(word.lower() in answer.lower() for word in forbidden_words)


def _number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(answer)), relation, num_sentences)


def _composed(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    return tuple(map(_composed, value)) if isinstance(value, tuple) else value


def _with_composed(check: Callable[..., bool]) -> Callable[..., bool]:
    """A check that sees composed syllables alone; its arguments stay what they are."""

    @functools.wraps(check)
    def composed(answer: str, **arguments: Any) -> bool:
        return check(_composed(answer), **{name: _composed(value) for name, value in arguments.items()})

    return composed


_OWN: Registry = {
    "keywords:forbidden_words": _forbidden_words,
    "length_constraints:number_sentences": _number_sentences,
}
_ENGLISH_ALONE = ("keywords:letter_frequency", "change_case:")
IFEVAL_KO: Registry = {
    name: _with_composed(_OWN.get(name, check)) for name, check in IFEVAL.items() if not name.startswith(_ENGLISH_ALONE)
}
"""Its kinds by name; those about letters and capitals are not among them."""
