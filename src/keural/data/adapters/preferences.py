"""Rows with two answers to one prompt: `hh_rlhf` (two transcripts) and `preference` (chosen and rejected in their usual shapes)."""

import re
from typing import Any

from keural.data.adapters.base import (
    TABLES,
    Adapter,
    BadRow,
    described,
    guarded,
    lookup,
    placeholder_free,
    preference_pair,
    scalar,
    text_of,
    with_system,
)
from keural.data.adapters.turns import message_of, messages_of
from keural.data.readers.options import LIST, NAME, NAMES, Option
from keural.data.records import Drop, PreferencePair
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message

PROMPT_FIELDS = ("prompt", "question", "instruction", "conversations", "messages")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE_MARKER = re.compile(r"\b(?:Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_rlhf(value: Any, source: SourceSpec, where: str) -> PreferencePair | Drop:
    """Two transcripts of `\\n\\nHuman: ..\\n\\nAssistant: ..` that share everything but the last answer."""
    chosen, rejected = (transcript(text_of(value, side)) for side in ("chosen", "rejected"))
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRow("ends_with_user")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("history_differs")
    return preference_pair(chosen[:-1], chosen[-1].content, rejected[-1].content, where, source.language)


def transcript(text: str) -> list[Message]:
    """The turns of a transcript. Raises `BadRow` for text before the first turn, an empty turn, turns that do not alternate, and a
    role's name and colon inside a turn.
    """
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise BadRow("text_before_first_turn")
    turns = [Message(_HH_ROLES[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(turns)):
        raise BadRow("not_alternating")
    if any(not turn.content for turn in turns):
        raise BadRow("empty_turn")
    if any(_ROLE_MARKER.search(turn.content) for turn in turns):
        raise BadRow("role_marker_in_turn")
    return turns


def _preference(value: Any, source: SourceSpec, where: str) -> PreferencePair | Drop:
    """`chosen` and `rejected` as strings, messages or lists of messages, beside `prompt`, `question`, `instruction` (and
    `input`), `conversations` or `messages`, and `system`. Options of these names give other fields; `answers` (two fields) with
    `label` (1 or 2, the better one) stand for chosen and rejected. Scores, where a row has both, must prefer the chosen one.
    """
    _check_scores(value)
    chosen_value, rejected_value = _sides(value, source)
    prompt = _prompt(value, source)
    chosen_history, chosen = _answer(chosen_value, "chosen")
    rejected_history, rejected = _answer(rejected_value, "rejected")
    if chosen_history != rejected_history or (prompt and chosen_history and not _same_history(prompt, chosen_history)):
        raise BadRow("history_differs")
    system = text_of(value, source.options.get("system", "system"), required=False)
    turns = with_system(system, chosen_history or prompt)
    if not turns:
        raise BadRow("missing_prompt")
    return preference_pair(turns, chosen, rejected, where, source.language)


def _check_scores(value: Any) -> None:
    scores = [lookup(value, name) for name in ("score_chosen", "score_rejected")]
    if all(isinstance(score, int | float) for score in scores) and scores[0] <= scores[1]:
        raise BadRow("score_tie" if scores[0] == scores[1] else "score_reversed")


def _sides(value: Any, source: SourceSpec) -> tuple[Any, Any]:
    options = source.options
    if "answers" not in options:
        return lookup(value, options.get("chosen", "chosen")), lookup(value, options.get("rejected", "rejected"))
    first, second = (lookup(value, name) for name in options["answers"])
    label = scalar(lookup(value, options.get("label", "label")))
    if label not in ("1", "2"):
        raise BadRow("no_preference")
    return (first, second) if label == "1" else (second, first)


def _prompt(value: Any, source: SourceSpec) -> list[Message]:
    """The turns before the answer; none where the row only has them inside chosen and rejected."""
    names = [source.options["prompt"]] if "prompt" in source.options else [name for name in PROMPT_FIELDS if lookup(value, name)]
    if not names:
        return []
    found = lookup(value, names[0]) if not isinstance(names[0], list) else None
    if isinstance(found, list):
        return messages_of(found)
    text = text_of(value, names[0])
    given = placeholder_free(text_of(value, source.options.get("input", "input"), required=False)).strip()
    return [Message("user", f"{text.strip()}\n\n{given}" if given and names[0] == "instruction" else text)]


def _answer(value: Any, side: str) -> tuple[list[Message], str]:
    """Turns before an answer, if it comes with them, and the answer."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    if (text := scalar(value)) is not None:
        return [], text
    if value is None or value == []:
        raise BadRow(f"missing_{side}")
    messages = messages_of(value) if isinstance(value, list) else [message_of(value)]
    if messages[-1].role != "assistant":
        raise BadRow("ends_with_user")
    return messages[:-1], messages[-1].content


def _same_history(prompt: list[Message], history: list[Message]) -> bool:
    """Whether the turns that came with an answer begin with the same words as the prompt beside it."""
    spoken = [turn.content.strip() for turn in history if turn.role != "system"]
    asked = [turn.content.strip() for turn in prompt if turn.role != "system"]
    return spoken[: len(asked)] == asked


ADAPTERS = {
    # to refuse is what its harmless part teaches
    "hh_rlhf": Adapter("pairs", guarded(_hh_rlhf), TABLES, meaning=described(_hh_rlhf), license="MIT", gates={"refusals": "count"}),
    "preference": Adapter(
        "pairs",
        guarded(_preference),
        TABLES,
        {
            "prompt": Option(NAMES, "field with the text or the turns before the answers", PROMPT_FIELDS),
            "chosen": Option(NAME, "field with the better answer", "chosen"),
            "rejected": Option(NAME, "field with the worse answer", "rejected"),
            "system": Option(NAME, "field with a system text", "system"),
            "input": Option(NAMES, "field with what an instruction is asked of, put below it", "input"),
            "answers": Option(LIST, "two fields with answers, of which the label says which is the better"),
            "label": Option(NAME, "field that says which of two answers is the better: 1 or 2", "label"),
        },
        meaning=described(_preference),
    ),
}
