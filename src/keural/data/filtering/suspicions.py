"""What is unusual in a source although every row of it can be read: shares and lengths that a misread field would have.

In: the records of a source that are kept, and the counts of its table. Out: lines, each a warning and none an error, for there are
good sets that look so.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from keural.data.records import Conversation, PreferencePair, Record

FEW, SOME = 10, 20
"""Fewer rows, or pairs, say nothing about shares of them."""
SHORTEST_CUT = 4
"""Answers of fewer characters are letters and numbers of choices, which may well have one length."""
MANY_EQUAL, MANY_REVERSED, MANY_SHORTER = 0.1, 0.25, 0.75
BY_DESIGN = frozenset(("label_false", "label_tie", "over_limit", "other_part", "other_language", "other_license", "held_out"))
"""Reasons of drops that a source may well have half of."""


@dataclass
class Seen:
    """What is remembered of the records that are kept."""

    labels: Counter[str] = field(default_factory=Counter)
    """What labels say, of records that have one."""
    lengths: set[int] = field(default_factory=set)
    """Characters of answers, until there are different ones."""
    records: int = 0
    longer: int = 0
    shorter: int = 0
    """Pairs whose chosen answer is longer or shorter than the rejected one."""

    def keep(self, record: Record) -> None:
        """Take note of a record."""
        self.records += 1
        if isinstance(record, PreferencePair):
            chosen, rejected = len(record.chosen), len(record.rejected)
            self.longer += chosen > rejected
            self.shorter += chosen < rejected
            answers: tuple[int, ...] = (chosen, rejected)
        elif isinstance(record, Conversation):
            answers = () if len(self.lengths) > 1 else _lengths(record)
        else:
            return
        if record.label:
            self.labels[record.label] += 1
        if len(self.lengths) < 2:
            self.lengths |= set(answers)


def _lengths(record: Conversation) -> tuple[int, ...]:
    return tuple(len(turn.content) for turn in record.messages if turn.role == "assistant" and turn.is_trained)


def suspicions(seen: Seen, rows: int, drops: Mapping[str, int]) -> tuple[str, ...]:
    """What is unusual, a line each. `rows` and `drops` are of the whole source."""
    return (*_of_drops(rows, drops), *_of_labels(seen, drops), *_of_answers(seen))


def _of_drops(rows: int, drops: Mapping[str, int]) -> list[str]:
    if rows < FEW:
        return []
    half = [reason for reason, count in drops.items() if 2 * count == rows and reason not in BY_DESIGN]
    lines = [f"exactly half of the {rows:,} rows are dropped for one reason, {reason}" for reason in half]
    if (equal := drops.get("chosen_equals_rejected", 0) / rows) >= MANY_EQUAL:
        lines.append(f"chosen and rejected are the same in {equal:.0%} of the rows")
    if (reverse := drops.get("score_reversed", 0) / rows) >= MANY_REVERSED:
        lines.append(f"the scores of {reverse:.0%} of the rows prefer the rejected answer; see option lower_is_better")
    if (swapped := drops.get("swapped_pair", 0) / rows) >= MANY_EQUAL:
        lines.append(f"{swapped:.0%} of the rows are pairs that are there with their answers the other way round, too")
    return lines


def _of_labels(seen: Seen, drops: Mapping[str, int]) -> list[str]:
    if len(seen.labels) != 1 or drops.get("label_false"):
        return []
    label, count = next(iter(seen.labels.items()))
    return [f"all {count:,} labels say the same: {label}"] if count >= FEW else []


def _of_answers(seen: Seen) -> list[str]:
    lines = []
    if seen.records >= FEW and len(seen.lengths) == 1 and (length := min(seen.lengths)) >= SHORTEST_CUT:
        lines.append(f"every answer has {length:,} characters; they may be cut")
    if seen.records >= SOME and seen.longer == seen.records:
        lines.append(f"the chosen answer is the longer one in all {seen.records:,} pairs")
    if seen.records >= SOME and seen.shorter >= MANY_SHORTER * seen.records:
        share = "all" if seen.shorter == seen.records else f"{seen.shorter / seen.records:.0%} of"
        lines.append(f"the chosen answer is the shorter one in {share} {seen.records:,} pairs; are they the right way round?")
    return lines
