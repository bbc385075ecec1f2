"""What all adapters share: the registry's entry, fields of a row, role names, and the gates every record passes."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keural.data.readers.formats import OptionTypes
from keural.data.records import AnyRecord, Conversation, Document, Drop, Kind, PreferencePair
from keural.recipe import GateAction, SourceSpec
from keural.tokenizer.chatml import Message

NAME = (str, int)
"""Types of an option that names a field, or a column by number."""
NAMES = (str, int, list)
"""Types of an option that names a field, or several whose texts are joined by line ends."""
TABLES = ("jsonl", "json", "yaml", "parquet", "csv", "tsv")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names of roles in public sets."""
PLACEHOLDERS = {"<noinput>", "noinput", "no input", "n/a", "none", "<no input>"}
"""What public instruction sets write where there is no input."""
WRONG_SCHEMA = "wrong_schema"
"""Reason of rows that do not have the adapter's schema; a source that begins with one is refused."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Adapter:
    """One entry of the registry; calling it turns a row's value into a record or a drop."""

    kind: Kind | Callable[[SourceSpec], Kind]
    convert: Callable[[Any, SourceSpec, str], AnyRecord | Drop]
    formats: tuple[str, ...]
    """Formats it reads; none where it makes the rows."""
    options: OptionTypes = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Options that must have one of some values."""
    split: Callable[[Any, SourceSpec], Iterable[Any]] | None = None
    """Takes a row that holds several records (a file of sessions, a ranking) apart; none: a row is a record."""
    selects: Callable[[str, SourceSpec], bool] | None = None
    """Whether a file, or a member of an archive, is read when the source is a directory; none: all are."""
    license: str | None = None
    """Licence of a published source, where the recipe states none."""
    language: str | None = None
    """Language of a published source, where the recipe states none."""
    benchmark: bool = False
    """The source is a benchmark: scores of its family mean nothing after training on it."""
    gates: dict[str, GateAction] = field(default_factory=dict)
    """What the gates do by default for this adapter, where that differs from the gates' own default."""
    reading: dict[str, Any] = field(default_factory=dict)
    """Options of the reader, where the recipe does not give them."""
    rows: Callable[[Mapping[str, Any], int], Iterator[Any]] | None = None
    """Makes the rows, from the source's options and a seed; such a source takes no path. Raises `UserError` for wrong options when
    it is called, before the first row. None: rows are read."""
    content: Callable[[], list[Path]] = list
    """The files that determine rows which the adapter makes."""

    def __call__(self, value: Any, source: SourceSpec, where: str) -> AnyRecord | Drop:
        """The record that a row holds, or why it holds none."""
        return self.convert(value, source, where)

    def kind_of(self, source: SourceSpec) -> Kind:
        """The kind of records that `source` gives."""
        return self.kind if isinstance(self.kind, str) else self.kind(source)


class BadRow(Exception):
    """Raised while a row is taken apart; becomes a `Drop` with this reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class WrongSchema(BadRow):
    """A row that another adapter, or none, is for; `detail` says what is missing or what to do."""

    def __init__(self, detail: str) -> None:
        super().__init__(WRONG_SCHEMA, detail)


def missing(value: Any, *keys: str, hint: str = "") -> WrongSchema:
    """The error for a row that has none of some keys: names them and those that it has."""
    there = (
        ", ".join(sorted(map(str, value))[:12]) or "none" if isinstance(value, dict) else f"none, it is a {type(value).__name__}"
    )
    return WrongSchema(f"the row has no key {' or '.join(map(repr, keys))} (its keys: {there}){hint}")


def guarded(convert: Callable[[Any, SourceSpec, str], AnyRecord | Drop]) -> Callable[[Any, SourceSpec, str], AnyRecord | Drop]:
    """An adapter whose `BadRow`s become drops."""

    def guard(value: Any, source: SourceSpec, where: str) -> AnyRecord | Drop:
        try:
            return convert(value, source, where)
        except BadRow as bad:
            return Drop(bad.reason, where, bad.detail)

    return guard


def lookup(value: Any, name: str | int) -> Any:
    """A field of a row, None where it is missing; `a.0.b` looks into objects and lists inside."""
    if isinstance(value, dict) and (key := str(name)) in value:
        return value[key]
    for part in str(name).split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def scalar(value: Any) -> str | None:
    """Text of a string or number, else None."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def text_of(value: Any, names: str | int | Sequence[str | int], required: bool = True) -> str:
    """The text of a field, or of several joined by line ends; empty where optional ones are missing."""
    listed: Sequence[str | int] = names if isinstance(names, list) else [names]  # type: ignore[list-item]
    texts = []
    for name in listed:
        found = lookup(value, name)
        text = scalar(found)
        if text is None and required:
            raise BadRow(f"missing_{name}" if found is None else f"{name}_is_not_text")
        texts.append(text or "")
    return "\n".join(text for text in texts if text)


def placeholder_free(text: str) -> str:
    """The text of an optional input, empty where it only says that there is none."""
    return "" if text.strip().lower() in PLACEHOLDERS else text


def message_of(value: Any) -> Message:
    """A message from `{role, content}` or `{from, value}`."""
    if not isinstance(value, dict):
        raise BadRow("malformed_row")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow("unknown_role")
    text = scalar(content)
    if text is None:
        raise BadRow("empty_turn" if content is None else "malformed_row")
    return Message(ROLES[role.lower()], text)


def messages_of(value: Any) -> list[Message]:
    """Messages from a list of them."""
    if not isinstance(value, list):
        raise BadRow("missing_messages" if value is None else "malformed_row")
    return [message_of(item) for item in value]


def with_system(system: str, messages: Sequence[Message]) -> list[Message]:
    """The messages with a system turn first, if there is a text for one and none is there yet."""
    if not system.strip() or (messages and messages[0].role == "system"):
        return list(messages)
    return [Message("system", system), *messages]


def normalized(text: str) -> str:
    """NFKC with white space runs as one space: what counts as the same content."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def merged(messages: Iterable[Message], between: str = "\n") -> list[Message]:
    """The messages with runs of one role put together, as people who write in several bubbles mean them; empty ones vanish."""
    turns: list[Message] = []
    for role, content in messages:
        if not content.strip():
            continue
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}{between}{content.strip()}")
        else:
            turns.append(Message(role, content.strip()))
    return turns


def document(text: str, where: str, language: str | None) -> Document | Drop:
    """A document, or a drop when it is empty or not valid Unicode."""
    if not text.strip():
        return Drop("empty", where)
    try:
        text.encode("utf-8")  # several times faster than a search for surrogates
    except UnicodeEncodeError:
        return Drop("invalid_unicode", where)
    return Document(text, where, language)


def conversation(messages: Iterable[Message], where: str, language: str | None) -> Conversation | Drop:
    """A conversation that passed the gates: turns stripped, an empty system turn and trailing user turns cut.

    What is left must hold text in every turn, alternate from user to assistant, and have at least one assistant turn.
    """
    try:
        turns = _clean_turns(messages)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            raise BadRow("no_assistant_turn")
        _check_alternation(turns)
    except BadRow as bad:
        return Drop(bad.reason, where)
    return Conversation(tuple(turns), where, language)


def preference_pair(
    prompt: Iterable[Message], chosen: str, rejected: str, where: str, language: str | None
) -> PreferencePair | Drop:
    """A pair that passed the gates: a prompt that alternates and ends with the user, two different answers that hold text."""
    chosen, rejected = chosen.strip(), rejected.strip()
    try:
        turns = _clean_turns(prompt)
        if not turns or turns[-1].role != "user":
            raise BadRow("prompt_does_not_end_with_user")
        _check_alternation(turns)
        _clean_turns([Message("assistant", chosen), Message("assistant", rejected)])
        if normalized(chosen) == normalized(rejected):
            raise BadRow("chosen_equals_rejected")
    except BadRow as bad:
        return Drop(bad.reason, where)
    return PreferencePair(tuple(turns), chosen, rejected, where, language)


def _clean_turns(messages: Iterable[Message]) -> list[Message]:
    turns = [Message(role, content.strip()) for role, content in messages]
    if turns and turns[0].role == "system" and not turns[0].content:
        turns.pop(0)
    for role, content in turns:
        if role not in ("system", "user", "assistant"):
            raise BadRow("unknown_role")
        if not content:
            raise BadRow("empty_turn")
        if not content.isascii() and _SURROGATE.search(content):
            raise BadRow("invalid_unicode")
    return turns


def _check_alternation(turns: Sequence[Message]) -> None:
    spoken = turns[1:] if turns[0].role == "system" else turns
    if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(spoken)):
        raise BadRow("not_alternating")
