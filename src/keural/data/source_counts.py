"""What became of the rows of a source: counted while it is read, refused where too much is wrong, then a row of the table.

In: records that are kept, and drops. Out: the row that is printed, kept in `prepared.json` and in the store's manifest.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from keural.data.adapters.aihub import OTHER_PART
from keural.data.adapters.base import WRONG_SCHEMA
from keural.data.adapters.corpora import OTHER_LANGUAGE, OTHER_LICENSE
from keural.data.filtering.decontamination import REASON
from keural.data.filtering.holdout import Side
from keural.data.licenses import flags_of, language_of, license_of
from keural.data.records import Drop, PreferencePair, SourceCount
from keural.data.tokens.encode import Encoded
from keural.errors import UserError
from keural.recipe import SourceSpec

OVER_LIMIT = "over_limit"
"""Reason of cleaned documents beyond a source's limit."""
NOT_DEFECTS = {
    OVER_LIMIT,
    "duplicate", "duplicate_id", "duplicate_prompt", "held_out", OTHER_PART, OTHER_LANGUAGE, OTHER_LICENSE, REASON
}  # fmt: skip
"""Drops that say nothing about a source's quality; they do not count against `max_drop`."""


@dataclass
class SourceCounter:
    """What became of the rows of one source."""

    source: SourceSpec
    split: Side
    left_out: str | None = None
    rows: int = 0
    kept: int = 0
    heldout: int = 0
    tokens: int = 0
    shortened: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    first_drop: dict[str, str] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)
    chosen_characters: int = 0
    rejected_characters: int = 0
    cleaned: SourceCount | None = None

    def clean(self, count: SourceCount) -> None:
        """Count what cleaning dropped before the documents came here. What its filters drop is no defect of the source."""
        self.cleaned = count
        self.rows += count.drops.total()
        self.drops += count.drops
        for reason, where in count.first.items():
            self.first_drop.setdefault(reason, where)

    def stop(self) -> None:
        """Count what the limit leaves of cleaned documents, so that the rows add up."""
        if self.cleaned is not None and (over := self.cleaned.rows - self.rows) > 0:
            self.rows += over
            self.drops[OVER_LIMIT] += over
            self.first_drop.setdefault(OVER_LIMIT, f"after {self.kept:,} records")

    def keep(self, side: Side, encoded: Encoded) -> None:
        """Count a record that is used."""
        self.rows += 1
        self.kept += 1
        self.heldout += side == "heldout"
        repeat = self.source.repeat if side == "train" else 1
        self.tokens += repeat * sum(len(ids) for ids, _ in encoded.sequences)
        self.shortened += encoded.cut_turns > 0
        if isinstance(encoded.record, PreferencePair):
            self.chosen_characters += len(encoded.record.chosen)
            self.rejected_characters += len(encoded.record.rejected)

    def drop(self, drop: Drop) -> None:
        """Count a row that is not used. Raises `UserError` at the first bad one when the source allows none, or begins with a row
        that its adapter is not for.
        """
        self.rows += 1
        if drop.reason == WRONG_SCHEMA and self.kept == 0:
            raise schema_error(self.source, drop)
        self.drops[drop.reason] += 1
        self.first_drop.setdefault(drop.reason, drop.where)
        if self.source.max_drop == 0 and drop.reason not in NOT_DEFECTS:
            raise UserError(f"source {self.source.name!r}: {drop.where} is dropped ({drop.reason}), and max_drop 0 allows none")

    def check(self) -> None:
        """Refuse a source that gives nothing, or too little of what it holds."""
        drops = self.drops - (self.cleaned.drops - self.cleaned.unreadable if self.cleaned else Counter())
        defects = Counter({reason: count for reason, count in drops.items() if reason not in NOT_DEFECTS})
        if self.rows == 0:
            raise UserError(f"source {self.source.name!r}: {self.source.path or self.source.adapter} holds no rows")
        if defects.total() > self.source.max_drop * self.rows:
            raise UserError(
                f"source {self.source.name!r}: {defects.total() / self.rows:.1%} of {self.rows:,} rows are dropped, more than "
                f"max_drop {self.source.max_drop:g}; most often {self._worst(defects)}; "
                f"mend the data or the options of adapter {self.source.adapter}, or raise max_drop"
            )
        if self.kept == 0:
            raise UserError(
                f"source {self.source.name!r}: none of its {self.rows:,} rows is used; "
                f"most often {self._worst(self.drops)}; leave it out"
            )

    def _worst(self, drops: Counter[str]) -> str:
        ((reason, count),) = drops.most_common(1)
        return f"{reason} ({count:,} rows, first {self.first_drop[reason]})"

    def row(self) -> dict[str, Any]:
        """The source's row of the table."""
        source = self.source
        row = {
            "source": source.name,
            "adapter": source.adapter,
            "language": language_of(source),
            "text_kind": source.text_kind,
            "license": license_of(source),
            "flags": flags_of(source),
            "left_out": self.left_out,
            "split": self.split,
            "rows": self.rows,
            "kept": self.kept,
            "heldout": self.heldout,
            "tokens": self.tokens,
            "repeat": source.repeat,
            "shortened": self.shortened,
            "drops": dict(self.drops.most_common()),
            "first_drop": {reason: self.first_drop[reason] for reason, _ in self.drops.most_common()},
            "noted": dict(self.noted.most_common()),
            "length_ratio": self.chosen_characters / self.rejected_characters if self.rejected_characters else None,
        }
        return row | {"warning": warning_of(source, row)}


def schema_error(source: SourceSpec, drop: Drop) -> UserError:
    """The refusal of a source that begins with a row its adapter is not for."""
    return UserError(f"source {source.name!r}: {drop.where}: adapter {source.adapter}: {drop.detail}")


def warning_of(source: SourceSpec, row: dict[str, Any]) -> str | None:
    """What differs from the count that the recipe expects of a source that it uses."""
    if row["left_out"] is not None or source.expect in (None, row["kept"]):
        return None
    return f"source {source.name!r}: {row['kept']:,} records kept, {source.expect:,} expected"
