"""Hangul that is written letter by letter, put together.

In: a record. Out: the same with its syllables composed, as Unicode's NFC composes them; all other characters stay as they are.
Files from macOS and some scanners have decomposed syllables, which look the same and cost a tokenizer six times as much: the
`published` kind composes everything itself (NFKC), the `lossless` kind keeps what it is given.
"""

import re
import unicodedata
from dataclasses import replace

from keural.data.readers.notes import ReadingNotes
from keural.data.records import AnyRecord, Conversation, Document, EvaluationItem, PreferencePair
from keural.tokenizer.message import Message

_LETTERS = re.compile("[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?|[\uac00-\ud7a3][\u11a8-\u11c2]")
"""Leading consonant, vowel and perhaps final consonant; or a syllable whose final consonant stands behind it."""


def compose(text: str) -> str:
    """The text with decomposed Hangul composed; the very same text where there is none."""
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    found = _LETTERS.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)
    return text if found == text else found


def composed(record: AnyRecord, notes: ReadingNotes) -> AnyRecord:
    """The record with every text composed, which is counted."""
    changed = _composed(record)
    notes.composed += changed is not record
    return changed


def _composed(record: AnyRecord) -> AnyRecord:
    if isinstance(record, Document):
        text = compose(record.text)
        return record if text is record.text else replace(record, text=text)
    if _are_composed(record):
        return record
    if isinstance(record, Conversation):
        messages = _messages(record.messages)
        return record if messages is record.messages else replace(record, messages=messages)
    if isinstance(record, PreferencePair):
        prompt, chosen, rejected = _messages(record.prompt), compose(record.chosen), compose(record.rejected)
        same = prompt is record.prompt and chosen is record.chosen and rejected is record.rejected
        return record if same else replace(record, prompt=prompt, chosen=chosen, rejected=rejected)
    assert isinstance(record, EvaluationItem)
    return record  # they are only looked for, by normalised text


def _are_composed(record: AnyRecord) -> bool:
    """Whether nothing of a record is to be composed, of all its texts at once: nearly always so."""
    if isinstance(record, Conversation):
        texts = [text for message in record.messages for text in (message.content, message.reasoning)]
    elif isinstance(record, PreferencePair):
        texts = [text for message in record.prompt for text in (message.content, message.reasoning)]
        texts += (record.chosen, record.rejected)
    else:
        return False
    whole = "\n".join(texts)
    return whole.isascii() or unicodedata.is_normalized("NFC", whole)


def _messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    found = tuple(map(_message, messages))
    return messages if all(new is old for new, old in zip(found, messages, strict=True)) else found


def _message(message: Message) -> Message:
    content, reasoning = compose(message.content), compose(message.reasoning)
    same = content is message.content and reasoning is message.reasoning
    return message if same else message._replace(content=content, reasoning=reasoning)
