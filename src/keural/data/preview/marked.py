"""A record as text: what the chat template makes of it, and which of it is trained. No tokenizer is needed for that.

In: a document, a conversation or a pair. Out: its sequences as `Span`s, in the order in which they are encoded.
"""

from collections.abc import Iterable
from typing import NamedTuple

from keural.data.records import Conversation, Document, Record
from keural.tokenizer.message import Message
from keural.tokenizer.model_file import IM_END, IM_START


class Span(NamedTuple):
    """A part of a sequence, and whether it is trained."""

    text: str
    trained: bool


def spans_of(record: Record) -> dict[str, list[Span]]:
    """The sequences of a record by name: `text`, `chat`, or of a pair `prompt`, `chosen` and `rejected`."""
    if isinstance(record, Document):
        return {"text": [Span(record.text, True)]}
    if isinstance(record, Conversation):
        return {"chat": joined(_turns(record.messages))}
    opening = Span(f"{IM_START}assistant\n", False)
    answers = {"chosen": record.chosen, "rejected": record.rejected}
    prompt = {"prompt": joined([*(Span(span.text, False) for span in _turns(record.prompt)), opening])}
    return prompt | {side: joined([Span(f"{text}{IM_END}", True), Span("\n", False)]) for side, text in answers.items()}


def _turns(messages: Iterable[Message]) -> list[Span]:
    spans = []
    for message in messages:
        parts = message.parts()
        spans += [Span(f"{IM_START}{message.role}\n", False), *(Span(text, trained) for text, trained in parts)]
        spans += [Span(IM_END, parts[-1][1]), Span("\n", False)]
    return spans


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same text with as few spans as there can be."""
    made: list[Span] = []
    for span in spans:
        if made and (made[-1].trained == span.trained or not span.text):
            made[-1] = made[-1]._replace(text=made[-1].text + span.text)
        elif span.text:
            made.append(span)
    return made
