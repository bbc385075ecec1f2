"""Decontamination of a stage's data: the evaluation sets that a recipe names, looked for in every record.

In: `DecontaminateSpec` and records. Out: for a record whether it holds an evaluation item, and at the end a list of what was found.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.data.adapters import adapter_of
from keural.data.filtering.ngram_index import ContaminationIndex, Hit
from keural.data.records import Conversation, Document, Drop, EvaluationItem, Record
from keural.data.sources import Source, open_sources
from keural.errors import UserError
from keural.files import write_atomic
from keural.recipe import DecontaminateSpec

REASON = "contaminated"
MAX_LISTED = 10_000
"""Hits that are listed; all are counted."""


def open_evaluation(spec: DecontaminateSpec | None, data_dir: Path | None) -> list[Source]:
    """The evaluation sets of a recipe. Raises `UserError` for what cannot be read or is no evaluation set."""
    for source in spec.sources if spec else ():
        if adapter_of(source).kind_of(source) != "evaluation":
            raise UserError(
                f"source {source.name!r}: adapter {source.adapter} does not read an evaluation set; name the set's "
                "own, or adapter evaluation with the fields' names as options"
            )
    return open_sources(spec.sources, data_dir) if spec else []


def check_evaluation(sources: Iterable[Source]) -> None:
    """Refuse evaluation sets that hold no rows, or begin with one of another schema than their adapter's. Raises `UserError`."""
    for source in sources:
        first = next(source.read_any(seed=0), None)
        if first is None:
            raise UserError(f"source {source.name!r}: {source.spec.path} holds no rows; fetch it again")
        if isinstance(first, Drop):
            raise _unreadable(source, first)


def _unreadable(source: Source, drop: Drop) -> UserError:
    return UserError(f"source {source.name!r}: {drop.where}: adapter {source.spec.adapter}: {drop.detail or drop.reason}")


def evaluation_items(sources: Iterable[Source]) -> Iterator[tuple[str, EvaluationItem]]:
    """The items of evaluation sets with the sets' names. Raises `UserError` when more rows than `max_drop` hold none."""
    for source in sources:
        rows = dropped = 0
        for record in source.read_any(seed=0):
            rows += 1
            if isinstance(record, EvaluationItem):
                yield source.name, record
                continue
            assert isinstance(record, Drop)
            dropped += 1
            if rows == dropped or source.spec.max_drop == 0:
                raise _unreadable(source, record)
        if not rows or dropped > source.spec.max_drop * rows:
            raise UserError(f"source {source.name!r}: {dropped:,} of {rows:,} rows hold no evaluation item; mend or leave it out")


def texts_to_check(record: Record) -> list[str]:
    """What a record says, question and answer together: a set may have been spread over turns."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Conversation):
        return ["\n".join(turn.text for turn in record.messages)]
    asked = [turn.text for turn in record.prompt]
    return ["\n".join([*asked, record.chosen]), f"{asked[-1]}\n{record.rejected}"]


@dataclass(frozen=True, slots=True)
class Contaminated(Drop):
    """The drop of a record that holds an evaluation item."""

    hit: Hit | None = None


class Decontaminator:
    """Looks for evaluation items in records and remembers what it found. Can be pickled and used in any process."""

    def __init__(self, spec: DecontaminateSpec, sources: Iterable[Source]) -> None:
        self._min_share = spec.min_share
        self.index = ContaminationIndex(evaluation_items(sources), spec.ngram, spec.passages)
        self.hits: Counter[str] = Counter()
        self.listed: list[dict[str, Any]] = []

    def find(self, text: str) -> Hit | None:
        """The evaluation item of which a text holds the most, or None."""
        return self.index.find(text, self._min_share)

    def hit_in(self, record: Record) -> Hit | None:
        """The evaluation item of which a record holds the most, or None."""
        hits = filter(None, map(self.find, texts_to_check(record)))
        return max(hits, key=lambda found: found.ngrams, default=None)

    def count(self, source: str, where: str, hit: Hit) -> None:
        """Count and list a record that holds an item."""
        self.hits[hit.set] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append({"source": source, "where": where, **hit._asdict()})

    def report(self) -> dict[str, dict[str, Any]]:
        """By set: items, how many of them are too short to be looked for and the first of those, and records that hold one."""
        index = self.index
        return {
            name: {
                "items": count,
                "too_short": index.too_short[name],
                "first_too_short": index.first_too_short.get(name),
                "records": self.hits[name],
            }
            for name, count in index.items.items()
        }

    def write(self, directory: Path) -> None:
        """List what was found in `contamination.jsonl`: source, record, set, item, number of n-grams, share, the longest match."""
        lines = [json.dumps(hit, ensure_ascii=False) + "\n" for hit in self.listed]
        write_atomic(directory / "contamination.jsonl", "".join(lines).encode("utf-8", "replace"))
