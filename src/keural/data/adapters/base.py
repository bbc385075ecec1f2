"""What all adapters share: the registry's entry, fields of a row, and the gates every record passes."""

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keural.data.readers.options import OptionTable
from keural.data.records import AnyRecord, Conversation, Document, Drop, Kind, PreferencePair
from keural.recipe import GateAction, SourceSpec
from keural.tokenizer.message import ROLES as CHAT_ROLES
from keural.tokenizer.message import Message

TABLES = ("jsonl", "json", "yaml", "parquet", "csv", "tsv")
NO_INPUT = re.compile(r"[<\[(]?\s*(?:no[ _-]?input|입력 ?없음)\s*[>\])]?", re.IGNORECASE)
"""What public instruction sets write where there is no input."""
NOTHING = frozenset({"n/a", "none", "없음", "해당 없음"})
"""What they write there, too, and what may be an input all the same."""
WRONG_SCHEMA = "wrong_schema"
"""Reason of rows that do not have the adapter's schema; a source that begins with one is refused."""
UNDECLARED = "undeclared_value"
"""Reason of rows in which a field that carries meaning has a value of no declared meaning; its source is refused with those seen.
"""
CUT = "unanswered_turns_cut"
"""Noted of conversations that lost turns after the last answer."""
ASSISTANT_FIRST, SYSTEM_INSIDE = "assistant_first", "system_inside"
"""Reasons of conversations in an order that an option allows."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Reads:
    """Which fields of a row an adapter reads, with the options of one source; all others mean nothing to it."""

    keys: frozenset[str]
    """Fields of a row."""
    turns: tuple[str | int, ...] = ()
    """Fields that hold lists of turns."""
    turn_keys: frozenset[str] = frozenset()
    """Fields of a turn."""
    booleans: frozenset[str] = frozenset()
    """Fields that are read only where they are true or false, or these words."""
    optional: tuple[str, ...] = ()
    """Options that name fields which a row need not have; some row must have one that a recipe names."""


@dataclass(frozen=True)
class Adapter:
    """One entry of the registry; calling it turns a row's value into a record or a drop."""

    kind: Kind | Callable[[SourceSpec], Kind]
    convert: Callable[[Any, SourceSpec, str], AnyRecord | Drop]
    formats: tuple[str, ...]
    """Formats it reads; none where it makes the rows."""
    options: OptionTable = field(default_factory=dict)
    meaning: str = ""
    """What rows it reads, and what they become, in plain words."""
    split: Callable[[Any, SourceSpec], Iterable[Any]] | None = None
    """Takes a row that holds several records (a file of sessions, a ranking) apart; none: a row is a record."""
    split_option: str | Callable[[SourceSpec], bool] | None = None
    """Rows are taken apart only where a recipe gives this option, or where its options are so."""
    check: Callable[[SourceSpec], str | None] | None = None
    """What is wrong with a source's options together; their types and names are checked before."""
    reads: Callable[[SourceSpec], Reads] | None = None
    """The fields that it reads; none: what it leaves is not listed."""
    example: Any = None
    """One row as it reads it by default."""
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
    directory: tuple[str, ...] = ()
    """Those of its formats that a directory or an archive is searched for; none: all."""

    def __call__(self, value: Any, source: SourceSpec, where: str) -> AnyRecord | Drop:
        """The record that a row holds, or why it holds none."""
        return self.convert(value, source, where)

    def kind_of(self, source: SourceSpec) -> Kind:
        """The kind of records that `source` gives."""
        return self.kind if isinstance(self.kind, str) else self.kind(source)

    def splitter(self, source: SourceSpec) -> Callable[[Any, SourceSpec], Iterable[Any]] | None:
        """What takes the rows of `source` apart; None: a row is a record."""
        wanted = self.split_option
        if callable(wanted):
            return self.split if wanted(source) else None
        return self.split if wanted is None or wanted in source.options else None


class BadRow(Exception):
    """Raised while a row is taken apart; becomes a `Drop` with this reason. `detail` names what was found, in a few words."""

    def __init__(self, reason: str, detail: str = "", remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.remedy = reason, detail, remedy

    def drop(self, where: str) -> Drop:
        """The row's drop."""
        return Drop(self.reason, where, self.detail, self.remedy)


class WrongSchema(BadRow):
    """A row that another adapter, or none, is for; `detail` says what is missing or what to do."""

    def __init__(self, detail: str) -> None:
        super().__init__(WRONG_SCHEMA, detail)


class Undeclared(BadRow):
    """A field that carries meaning has a value outside its declared meanings; `remedy` says how to declare it."""

    def __init__(self, field: str | int, value: Any, remedy: str) -> None:
        super().__init__(UNDECLARED, f"{field} is {value!r:.40}", remedy)


def described(convert: Callable[..., Any]) -> str:
    """The meaning of an adapter, as the docstring of its function says it, on one line."""
    return " ".join((convert.__doc__ or "").split())


def missing(value: Any, *keys: str, hint: str = "") -> WrongSchema:
    """The error for a row that has none of some keys: names them and those that it has."""
    there = (
        ", ".join(sorted(map(str, value))[:12]) or "none" if isinstance(value, dict) else f"none, it is a {type(value).__name__}"
    )
    return WrongSchema(f"the row has no key {' or '.join(map(repr, keys))} (its keys: {there}){hint}")


def guarded(convert: Callable[[Any, SourceSpec, str], AnyRecord | Drop]) -> Callable[[Any, SourceSpec, str], AnyRecord | Drop]:
    """An adapter whose `BadRow`s become drops."""

    def guard(value: Any, source: SourceSpec, where: str) -> AnyRecord | Drop:
        if isinstance(value, BadRow):  # a row that could not be taken apart
            return value.drop(where)
        try:
            return convert(value, source, where)
        except BadRow as bad:
            return bad.drop(where)

    return guard


def lookup(value: Any, name: str | int) -> Any:
    """A field of a row, None where it is missing; `a.0.b` looks into objects and lists inside."""
    if isinstance(value, dict):
        key = str(name)
        if key in value:
            return value[key]
        if not key.isascii() and (decomposed := unicodedata.normalize("NFD", key)) in value:
            return value[decomposed]  # as programs on a Mac write it
        if "." not in key:
            return None
    for part in str(name).split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif part.isdecimal() and isinstance(items := plain(value), list) and int(part) < len(items):
            value = items[int(part)]
        else:
            return None
    return value


def leaves_items(value: Any, name: str | int) -> bool:
    """Whether a name such as `answers.0.text` takes one item of a list that has more."""
    before = ""
    for part in str(name).split("."):
        if part.isdecimal() and isinstance(items := plain(lookup(value, before) if before else value), list) and len(items) > 1:
            return True
        before = f"{before}.{part}" if before else part
    return False


def plain(value: Any) -> Any:
    """An array or tuple as a list; anything else as it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def holds(value: Any) -> bool:
    """Whether a field is there and not an empty text, list or object."""
    value = plain(value)
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def scalar(value: Any) -> str | None:
    """Text of a string or number, else None; what is not a number (NaN, infinity) is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(value)


def text_of(
    value: Any, names: str | int | Sequence[str | int], required: bool = True, booleans: Sequence[str] | None = None
) -> str:
    """The text of a field, or of several joined by line ends; empty where optional ones are missing.

    `booleans` is how true and false are written. Raises `BadRow` for a required field that is missing, and for any that is there
    and holds neither text nor a number.
    """
    listed: Sequence[str | int] = names if isinstance(names, list) else [names]  # type: ignore[list-item]
    texts = []
    for name in listed:
        found = lookup(value, name)
        text = booleans[not found] if booleans and isinstance(found, bool) else scalar(found)
        if text is None and (required or holds(found)):
            raise BadRow(f"missing_{name}") if found is None else BadRow(f"{name}_is_not_text", _called(found))
        texts.append(text or "")
    return "\n".join(text for text in texts if text)


def _called(value: Any) -> str:
    """What a value is that is no text: its type, or what it is instead of a number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else type(value).__name__


def trimmed(text: str) -> str:
    """A turn's text without empty lines before it and white space after it; the indentation of its first line stays."""
    text = text.rstrip()
    if not text or not text[0].isspace():
        return text
    indented = len(text) - len(text.lstrip())
    return text[max(text.rfind("\n", 0, indented), text.rfind("\r", 0, indented)) + 1 :]


def placeholder_free(text: str) -> str:
    """The text of an optional input, empty where it only says that there is none."""
    return "" if NO_INPUT.fullmatch(text.strip()) or says_nothing(text) else text


def says_nothing(text: str) -> bool:
    """Whether an optional input is a word for nothing that could be meant: it is left out, and to be noted."""
    return text.strip().lower() in NOTHING


def with_system(system: str, messages: Sequence[Message]) -> list[Message]:
    """The messages with a system turn first, if there is a text for one. Raises `BadRow` where they have another already."""
    if not system.strip():
        return list(messages)
    if not messages or messages[0].role != "system":
        return [Message("system", system), *messages]
    if messages[0].content.strip() and normalized(messages[0].content) != normalized(system):
        raise BadRow("system_differs")
    return [messages[0]._replace(content=system), *messages[1:]]


def normalized(text: str) -> str:
    """NFKC with white space runs as one space: what counts as the same content."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def merged(messages: Iterable[Message], between: str = "\n") -> list[Message]:
    """The messages with runs of one role put together, as people who write in several bubbles mean them; empty ones vanish."""
    turns: list[Message] = []
    for message in messages:
        role, content = message.role, message.content.strip()
        if not content:
            continue
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}{between}{content}")
        else:
            turns.append(Message(role, content))
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


def conversation(
    messages: Iterable[Message],
    where: str,
    language: str | None,
    notes: Iterable[str] = (),
    allowed: Collection[str] = (),
) -> Conversation | Drop:
    """A conversation that passed the gates: turns trimmed, an empty system turn and turns after the last answer cut.

    What is left must hold text in every turn, be in order (`allowed` names what else is: `ASSISTANT_FIRST`, `SYSTEM_INSIDE`), and
    have at least one turn that is trained. `notes` are counted with it.
    """
    try:
        turns = _clean_turns(messages)
        whole = len(turns)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            raise BadRow("no_assistant_turn")
        _check_order(turns, allowed)
        if not any(turn.is_trained for turn in turns):
            raise BadRow("nothing_trained")
    except BadRow as bad:
        return bad.drop(where)
    return Conversation(tuple(turns), where, language, notes=(*notes, CUT) if len(turns) < whole else tuple(notes))


def preference_pair(
    prompt: Iterable[Message], chosen: str, rejected: str, where: str, language: str | None
) -> PreferencePair | Drop:
    """A pair that passed the gates: a prompt in order that ends with the user or a tool's result, two different answers that hold
    text.
    """
    chosen, rejected = trimmed(chosen), trimmed(rejected)
    try:
        turns = _clean_turns(prompt)
        if not turns or turns[-1].role not in ("user", "tool"):
            raise BadRow("prompt_does_not_end_with_user")
        _check_order(turns)
        _clean_turns([Message("assistant", chosen), Message("assistant", rejected)])
        if normalized(chosen) == normalized(rejected):
            raise BadRow("chosen_equals_rejected")
    except BadRow as bad:
        return bad.drop(where)
    return PreferencePair(tuple(turns), chosen, rejected, where, language)


def _clean_turns(messages: Iterable[Message]) -> list[Message]:
    turns = list(map(_trimmed_turn, messages))
    if turns and turns[0].role == "system" and not turns[0].content:
        turns.pop(0)
    for turn in turns:
        if turn.role not in CHAT_ROLES:
            raise BadRow("unknown_role", turn.role)
        if not turn.content and turn.role != "tool":  # a tool may have nothing to say
            raise BadRow("empty_turn")
        text = turn.text if turn.reasoning else turn.content
        if not text.isascii() and _SURROGATE.search(text):
            raise BadRow("invalid_unicode")
    return turns


def _trimmed_turn(turn: Message) -> Message:
    content = trimmed(turn.content)
    return turn if content is turn.content else turn._replace(content=content)


_AFTER = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
"""Which roles may follow each."""


def _check_order(turns: Sequence[Message], allowed: Collection[str] = ()) -> None:
    before = ""
    for place, (role, *_) in enumerate(turns):
        if role == "system":
            if place and SYSTEM_INSIDE not in allowed:
                raise BadRow(SYSTEM_INSIDE)
            continue
        if role not in _AFTER[before]:
            if role == "tool":
                raise BadRow("tool_result_without_call")
            if before or role != "assistant":
                raise BadRow("not_alternating", f"{role} after {before}")
            if ASSISTANT_FIRST not in allowed:
                raise BadRow(ASSISTANT_FIRST)
        before = role
