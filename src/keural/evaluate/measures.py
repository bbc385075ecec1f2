"""The measures: exact match, polite rate, preference accuracy, bits per byte.

In: answers, held-out items and pairs, texts, a model. Out: plain figures for `summary.json`. Shares lie in [0, 1]; a measure of
nothing is refused, not called zero.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from keural.errors import UserError
from keural.evaluate.scoring.network import Network
from keural.evaluate.tasks.items import Likelihood
from keural.evaluate.windows import windows
from keural.model import KeuralMoECausalLM
from keural.tokenizer import KeuralTokenizer, Message


class Item(Protocol):
    """A held-out question with the answers that count as right."""

    @property
    def task(self) -> str:
        """Family of the question."""

    @property
    def language(self) -> str:
        """ISO 639-1 code."""

    @property
    def answers(self) -> Sequence[str]:
        """Every accepted answer."""


class Pair(Protocol):
    """A preference pair: a chat that ends with a user turn, and two answers to it."""

    @property
    def prompt(self) -> Sequence[Message]:
        """The chat so far."""

    @property
    def chosen(self) -> str:
        """The preferred answer."""

    @property
    def rejected(self) -> str:
        """The other answer."""


def normalize(text: str) -> str:
    """Text with every run of whitespace as one space, none at the ends."""
    return " ".join(text.split())


def is_correct(answer: str, item: Item) -> bool:
    """Whether the answer equals one of the item's accepted ones, whitespace aside."""
    return normalize(answer) in {normalize(accepted) for accepted in item.answers}


def exact_match(answers: Sequence[str], items: Sequence[Item]) -> dict[str, Any]:
    """Share of answers that equal an accepted one: overall, by task, by language, and by both.

    Returns:
        `accuracy`, its binomial standard error `stderr` = sqrt(p(1-p)/n), `n`, `by_task` and `by_language` (share each), and
        `by_task_and_language` ({task: {language: share}}).

    Raises:
        UserError: when there are no items.
    """
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for answer, item in zip(answers, items, strict=True):
        groups[item.task, item.language].append(is_correct(answer, item))
    right = [value for group in groups.values() for value in group]
    accuracy = _share(right, "items")
    nested: dict[str, dict[str, float]] = defaultdict(dict)
    for (task, language), group in sorted(groups.items()):
        nested[task][language] = _share(group, "items")
    return {
        "accuracy": accuracy,
        "stderr": standard_error(accuracy, len(right)),
        "n": len(right),
        "by_task": _by(groups, 0),
        "by_language": _by(groups, 1),
        "by_task_and_language": dict(nested),
    }


def standard_error(share: float, n: int) -> float:
    """Standard error of a share measured on `n` independent items: sqrt(p(1-p)/n)."""
    return math.sqrt(share * (1 - share) / n)


def polite_rate(answers: Sequence[str], is_polite: Callable[[str], bool]) -> float:
    """Share of answers for which the predicate holds. Raises `UserError` when there are none."""
    return _share([is_polite(answer) for answer in answers], "answers")


def bits_per_byte(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, texts: Sequence[str], length: int, overlap: int = 0
) -> dict[str, float | int]:
    """Bits the model needs per UTF-8 byte of the texts.

    Each text is `<s>` + its tokens + `</s>`; every token after `<s>` is predicted exactly once, and the end of the text is paid
    for. A text longer than `length` is read in windows of `length` inputs that advance by `length - overlap`: with overlap 0 the
    first prediction of a later window knows one token only, with a larger one at least `overlap + 1`.

    Args:
        model: in evaluation mode.
        tokenizer: the model's; a lossy one (`published`) makes the figure the cost of its tokens, not of the bytes.
        texts: held-out documents.
        length: inputs per window, at most the model's context.
        overlap: inputs that a window repeats from the one before it, smaller than `length`.

    Returns:
        `bits_per_byte`, `bits`, `bytes`, `tokens` (predicted ones).

    Raises:
        UserError: for no bytes, or an impossible `length` or `overlap`.
    """
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size == 0:
        raise UserError("bits per byte: no text to measure; hold out more documents")
    if not 1 <= length <= model.config.max_position_embeddings or not 0 <= overlap < length:
        raise UserError(f"bits per byte: windows of {length} tokens with an overlap of {overlap} do not fit the model")
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    asked = [
        [Likelihood(tuple(ids[start:first]), tuple(ids[first:stop]))]
        for ids in documents
        for start, first, stop in windows(len(ids), length, overlap)
    ]
    batches = Network(model, tokenizer).likelihoods(asked)
    nats = -sum(answer.total for answered in batches for _, answers in answered for answer in answers)
    bits = nats / math.log(2)
    return {"bits_per_byte": bits / size, "bits": bits, "bytes": size, "tokens": sum(map(len, documents)) - len(documents)}


def _by(groups: dict[tuple[str, str], list[bool]], part: int) -> dict[str, float]:
    merged: dict[str, list[bool]] = defaultdict(list)
    for key, group in groups.items():
        merged[key[part]] += group
    return {key: _share(merged[key], "items") for key in sorted(merged)}


def _share(values: Sequence[bool], what: str) -> float:
    if not values:
        raise UserError(f"evaluation: there are no {what} to measure; ask for at least one")
    return sum(values) / len(values)
