"""The table of sources: what each one is, and what became of its rows.

In: records that are kept, and drops. Out: a `SourceRow`, which is printed, and kept as JSON in `prepared.json` and in the store's
manifest. A source is refused where too much of it is wrong.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from keural.data.adapters.aihub import OTHER_PART
from keural.data.adapters.base import UNDECLARED, WRONG_SCHEMA
from keural.data.adapters.corpora import OTHER_LANGUAGE, OTHER_LICENSE
from keural.data.adapters.reasons import reason_of
from keural.data.field_use import FieldUse
from keural.data.filtering.decontamination import REASON
from keural.data.filtering.gates import EAGER_SHARE, gate_of
from keural.data.filtering.holdout import Split
from keural.data.filtering.suspicions import Seen, suspicions
from keural.data.licenses import flags_of, language_of, license_of
from keural.data.loading.mixture import Share
from keural.data.readers.notes import ReadingNotes
from keural.data.records import Drop, PreferencePair, SourceCount, calls_tools
from keural.data.sources import schema_error
from keural.data.tokens.encode import Encoded
from keural.errors import UserError
from keural.recipe import SourceSpec

OVER_LIMIT = "over_limit"
"""Reason of cleaned documents beyond a source's limit."""
MAX_DETAILS = 12
"""So many different things that were found are remembered of each reason."""
NOT_DEFECTS = {
    OVER_LIMIT,
    "duplicate", "duplicate_after_cut", "duplicate_id", "duplicate_prompt", "held_out",
    "label_false", "not_trained", "nothing_trained", "unanswerable", OTHER_PART, OTHER_LANGUAGE, OTHER_LICENSE, REASON,
    "label_tie", "no_preference", "score_tie", "small_margin",
}  # fmt: skip
"""Drops that say nothing about a source's quality; they do not count against `max_drop`."""

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """One source in the table of a stage's data. Fields are named as the keys of its JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    source: str
    """Name in the recipe; of data that was tokenised before, the name of the store or the shards."""
    adapter: str
    """Name of the adapter; `store` or `published` for data that was tokenised before."""
    language: str | None = None
    """ISO 639-1 code that the recipe states, or the publisher of a known set."""
    text_kind: str | None = None
    """Which filters cleaned its documents, where the recipe says so."""
    license: str | None = None
    """Licence that the recipe states, or the publisher of a known set."""
    flags: tuple[str, ...] = ()
    """What is to be known before training on it: `benchmark`, `non-commercial`."""
    left_out: str | None = None
    """Why the recipe does not use the source; None: it does."""
    split: Split = "train"
    """`heldout` for a source that is held out whole."""
    rows: Count = 0
    """Rows that were read."""
    kept: Count = 0
    """Records that are used, held-out ones included."""
    heldout: Count = 0
    """Kept records that are held out."""
    tokens: Count = 0
    """Tokens in the stores, repeats included; where sources are mixed by weight each record counts once."""
    repeat: Count = 1
    """How often the training store has each record."""
    shortened: Count = 0
    """Conversations that lost trailing turns."""
    drops: dict[str, Count] = field(default_factory=dict)
    """Rows that are not used, by reason, most frequent first."""
    first_drop: dict[str, str] = field(default_factory=dict)
    """Place of the first row that was dropped, by reason."""
    defects: dict[str, Count] = field(default_factory=dict)
    """Those of the drops that count against `max_drop`."""
    noted: dict[str, Count] = field(default_factory=dict)
    """Kept records that a gate only counts, or that do not have all of their row, by reason."""
    details: dict[str, dict[str, Count]] | None = None
    """What was found in rows that were dropped, by reason: an unknown role, a wrong type, the keys that a row has."""
    tool_calls: Count | None = None
    """Records of the training store in which an assistant calls tools and is trained to; None where nobody counted."""
    not_read: tuple[str, ...] | None = None
    """Fields of rows, and of turns in them, that hold something and that the adapter does not read."""
    assumed: tuple[str, ...] | None = None
    """What was assumed of its files (an encoding other than UTF-8, another format or delimiter than the name says) and changed in
    its texts, a line each."""
    length_ratio: float | None = None
    """Characters of chosen answers for each of rejected ones; None where there are no pairs."""
    warning: str | None = None
    """What differs from the count that the recipe expects."""
    suspicions: tuple[str, ...] | None = None
    """What is unusual in it, a line each: shares and lengths that a misread field would have."""
    mixture: Share | None = None
    """What an epoch holds of it, where sources are mixed by weight."""
    survey: str | None = None
    """What published shards hold, in one line."""

    def to_json(self) -> dict[str, Any]:
        """The row as plain data; what there need not be any of (`_OPTIONAL`) only where there is."""
        values = asdict(self) | {"flags": list(self.flags)}
        values |= {name: list(lines) for name in ("not_read", "assumed", "suspicions") if (lines := values[name]) is not None}
        return {name: value for name, value in values.items() if value is not None or name not in _OPTIONAL}

    @classmethod
    def from_json(cls, value: Any, where: Path) -> "SourceRow":
        """The row that `to_json` gave, read from the file `where`. Raises `UserError` for a missing key or a wrong type."""
        missing = [name for name in _REQUIRED if name not in value] if isinstance(value, dict) else []
        if missing:
            raise UserError(f"{where}: damaged (a source has no key {missing[0]!r}); prepare the data again")
        try:
            row = _ROWS.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            message = f"key {key!r} of a source: {first['msg']}, got {first['input']!r:.80}" if key else first["msg"]
            raise UserError(f"{where}: damaged ({message}); prepare the data again") from error
        if row.drops.keys() != row.first_drop.keys():
            raise UserError(f"{where}: damaged (drops and first_drop of {row.source!r} differ); prepare the data again")
        return row


_OPTIONAL = ("mixture", "survey", "details", "tool_calls", "not_read", "assumed", "suspicions")
_REQUIRED = [each.name for each in fields(SourceRow) if each.name not in (*_OPTIONAL, "text_kind")]
_ROWS = TypeAdapter(SourceRow)


def rows_from_json(value: Any, where: Path) -> list[SourceRow]:
    """The table that was read from the file `where`. Raises `UserError` unless it is a list of rows."""
    if not isinstance(value, list):
        raise UserError(f"{where}: damaged (it has no table of sources); prepare the data again")
    return [SourceRow.from_json(row, where) for row in value]


@dataclass
class SourceCounter:
    """What became of the rows of one source."""

    source: SourceSpec
    split: Split
    left_out: str | None = None
    rows: int = 0
    kept: int = 0
    heldout: int = 0
    tokens: int = 0
    shortened: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    first_drop: dict[str, str] = field(default_factory=dict)
    details: dict[str, Counter[str]] = field(default_factory=dict)
    undeclared: dict[str, str] = field(default_factory=dict)
    fields: FieldUse | None = None
    notes: ReadingNotes = field(default_factory=ReadingNotes)
    noted: Counter[str] = field(default_factory=Counter)
    seen: Seen = field(default_factory=Seen)
    chosen_characters: int = 0
    rejected_characters: int = 0
    cleaned: SourceCount | None = None
    tool_calls: int = 0

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

    def keep(self, split: Split, encoded: Encoded) -> None:
        """Count a record that is used."""
        self.rows += 1
        self.kept += 1
        self.heldout += split == "heldout"
        repeat = self.source.repeat if split == "train" else 1
        self.tokens += repeat * sum(len(ids) for ids, _ in encoded.sequences)
        self.shortened += encoded.cut_turns > 0
        self.seen.keep(encoded.record)
        self.tool_calls += split == "train" and calls_tools(encoded.record)
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
        found = self.details.setdefault(drop.reason, Counter())
        if drop.detail and (drop.detail in found or len(found) < MAX_DETAILS):
            found[drop.detail] += 1
        if drop.reason == UNDECLARED:
            self.undeclared.setdefault(drop.detail, drop.remedy)
        elif self.source.max_drop == 0 and drop.reason not in NOT_DEFECTS:
            raise UserError(f"source {self.source.name!r}: {drop.where} is dropped ({drop.reason}), and max_drop 0 allows none")

    def show(self, drop: Drop, value: Any) -> None:
        """Keep a row that is dropped, to be looked at, if there are few of its reason. What cleaning gives is not kept."""
        if self.fields is not None:
            self.fields.dropped(drop, value)

    def shown(self) -> Iterator[dict[str, Any]]:
        """The dropped rows to look at, as plain data; reading runs ahead, so some of them may be beyond the limit."""
        for reason, rows in (self.fields.drops if self.fields else {}).items():
            if reason in self.drops:
                yield from ({"source": self.source.name, "split": self.split, "reason": reason, **row._asdict()} for row in rows)

    def check(self) -> None:
        """Refuse a source that gives nothing, or too little of what it holds."""
        if self.rows == 0:
            raise UserError(f"source {self.source.name!r}: {self.source.path or self.source.adapter} holds no rows")
        self._check_meanings()
        row = self.row()
        check_drops(self.source, row)
        if self.kept == 0:
            raise UserError(
                f"source {self.source.name!r}: none of its {self.rows:,} rows is used; "
                f"most often {_worst(row, row.drops)}; leave it out"
            )

    def _defects(self) -> dict[str, int]:
        drops = self.drops - (self.cleaned.drops - self.cleaned.unreadable if self.cleaned else Counter())
        return {reason: count for reason, count in drops.most_common() if reason not in NOT_DEFECTS}

    def _check_meanings(self) -> None:
        """Refuse a source of which a field may have been misread, or an option had no effect."""
        name = self.source.name
        if self.undeclared:
            raise UserError(f"source {name!r}: {self._undeclared()}")
        if self.fields and self.fields.unseen and self.kept != self.source.limit:
            option, names = next(iter(self.fields.unseen.items()))
            raise UserError(
                f"source {name!r}: option {option!r} has no effect: no row has a field {' or '.join(map(repr, names))}; "
                f"check its spelling, or leave the option out{self._left_fields()}"
            )

    def unusual(self) -> tuple[str, ...]:
        """What is unusual in the source so far, a line each."""
        return suspicions(self.seen, self.rows, self.drops)

    def _undeclared(self) -> str:
        """The values of no declared meaning, those beside them, and how to declare them (`VALUES` of a remedy are all of them)."""
        found, declared = (
            self.details[UNDECLARED],
            self.seen.labels
            + sum((self.details.get(reason, Counter()) for reason in ("label_tie", "no_preference")), Counter[str]()),
        )
        others = self.drops[UNDECLARED] - found.total()
        values = f"{_counted(found)}{f' and others ({others:,} rows)' if others else ''}"
        beside = f" (beside {_counted(declared)})" if declared else ""
        remedies = dict.fromkeys(filter(None, self.undeclared.values()))
        wanted = ", ".join(f"{_quoted(each.partition(' is ')[2])}: ..." for each in (*found, *declared))
        remedy = "; ".join(remedies).replace("VALUES", wanted)
        return f"{values}, first {self.first_drop[UNDECLARED]}: not a declared meaning{beside}; {remedy}"

    def _left_fields(self) -> str:
        left = sorted(self.fields.unread) if self.fields else []
        return f" (not read: {', '.join(left[:MAX_DETAILS])})" if left else ""

    def row(self) -> SourceRow:
        """The source's row of the table."""
        source = self.source
        row = SourceRow(
            source=source.name,
            adapter=source.adapter,
            language=language_of(source),
            text_kind=source.text_kind,
            license=license_of(source),
            flags=tuple(flags_of(source)),
            left_out=self.left_out,
            split=self.split,
            rows=self.rows,
            kept=self.kept,
            heldout=self.heldout,
            tokens=self.tokens,
            repeat=source.repeat,
            shortened=self.shortened,
            drops=dict(self.drops.most_common()),
            first_drop={reason: self.first_drop[reason] for reason, _ in self.drops.most_common()},
            defects=self._defects(),
            noted=dict(self.noted.most_common()),
            details={reason: dict(found.most_common()) for reason, found in self.details.items() if found} or None,
            tool_calls=self.tool_calls,
            not_read=tuple(sorted(self.fields.unread)) or None if self.fields else None,
            assumed=self.notes.lines() or None,
            length_ratio=self.chosen_characters / self.rejected_characters if self.rejected_characters else None,
        )
        unusual = None if self.left_out else (*eager_gates(row), *self.unusual()) or None
        return replace(row, warning=warning_of(source, row), suspicions=unusual)


def check_drops(source: SourceSpec, row: SourceRow) -> None:
    """Raise `UserError` for a source of which more is dropped than its `max_drop` allows."""
    defects = sum(row.defects.values())
    if defects > source.max_drop * row.rows:
        raise UserError(
            f"source {source.name!r}: {defects / row.rows:.1%} of {row.rows:,} rows are dropped, more than "
            f"max_drop {source.max_drop:g}; most often {_worst(row, row.defects)}; "
            f"{_remedy(row)}mend the data or the options of adapter {source.adapter}, or raise max_drop"
        )


def _quoted(value: str) -> str:
    """A value as the key of a map in YAML; recipes have texts as keys."""
    return value if value[:1] in ("'", '"') else f"'{value}'"


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{each} ({count:,} rows)" for each, count in found.most_common(MAX_DETAILS))


def _worst(row: SourceRow, drops: dict[str, int]) -> str:
    reason, count = next(iter(drops.items()))
    found = ", ".join(list((row.details or {}).get(reason, {}))[:3])
    return f"{reason} ({count:,} rows, first {row.first_drop[reason]}{f': {found}' if found else ''})"


def eager_gates(row: SourceRow) -> list[str]:
    """What gates drop of a source beyond `EAGER_SHARE`, a line each with an example and how to keep it."""
    lines = []
    for reason, count in row.drops.items():
        if (gate := gate_of(reason)) and count > EAGER_SHARE * row.rows:
            example = ": ".join((row.first_drop[reason], *list((row.details or {}).get(reason, {}))[:1]))
            keep = "skip" if gate == "duplicate_prompts" else "count"
            lines.append(f"{reason} drops {count / row.rows:.0%} of its rows; e.g. {example}; gates: {{{gate}: {keep}}} keeps them")
    return lines


def _remedy(row: SourceRow) -> str:
    """What a recipe can do about the most frequent defect, if anything."""
    reason = reason_of(next(iter(row.defects)))
    return f"{reason.remedy}; or " if reason and reason.remedy else ""


def warning_of(source: SourceSpec, row: SourceRow) -> str | None:
    """What differs from the count that the recipe expects of a source that it uses."""
    if row.left_out is not None or source.expect in (None, row.kept):
        return None
    return f"source {source.name!r}: {row.kept:,} records kept, {source.expect:,} expected"
