"""Rows of benchmarks: what is asked, the passage, the choices and the answers, to be looked for in training data.

They are for `data.decontaminate` alone; a stage cannot train on them. A benchmark that is not here is read by `evaluation`
with options that name its fields.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from keural.data.adapters.base import TABLES, Adapter, Reads, described, guarded, lookup, missing, scalar
from keural.data.readers.options import NAMES, Option
from keural.data.records import Drop, EvaluationItem
from keural.recipe import SourceSpec

_MMLU_HEADER = re.compile(r"\AThe following are multiple choice questions.*?\n\n", re.S)
_LETTER = re.compile(r"\n[A-E]\. ")
_NUMBERED = re.compile(r"(?:Answer|Ending|Solution|Option)\d: ")


@dataclass(frozen=True)
class Schema:
    """Names of a benchmark's fields; of each group those that a row has are used, and one of `question` it must have."""

    question: tuple[str, ...]
    passage: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    separator: str | None = None
    """What stands between several choices or answers in one field."""
    taken_apart: Callable[[str], tuple[str, tuple[str, ...]]] | None = None
    """Takes a prompt apart into the question and its choices."""


def _mmlu_prompt(text: str) -> tuple[str, tuple[str, ...]]:
    question, *choices = _LETTER.split(_MMLU_HEADER.sub("", text).removesuffix("Answer:").rstrip())
    return question, tuple(choices)


def _numbered_prompt(text: str) -> tuple[str, tuple[str, ...]]:
    """`Please choose ..: QUESTION` with `Answer1: .. Answer2: ..` below it and a line on the format."""
    text = text.split("\n\nAnswer format:")[0]
    question, *choices = _NUMBERED.split(text)
    return re.sub(r"\APlease [^:\n]*: ", "", question).strip(), tuple(choice.strip() for choice in choices)


SCHEMAS: dict[str, Schema] = {
    "arc": Schema(("question",), choices=("choices.text",)),
    "bbh": Schema(("input",), answers=("target",)),
    "click": Schema(("question",), ("paragraph",), ("choices",), ("answer",)),
    "gsm8k": Schema(("question",), answers=("answer",)),
    "haerae": Schema(("query", "question"), choices=("options", "o1", "o2", "o3", "o4", "o5")),
    "hellaswag": Schema(("ctx", "ctx_a"), choices=("endings",)),
    "humaneval": Schema(("prompt",), answers=("canonical_solution",)),
    "ifeval": Schema(("prompt",)),
    "kmmlu": Schema(("question",), choices=("A", "B", "C", "D")),
    "kobest_boolq": Schema(("Question", "question"), ("Text", "paragraph")),
    "kobest_copa": Schema(("sentence", "premise"), choices=("1", "2", "alternative_1", "alternative_2")),
    "kobest_hellaswag": Schema(
        ("context",), choices=("choice1", "choice2", "choice3", "choice4", "ending_1", "ending_2", "ending_3", "ending_4")
    ),
    "kobest_sentineg": Schema(("Text", "sentence"), choices=("Text_origin",)),
    "kobest_wic": Schema(("context_1", "SENTENCE1"), choices=("context_2", "SENTENCE2")),
    "kornat": Schema(("Question",), choices=("A", "B", "C", "D", "E")),
    "kornlu_nli": Schema(("sentence1", "premise"), choices=("sentence2", "hypothesis")),
    "kornlu_sts": Schema(("sentence1",), choices=("sentence2",)),
    "logickor": Schema(("questions", "turns"), answers=("references",)),
    "mmlu": Schema(("question",), choices=("choices", "A", "B", "C", "D")),
    "mmlu_prompts": Schema(("input",), taken_apart=_mmlu_prompt),
    "mt_bench": Schema(("turns",), answers=("reference",)),
    "numbered_choices": Schema(("instruction",), taken_apart=_numbered_prompt),
    "openbookqa": Schema(("question_stem",), choices=("choices.text",)),
    "truthfulqa": Schema(("Question",), answers=("Best Answer", "Correct Answers", "Incorrect Answers"), separator="; "),
    "truthfulqa_mc": Schema(("question",), answers=("mc1_targets", "mc2_targets")),
}
"""Benchmarks by name: the publishers' files and the hub's columns, which are told apart by the fields a row has."""


def _texts(value: Any, separator: str | None = None) -> Iterator[str]:
    """All texts of a field: itself, those of a list, of `text` or `choices` inside, or an object's keys (text: right or wrong)."""
    if isinstance(value, list):
        for item in value:
            yield from _texts(item, separator)
    elif isinstance(value, dict):
        yield from _texts(value.get("text", value.get("choices", list(value))), separator)
    elif (text := scalar(value)) is not None and text.strip():
        yield from (part.strip() for part in (text.split(separator) if separator else [text]))


def _fields(value: Any, names: tuple[str, ...], separator: str | None = None) -> tuple[str, ...]:
    return tuple(text for name in names for text in _texts(lookup(value, name), separator))


def _item(value: Any, schema: Schema, where: str) -> EvaluationItem | Drop:
    asked = next((texts for name in schema.question if (texts := _fields(value, (name,)))), ())
    if not asked:
        if isinstance(value, dict) and any(name in value for name in schema.question):
            return Drop("empty_question", where)
        raise missing(value, *schema.question)
    question, choices = "\n".join(asked), _fields(value, schema.choices, schema.separator)
    if schema.taken_apart is not None:
        question, choices = schema.taken_apart(question)
    passage = "\n".join(_fields(value, schema.passage))
    return EvaluationItem(question, where, passage, choices, _fields(value, schema.answers, schema.separator))


def _known(schema: Schema) -> Adapter:
    def convert(value: Any, source: SourceSpec, where: str) -> EvaluationItem | Drop:
        return _item(value, schema, where)

    question = " or ".join(f"`{name}`" for name in schema.question)
    fields = frozenset(name.split(".")[0] for name in (*schema.question, *schema.passage, *schema.choices, *schema.answers))
    meaning = f"The benchmark as published; the question is in {question}."
    return Adapter("evaluation", guarded(convert), TABLES, meaning=meaning, reads=lambda source: Reads(fields))


def _named(source: SourceSpec, option: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    given = source.options.get(option, list(default))
    return tuple(map(str, given if isinstance(given, list) else [given]))


def _by_options(value: Any, source: SourceSpec, where: str) -> EvaluationItem | Drop:
    """Items of a benchmark whose fields the options name."""
    passage, choices, answers = (_named(source, name) for name in ("passage", "choices", "answers"))
    return _item(value, Schema(_named(source, "question", ("question",)), passage, choices, answers), where)


ADAPTERS: dict[str, Adapter] = {
    "evaluation": Adapter(
        "evaluation",
        guarded(_by_options),
        TABLES,
        {
            "question": Option(NAMES, "field with the question", "question"),
            "passage": Option(NAMES, "field with the text that the question is about"),
            "choices": Option(NAMES, "fields with the choices"),
            "answers": Option(NAMES, "fields with the answers"),
        },
        meaning=described(_by_options),
    ),
    **{name: _known(schema) for name, schema in SCHEMAS.items()},
}
