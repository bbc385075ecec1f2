"""Rows that are dialogues: `messages` (ChatML), `sharegpt`, `alpaca`, `qa`, `dialogue` (a list of turns)."""

from typing import Any

from keural.data.adapters.base import (
    NAME,
    NAMES,
    TABLES,
    Adapter,
    BadRow,
    conversation,
    guarded,
    lookup,
    messages_of,
    placeholder_free,
    scalar,
    text_of,
    with_system,
)
from keural.data.records import Conversation, Drop
from keural.recipe import SourceSpec
from keural.tokenizer.chatml import Message


def _messages(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{messages: [{role, content}, ..]}`; option `field` names the list, `system` a field with a system text."""
    return _listed(value, source, where, "messages")


def _sharegpt(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{conversations: [{from, value}, ..]}`; options as for `messages`."""
    return _listed(value, source, where, "conversations")


def _listed(value: Any, source: SourceSpec, where: str, field: str) -> Conversation | Drop:
    turns = messages_of(value if isinstance(value, list) else lookup(value, source.options.get("field", field)))
    return conversation(with_system(_system(value, source), turns), where, source.language)


def _system(value: Any, source: SourceSpec) -> str:
    """A system text beside the messages, where the row has one."""
    return text_of(value, source.options.get("system", "system"), required=False)


def _alpaca(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{instruction, input, output}`; options of these names (and `system`) give other field names."""
    options = source.options
    instruction = text_of(value, options.get("instruction", "instruction"))
    given = placeholder_free(text_of(value, options.get("input", "input"), required=False))
    question = f"{instruction.strip()}\n\n{given.strip()}" if given.strip() else instruction
    return _exchange(question, text_of(value, options.get("output", "output")), value, source, where)


def _qa(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{question, answer}`; options of these names (and `system`) give other fields or column numbers.

    Option `template` puts the question into a sentence: `한국어로 옮기세요: {question}`.
    """
    options = source.options
    question = text_of(value, options.get("question", "question"))
    if question.strip() and "template" in options:
        question = options["template"].replace("{question}", question.strip())
    return _exchange(question, text_of(value, options.get("answer", "answer")), value, source, where)


def _exchange(question: str, answer: str, value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    turns = with_system(_system(value, source), [Message("user", question), Message("assistant", answer)])
    return conversation(turns, where, source.language)


def _dialogue(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """A list of turns, user first: strings, or pairs of user and assistant; option `field` names it in an object."""
    turns = value if isinstance(value, list) else lookup(value, source.options.get("field", "dialogue"))
    if not isinstance(turns, list):
        raise BadRow("missing_dialogue" if turns is None else "malformed_row")
    flat = [scalar(part) for turn in turns for part in (turn if isinstance(turn, list) else [turn])]
    if any(part is None for part in flat):
        raise BadRow("malformed_row")
    roles = ("user", "assistant")
    return conversation([Message(roles[place % 2], str(part)) for place, part in enumerate(flat)], where, source.language)


ADAPTERS = {
    "messages": Adapter("conversations", guarded(_messages), TABLES, {"field": NAME, "system": NAME}),
    "sharegpt": Adapter("conversations", guarded(_sharegpt), TABLES, {"field": NAME, "system": NAME}),
    "alpaca": Adapter(
        "conversations", guarded(_alpaca), TABLES, {"instruction": NAMES, "input": NAMES, "output": NAMES, "system": NAME}
    ),
    "qa": Adapter("conversations", guarded(_qa), TABLES, {"question": NAMES, "answer": NAMES, "system": NAME, "template": (str,)}),
    "dialogue": Adapter("conversations", guarded(_dialogue), TABLES, {"field": NAME}),
}
