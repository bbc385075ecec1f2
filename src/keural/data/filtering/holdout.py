"""Held-out records and exact duplicates: both are decided by a record's content alone.

Digests of a record find duplicates: that of its content (of a document as it stands, of conversations and pairs with NFKC and white
space as one, of a pair also with its answers swapped), that of its id, which a translation shares, and where wanted that of what it
asks. Another one, of the normalised text of what is asked (a document's text, a conversation without its last answer, a pair's
prompt), decides about holding out: records that ask the same are in the same split, in every stage and whatever the seed. A passage
of a text goes with that text, so that a stage which is reminded of it holds out what pretraining held out.
"""

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal

from keural.data.adapters.base import CUT, normalized
from keural.data.records import Conversation, Document, Drop, PreferencePair, Record
from keural.recipe import GateAction
from keural.tokenizer.message import Message

Split = Literal["train", "heldout"]


class Splitter:
    """Assigns records to train and held-out; remembers digests of 16 bytes of what it has seen, never the content."""

    def __init__(self, heldout_per_mille: float) -> None:
        self._threshold = int(heldout_per_mille / 1000 * 2**64)
        self._seen: set[bytes] = set()
        self._heldout: set[bytes] = set()
        self._asked: set[bytes] = set()
        self._text: tuple[str | None, bytes] = (None, b"")
        """The last text that decided, and its digest: its passages come one after the other."""

    def assign(
        self, record: Record, heldout_source: bool = False, id_space: str = "", prompts: GateAction = "skip"
    ) -> Split | Drop:
        """The split that a record belongs to; a drop when it is a duplicate, or asks what a held-out source asks.

        With an id it is also a duplicate of what has the same id in `id_space`: the same in another language. `prompts` says
        whether a record that asks (system turn included) what another one asked is a duplicate.
        """
        cut = isinstance(record, Conversation) and CUT in record.notes
        content, asks = _content(record)
        marks = {_digest_of_parts(content): "duplicate_after_cut" if cut else "duplicate"}
        if isinstance(record, PreferencePair):
            marks[_digest_of_parts([*content[:-2], content[-1], content[-2]])] = "swapped_pair"
        if isinstance(record, Conversation) and record.good is not None:
            marks[_digest_of_parts([*content[:-1], str(not record.good)])] = "other_label"
        if not isinstance(record, Document) and record.id is not None:
            marks[_digest(["id", id_space, record.id])] = "duplicate_id"
        for mark, reason in marks.items():
            if mark in self._seen:
                return Drop(reason, record.where)
        if isinstance(record, Document) and not (self._threshold or self._heldout or heldout_source):
            self._seen.update(marks)  # nothing is held out, so what a document asks decides nothing
            return "train"
        whole = _whole_text(record)
        asked = _digest(asks) if whole is None else self._digest_of_text(whole)
        if prompts == "drop" and asked in self._asked:
            return Drop("duplicate_prompt", record.where)
        if heldout_source:
            self._heldout.add(asked)
        elif asked in self._heldout:
            return Drop("held_out", record.where)
        if not isinstance(record, Document):
            self._asked.add(asked)
        self._seen.update(mark for mark, reason in marks.items() if reason not in ("swapped_pair", "other_label"))
        return "heldout" if heldout_source or int.from_bytes(asked[:8], "big") < self._threshold else "train"

    def _digest_of_text(self, text: str) -> bytes:
        if text is not self._text[0]:
            self._text = (text, _digest([normalized(text)]))
        return self._text[1]


def _digest_of_parts(parts: list[str]) -> bytes:
    """Of the parts as they are, each after its length; several times faster than their JSON."""
    digest = blake2b(digest_size=16, person=b"keural-seen")
    for part in parts:
        content = part.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _digest(content: list[str]) -> bytes:
    return blake2b(json.dumps(content, ensure_ascii=False).encode("utf-8"), digest_size=16, person=b"keural-data").digest()


def _content(record: Record) -> tuple[list[str], list[str]]:
    """The parts that make a record what it is (a pair's answers last), and those of what it asks; a document asks with its text."""
    if isinstance(record, Document):
        return [record.text], []
    if isinstance(record, PreferencePair):
        asked = _parts(record.prompt)
        return [*asked, normalized(record.chosen), normalized(record.rejected)], asked
    asked = _parts(record.messages[:-1])
    label = [] if record.good is None else [str(record.good)]
    return asked + _parts(record.messages[-1:]) + label, asked


def _whole_text(record: Record) -> str | None:
    """The text that decides about holding out: a document's own, or that which a conversation is a passage of; else none."""
    if isinstance(record, Document):
        return record.text
    return record.origin if isinstance(record, Conversation) else None


def _parts(messages: Iterable[Message]) -> list[str]:
    """Role and text of each turn, and of one that is not trained as usual that it is not."""
    return [part for turn in messages for part in (turn.role, normalized(turn.text), *_unusual(turn))]


def _unusual(turn: Message) -> tuple[str, ...]:
    return () if turn.trained is None or turn.trained == (turn.role == "assistant") else (str(turn.trained),)
