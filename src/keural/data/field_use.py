"""Which fields of a source's rows nothing reads, and which fields that its options name no row has.

In: an adapter, a source's options and its rows. Out: names, to be listed once per source, or to refuse an option without effect;
and the beginning of a row, to be shown.
"""

import json
import unicodedata
from typing import Any, NamedTuple

from keural.data.adapters.base import Adapter, holds, lookup
from keural.data.adapters.turns import CONTENT_KEYS, is_round, listing
from keural.data.records import Drop
from keural.recipe import SourceSpec

ROW_NUMBER = "row_number"
"""The `id_field` of rows that have no id but stand in the same order as the set they translate."""

MAX_NAMES = 50
"""More are not remembered: rows may have names as keys."""
MAX_ROWS = 100
"""Of so many rows all fields are remembered, to be named where the source cannot be used."""

_PART = frozenset(("type", "text"))
"""Fields of a part of a turn that are read."""

MAX_DROPPED, DROPPED_CHARACTERS = 5, 1000
"""So many dropped rows of each reason are kept to be looked at, and so much of each."""
SECRET = frozenset(("personal_data",))
"""Reasons of rows that are dropped so that nothing keeps them."""


class DroppedRow(NamedTuple):
    """A row that was dropped: where it is, what was found, and its beginning as JSON; empty where it is not kept."""

    where: str
    detail: str
    row: str


class FieldUse:
    """Looks at every row of one source; an adapter that does not say what it reads is not looked at."""

    def __init__(self, adapter: Adapter, source: SourceSpec) -> None:
        self._source = source
        self._reads = adapter.reads(source) if adapter.reads else None
        self._booleans = self._reads.booleans if self._reads else frozenset[str]()
        self.unread: set[str] = set()
        self.keys: dict[str, None] = {}
        """Fields of the first rows, in their order."""
        self._rows = 0
        self.drops: dict[str, list[DroppedRow]] = {}
        """The first rows that are dropped, by reason."""
        named = self._reads.optional if self._reads else ()
        self.unseen: dict[str, list[Any]] = {}
        """By option, the fields that it names, as long as no row had one."""
        for option in named:
            if option in source.options:
                given = source.options[option]
                self.unseen[option] = list(given) if isinstance(given, list | dict) else [given]
        if self._reads and source.options.get("unfold"):
            self.unseen["unfold"] = [part.strip() for part in str(source.options["unfold"][0]).split(",")]
        if self._reads and source.id_field not in (None, ROW_NUMBER):
            self.unseen["id_field"] = [source.id_field]

    def look(self, value: Any) -> None:
        """Take note of a row's fields."""
        if self._rows < MAX_ROWS:
            self._rows += 1
            if isinstance(value, dict) and len(self.keys) < MAX_NAMES:
                self.keys.update(dict.fromkeys(map(str, value)))
        if self._reads is None:
            return
        if isinstance(value, dict):
            self._note("", value, self._reads.keys)
            self.see(value)
        for name in self._reads.turns:
            turns = listing(lookup(value, name) if isinstance(value, dict) else value)
            for turn in turns if isinstance(turns, list) else [turns]:
                if isinstance(turn, dict) and not is_round(turn, self._source):
                    self.see(turn)
                    self._note(f"{name}.", turn, self._reads.turn_keys)
                    for content in CONTENT_KEYS:
                        self._look_at_parts(f"{name}.{content}.", turn.get(content))

    def see(self, value: Any) -> None:
        """Forget the options of which a row, also one before it is taken apart, or a turn has a field."""
        if self.unseen and isinstance(value, dict):
            self.unseen = {option: names for option, names in self.unseen.items() if not any(_has(value, name) for name in names)}

    def _look_at_parts(self, before: str, parts: Any) -> None:
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                self._note(before, part, _PART)

    def dropped(self, drop: Drop, value: Any) -> None:
        """Keep the beginning of a row, if it is one of the first that are dropped for its reason."""
        kept = self.drops.setdefault(drop.reason, [])
        if len(kept) < MAX_DROPPED and all(row.where != drop.where for row in kept):
            secret = value is None or drop.reason in SECRET
            kept.append(DroppedRow(drop.where, drop.detail, "" if secret else excerpt(value, DROPPED_CHARACTERS)))

    def _note(self, before: str, value: dict[Any, Any], known: frozenset[str]) -> None:
        for key in value.keys() - known:
            if not str(key).isascii() and unicodedata.normalize("NFC", str(key)) in known:
                continue
            meant = key in self._booleans and str(value[key]).lower() in ("true", "false")
            if not meant and len(self.unread) < MAX_NAMES and holds(value[key]):
                self.unread.add(f"{before}{key}")


def excerpt(value: Any, length: int) -> str:
    """The beginning of a row as JSON, for people; of a huge or deep one no more is looked at than is shown."""
    text = json.dumps(_shortened(value, [length]), ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _shortened(value: Any, room: list[int]) -> Any:
    """As much of a value as there is room for."""
    room[0] -= 2
    if isinstance(value, str):
        cut = value[: max(room[0], 0)]
        room[0] -= len(cut)
        return cut if len(cut) == len(value) else f"{cut}…"
    if isinstance(value, dict):
        made: dict[str, Any] = {}
        for key, inner in value.items():
            if room[0] <= 0:
                return made | {"…": "…"}
            made[str(key)[:100]] = _shortened(inner, room)
        return made
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for inner in value:
            if room[0] <= 0:
                return [*items, "…"]
            items.append(_shortened(inner, room))
        return items
    return value


def _has(value: dict[Any, Any], name: str | int) -> bool:
    return str(name) in value or lookup(value, name) is not None
