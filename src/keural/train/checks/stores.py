"""What a stage's data must not be, whoever made it: empty masks, answers without an end, sides that are the same, and the like.

In: the stream over a store or published shards. Out: a `Finding` for each thing that was looked for, with counts, which the run
keeps; a `UserError` for the first that is more frequent than the recipe allows. Of large stores `LOOKED_AT` records are looked at,
evenly spread.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.instances import Answers
from keural.data.loading.stream import Stream
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.recipe import ChecksSpec

LOOKED_AT = 20_000
"""So many records are looked at, evenly spread over a larger store."""
ROWS_LOOKED_AT = 500
"""So many rows, where the data are documents."""
TRAINING = "training"
"""What messages call the data that is trained on."""
LENGTH_REASONS = ("too_long", "prompt_too_long", "answer_too_long")
"""Reasons under which preparation counts what does not fit."""


@dataclass(frozen=True)
class Check:
    """Something that is looked for: the key of `checks` that says how much of it is allowed, and what to say of more."""

    key: str
    what: str
    remedy: str
    training_only: bool = False
    """Whether it is no matter of what is held out."""


@dataclass(frozen=True)
class Finding:
    """How often something was found among so many records, and where first."""

    check: str
    store: str
    count: int
    looked_at: int
    allowed: float
    first: str = ""

    @property
    def share(self) -> float:
        """Of the records looked at."""
        return self.count / self.looked_at if self.looked_at else 0.0


_PREPARE = "prepare the data again with masks over the answers"
CHECKS: dict[str, Check] = {
    "empty_mask": Check("empty", "of the records have nothing that is trained", _PREPARE),
    "empty_side": Check("empty", "of the pairs have a side in which nothing is trained", _PREPARE),
    "open_answer": Check(
        "open_answers",
        "of the records have a trained answer whose end-of-turn token is outside of the mask",
        "train that token, too, or the model never learns to stop",
    ),
    "cut_answer": Check(
        "cut_answers", "of the records end within a trained answer", "prepare the data again with a larger data.sequence_length"
    ),
    "identical_sides": Check("identical_sides", "of the pairs have two answers that are the same", "leave them out"),
    "swapped_pair": Check(
        "swapped_pairs", "of the pairs are also there with their answers swapped", "leave one of two out, and look at the labels"
    ),
    "empty_row": Check("empty", "of the rows hold nothing that is trained", "prepare the data again"),
    "own_answer": Check(
        "identical_sides",
        "of the labelled answers do not stand beside their own prompt with another answer",
        "prepare the data again",
    ),
    "other_label": Check(
        "swapped_pairs",
        "of the labelled answers are also there with the other label",
        "leave one of two out, and look at the labels",
    ),
    "one_label": Check(
        "one_label",
        "of the labelled answers have the same label",
        "add answers of the other one, and look at the labels",
        training_only=True,
    ),
    "lost_to_length": Check(
        "lost_to_length",
        "of the records were cut or left out because they are longer than data.sequence_length",
        "raise data.sequence_length",
    ),
}


def check_store(stream: Stream, allowed: ChecksSpec, end_id: int, name: str) -> list[Finding]:
    """Look for everything that `CHECKS` names in one store; `name` is what messages call it.

    Args:
        stream: over the store.
        allowed: shares.
        end_id: the token that ends a turn.
        name: `TRAINING` or held-out.

    Raises `UserError` for the first thing that is there more often than allowed.
    """
    store = stream.store
    found, looked_at, first = _counts(stream, end_id)
    findings = [
        Finding(check, name, found[check], looked_at[check], getattr(allowed, CHECKS[check].key), first.get(check, ""))
        for check in looked_at
    ]
    for finding in findings:
        check = CHECKS[finding.check]
        if finding.share > finding.allowed and not (check.training_only and name != TRAINING):
            where = f", first {finding.first}" if finding.first else ""
            raise UserError(
                f"{store.directory}: {finding.share:.2%} {check.what} ({finding.count:,} of {finding.looked_at:,}{where}); "
                f"{check.remedy}, or allow it with checks.{check.key} (now {finding.allowed:g})"
            )
    return findings


def _counts(stream: Stream, end_id: int) -> tuple[Counter[str], dict[str, int], dict[str, str]]:
    """How often each thing was found, among how many, and where first."""
    store, kind = stream.store, stream.store.kind
    found: Counter[str] = Counter()
    first: dict[str, str] = {}

    def note(check: str, where: str) -> None:
        found[check] += 1
        first.setdefault(check, where)

    if isinstance(store, PublishedShards) or kind == "documents":
        numbers = _spread(len(stream.instances), ROWS_LOOKED_AT)
        last = len(stream.instances) - 1
        for number in numbers.tolist():
            row = stream.instances.batch(np.array([number]))
            left_over = number == last > 0 and row.num_tokens == 1  # at the end of the text, which is no damage
            if row.num_labels == 0 and not left_over:
                note("empty_row", f"row {number:,}")
        return found, {"empty_row": len(numbers)}, first
    records = _spread(store.num_records, LOOKED_AT)
    look, own = LOOKS[kind]
    for check, record in look(store, records, end_id):
        note(check, f"record {record:,}")
    store.forget_pages()
    looked_at = dict.fromkeys((*own, "open_answer", "cut_answer"), len(records))
    if isinstance(stream.instances, Answers):
        labels = stream.instances.desirable
        found["one_label"], looked_at["one_label"] = max(int(labels.sum()), int((~labels).sum())), len(labels)
    lost, of = _lost_to_length(store)
    if of:
        found["lost_to_length"], looked_at["lost_to_length"] = lost, of
    return found, looked_at, first


def _spread(number: int, most: int) -> NDArray[np.int64]:
    """At most so many of `number` things, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).astype(np.int64))


def _look_at_conversations(store: TokenStore, records: NDArray[np.int64], end_id: int) -> Iterator[tuple[str, int]]:
    for record in records.tolist():
        mask = store.loss_mask(record)
        if not mask[1:].any():
            yield "empty_mask", record
        for problem in _answer_problems(store.sequence(record), mask, end_id):
            yield problem, record


def _look_at_pairs(store: TokenStore, records: NDArray[np.int64], end_id: int) -> Iterator[tuple[str, int]]:
    seen: set[tuple[bytes, bytes]] = set()
    for record in records.tolist():
        sequences = [store.sequence(2 * record + side) for side in (0, 1)]
        masks = [store.loss_mask(2 * record + side) for side in (0, 1)]
        if not all(mask[1:].any() for mask in masks):
            yield "empty_side", record
        chosen, rejected = (blake2b(sequence.tobytes(), digest_size=12).digest() for sequence in sequences)
        if chosen == rejected:
            yield "identical_sides", record
        elif (rejected, chosen) in seen:
            yield "swapped_pair", record
        seen.add((chosen, rejected))
        for problem in sorted({each for pair in zip(sequences, masks, strict=True) for each in _answer_problems(*pair, end_id)}):
            yield problem, record


def _look_at_answers(store: TokenStore, records: NDArray[np.int64], end_id: int) -> Iterator[tuple[str, int]]:
    assert store.labels is not None
    seen: dict[bytes, bool] = {}
    for record in records.tolist():
        own, other = (store.sequence(2 * record + side) for side in (0, 1))
        mask, other_mask = (store.loss_mask(2 * record + side) for side in (0, 1))
        if not mask[1:].any():
            yield "empty_mask", record
        same_prompt = np.array_equal(own[: mask.argmax()], other[: other_mask.argmax()])
        if not same_prompt or np.array_equal(own, other):
            yield "own_answer", record
        good = bool(store.labels[record])
        if seen.setdefault(blake2b(own.tobytes(), digest_size=12).digest(), good) != good:
            yield "other_label", record
        for problem in _answer_problems(own, mask, end_id):
            yield problem, record


Look = Callable[[TokenStore, NDArray[np.int64], int], Iterator[tuple[str, int]]]
LOOKS: dict[str, tuple[Look, tuple[str, ...]]] = {
    "conversations": (_look_at_conversations, ("empty_mask",)),
    "pairs": (_look_at_pairs, ("empty_side", "identical_sides", "swapped_pair")),
    "answers": (_look_at_answers, ("empty_mask", "own_answer", "other_label")),
}
"""What looks at the records of each kind of store, and what it looks for beside the ends of answers."""


@dataclass(frozen=True)
class LengthBias:
    """How far length alone explains which answer is preferred, among so many pairs of a source."""

    store: str
    source: str
    """Empty: all pairs of the store."""
    pairs: int
    longer: float
    """Share of the pairs whose chosen answer has more trained tokens, ties counted by half."""
    chosen_tokens: float
    """Mean length of the chosen answers."""
    rejected_tokens: float

    @property
    def accuracy(self) -> float:
        """Share of pairs that are ranked right by length alone."""
        return max(self.longer, 1 - self.longer)


def length_bias(stream: Stream, name: str) -> list[LengthBias]:
    """Of pairs, all together and of each source that the store names; of other data nothing."""
    store = stream.store
    if isinstance(store, PublishedShards) or store.kind != "pairs":
        return []
    records = _spread(store.num_records, LOOKED_AT)
    tokens = np.array([[int(store.loss_mask(2 * record + side)[1:].sum()) for side in (0, 1)] for record in records.tolist()])
    store.forget_pages()
    groups = {"": np.ones(len(records), dtype=bool)}
    if len(store.sections) > 1:
        groups |= {source: (2 * records >= first) & (2 * records < stop) for source, (first, stop) in store.sections.items()}
    return [_length_bias(name, source, tokens[inside]) for source, inside in groups.items() if inside.any()]


def _length_bias(store: str, source: str, tokens: NDArray[np.int64]) -> LengthBias:
    chosen, rejected = tokens.T
    longer = float((chosen > rejected).mean() + (chosen == rejected).mean() / 2)
    return LengthBias(store, source, len(tokens), longer, float(chosen.mean()), float(rejected.mean()))


def _answer_problems(tokens: NDArray[np.uint32], mask: NDArray[np.uint8], end_id: int) -> list[str]:
    """What is wrong with the runs of trained tokens of a sequence: the last two of each must hold the end of the turn (templates
    that train the line end after it are as good).
    """
    trained = np.flatnonzero(mask)
    if not trained.size:
        return []
    ends = trained[np.append(np.flatnonzero(np.diff(trained) > 1), trained.size - 1)]
    closed = (tokens[ends] == end_id) | ((tokens[ends - 1] == end_id) & (ends > 0))
    cut = not closed[-1] and ends[-1] == len(tokens) - 1
    return [*(["cut_answer"] if cut else []), *(["open_answer"] if not closed[: len(ends) - cut].all() else [])]


def _lost_to_length(store: TokenStore) -> tuple[int, int]:
    """Records that were cut or left out for their length when the store was made, of how many; of none where it does not say."""
    lost = of = 0
    for row in store.manifest.get("sources", ()):
        if row.get("split") != "train":
            continue
        dropped = sum(int(row.get("drops", {}).get(reason, 0)) for reason in LENGTH_REASONS)
        lost += dropped + int(row.get("shortened", 0))
        of += dropped + int(row.get("kept", 0))
    return lost, of
