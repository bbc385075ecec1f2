"""What a source is turned into: a document, a conversation (whose answer may be judged), a preference pair, or a counted drop."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from keural.tokenizer.message import CALL, Message, parse_answer

Kind = Literal["documents", "conversations", "pairs", "answers", "evaluation"]
"""What an adapter gives; evaluation items are only looked for, never trained on."""


@dataclass(frozen=True, slots=True)
class Document:
    """Running text for next-token training. `where` names file and row, `language` is an ISO 639-1 code where known."""

    text: str
    where: str
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue for supervised fine-tuning: perhaps a system turn, then user, assistant and tool turns, an assistant's last.

    `id` is what the source calls it, where the recipe says which field that is; a translation has the same. `notes` say what of the
    row the record does not have, to be counted; `label` is what the row says of its answer, where a label does. `good` says whether
    the last answer, which alone is learned from then, is a good one: of a labelled answer; None of any other conversation.
    `origin` is the whole text that its answer is a passage of: it is held out where that text is.
    """

    messages: tuple[Message, ...]
    where: str
    language: str | None = None
    id: str | None = None
    notes: tuple[str, ...] = ()
    label: str = ""
    good: bool | None = None
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt. `prompt` ends with a user turn or a tool's result; `chosen` and `rejected` are the assistant's
    contents; `id` and `notes` as of a conversation.

    `label` is what the row says in favour of the chosen one, where a label or scores decide. `weight` is what the pair counts in
    the loss: several pairs of one row share a weight of 1.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str
    language: str | None = None
    id: str | None = None
    label: str = ""
    weight: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is not used, with the reason it is counted under (a short snake_case word) and the place it came from.

    `detail` says what was found in a few words (an unknown role, a value, the keys that a row has), `remedy` how a recipe can say
    what a value means.
    """

    reason: str
    where: str
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationItem:
    """One item of a benchmark: passage, question, choices and answers; what a set lacks is empty.

    `gold` is the number of the right choice, from 0; None where the row does not say, or has a value that means nothing. `labelled`
    are lists of answers by name, each answer with whether it is right. `fields` are others of the row that a question is asked
    with, by the names that tasks know them by.
    """

    question: str
    where: str
    passage: str = ""
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    gold: int | None = None
    labelled: tuple[tuple[str, tuple[tuple[str, bool], ...]], ...] = ()
    fields: tuple[tuple[str, str], ...] = ()


Record = Document | Conversation | PreferencePair
AnyRecord = Record | EvaluationItem


def plain_record(record: Record) -> dict[str, Any]:
    """A record as plain data, for people."""
    if isinstance(record, Document):
        return {"text": record.text}
    if isinstance(record, Conversation):
        label = {} if record.good is None else {"label": record.good}
        return {"messages": _plain_turns(record.messages), **label}
    return {"prompt": _plain_turns(record.prompt), "chosen": record.chosen, "rejected": record.rejected}


def labelled(record: Conversation, good: bool) -> Conversation:
    """The conversation as its last answer with a label; nothing else of it is learned from."""
    *before, answer = record.messages
    asked = (turn._replace(trained=False) if turn.role == "assistant" else turn._replace(trained=None) for turn in before)
    return replace(record, messages=(*asked, answer._replace(trained=True)), good=good)


def answers_of(pair: PreferencePair) -> Iterator[Conversation]:
    """Both answers of a pair, the chosen one as a good one and the rejected one as a bad one."""
    for side, answer, good in (("chosen", pair.chosen, True), ("rejected", pair.rejected, False)):
        name = None if pair.id is None else f"{pair.id}#{side}"
        whole = (*pair.prompt, Message("assistant", answer))
        yield labelled(Conversation(whole, pair.where, pair.language, name, pair.notes), good)


def _plain_turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


def calls_tools(record: Record) -> bool:
    """Whether an assistant calls tools in a record, and is trained to."""
    if isinstance(record, Document):
        return False
    if isinstance(record, PreferencePair):
        return _has_call(record.chosen)
    return any(turn.role == "assistant" and turn.is_trained and _has_call(turn.content) for turn in record.messages)


def _has_call(content: str) -> bool:
    return CALL in content and bool(parse_answer(content).tool_calls)


class SourceCount(NamedTuple):
    """What became of one source's rows before: drops by reason, those of rows that could not be read, places of the first."""

    rows: int
    drops: Counter[str]
    unreadable: Counter[str]
    first: dict[str, str]
