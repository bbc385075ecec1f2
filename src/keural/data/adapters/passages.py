"""Running text among conversations: `passage`, by which SFT is reminded of what pretraining has read.

In: rows that `text`, `markdown` or `po` read. Out: a conversation for each passage, the answer to one prompt. Each knows the text
that it is of, so that it is held out where that text is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from keural.data.adapters.base import TABLES, Adapter, BadRow, Reads, WrongSchema, conversation, described, guarded
from keural.data.adapters.documents import ADAPTERS as DOCUMENTS
from keural.data.adapters.documents import FIELD, SIDE, reads_text
from keural.data.readers.options import COUNT, TEXT, Option
from keural.data.readers.po import PoMessage
from keural.data.records import Conversation, Document, Drop
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message

PROMPT = "Write a passage."
LENGTH = 800
"""Characters of a passage, where the recipe does not say."""
SHORTEST = 10
"""Characters: what is shorter is no passage."""
_READ_BY = {"field": "text", "side": "po"}
"""Which reading takes an option."""


@dataclass(frozen=True)
class _Passage:
    """A part of a text, and the text."""

    text: str
    whole: str


def _texts(value: Any, source: SourceSpec) -> Iterator[_Passage | BadRow]:
    """The passages of the text that a row holds."""
    if _read_as(source) == "po" and not _is_catalogue(value):
        yield WrongSchema("read_as po is for gettext catalogues (.po)")
        return
    whole = DOCUMENTS[_read_as(source)](value, source, "")
    if not isinstance(whole, Document):
        assert isinstance(whole, Drop)
        yield BadRow(whole.reason, whole.detail, whole.remedy)
        return
    text, most = whole.text, source.options.get("characters", LENGTH)
    start = 0
    while start < len(text):
        end = _end(text, start, most)
        if text[start:end].strip():
            yield _Passage(text[start:end], text)
        start = end


def _is_catalogue(value: Any) -> bool:
    """Whether a row is what the reader of .po files gives."""
    messages = value.get("messages") if isinstance(value, dict) else None
    return isinstance(messages, list) and all(isinstance(message, PoMessage) for message in messages)


def _end(text: str, start: int, most: int) -> int:
    """Where a passage ends: after the last line that fits; of a line that does not fit after its last white space; at the latest
    after `most` characters.
    """
    if start + most >= len(text):
        return len(text)
    for mark in ("\n", " "):
        if (found := text.rfind(mark, start, start + most)) >= 0 and text[start:found].strip():
            return found + 1
    return start + most


def _passage(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """Running text as answers to `prompt`, passage by passage: what `text`, `markdown` or `po` (`read_as`) reads for next_token.

    A passage is held out where the text that it is of is held out, in pretraining too, if the options of reading are the same.
    """
    if not isinstance(value, _Passage):
        [value, *_] = [*_texts(value, source), BadRow("empty")]
        if isinstance(value, BadRow):
            raise value
    prompt = source.options.get("prompt", PROMPT)
    found = conversation([Message("user", prompt), Message("assistant", value.text)], where, source.language)
    return found if isinstance(found, Drop) else replace(found, origin=value.whole)


def _read_as(source: SourceSpec) -> str:
    return str(source.options.get("read_as", "text"))


def _check(source: SourceSpec) -> str | None:
    unread = [name for name, reading in _READ_BY.items() if name in source.options and reading != _read_as(source)]
    if unread:
        return f"option {unread[0]!r} has no effect with read_as {_read_as(source)}"
    if (most := source.options.get("characters", LENGTH)) < SHORTEST:
        return f"option 'characters' must be at least {SHORTEST}, got {most}"
    return None if source.options.get("prompt", PROMPT).strip() else "option 'prompt' is empty: what are the passages an answer to?"


def _reads(source: SourceSpec) -> Reads:
    if _read_as(source) == "text":
        return reads_text(source)
    return Reads(frozenset(("messages",) if _read_as(source) == "po" else ("text",)))


ADAPTERS = {
    "passage": Adapter(
        "conversations",
        guarded(_passage),
        ("text", "markdown", "po", "srt", "conllu", *TABLES),
        {
            "prompt": Option(TEXT, "what the passages are an answer to", PROMPT),
            "characters": Option(COUNT, "longest passage: whole lines, and of longer lines whole words", LENGTH),
            "read_as": Option(TEXT, "the adapter that reads the same text for next_token", "text", ("text", "markdown", "po")),
            **FIELD,
            **SIDE,
        },
        meaning=described(_passage),
        split=_texts,
        check=_check,
        reads=_reads,
        example={"text": "The mill stands by the river."},
    ),
}
