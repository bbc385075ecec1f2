"""Rows of benchmarks: what is asked, the passage, the choices and the answers, and which of them is right.

They are looked for in training data (`data.decontaminate`) and asked (`keural.evaluate.tasks`), by the same table, so that what is
measured and what is looked for are never different things; a stage cannot train on them. A benchmark that is not here is read by
`evaluation` with options that name its fields.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from keural.data.adapters.base import TABLES, Adapter, Reads, described, guarded, lookup, missing, plain, scalar
from keural.data.readers.options import NAME, NAMES, TEXT, Option
from keural.data.records import Drop, EvaluationItem
from keural.recipe import SourceSpec

_MMLU_HEADER = re.compile(r"\AThe following are multiple choice questions.*?\n\n", re.S)
_LETTER = re.compile(r"\n[A-E]\. ")
_CHOICE_LINE = re.compile(r"\s*([A-J])[:.)]\s(.*)")
_NUMBERED = re.compile(r"(?:Answer|Ending|Solution|Option)\d: ")


@dataclass(frozen=True)
class Gold:
    """A field that says which choice is right: by a value that stands for its number, or by one that stands there `among` those of
    another field.
    """

    name: str
    values: Mapping[str, int] = field(default_factory=dict)
    among: tuple[str, ...] = ()


def _numbers(first: int, count: int = 10) -> dict[str, int]:
    """Choices numbered from `first` on."""
    return {str(first + number): number for number in range(count)}


LETTERS = {letter: number for number, letter in enumerate("ABCDEFGHIJ")}
_TRUTHS = {"False": 0, "FALSE": 0, "false": 0, "True": 1, "TRUE": 1, "true": 1}
_NLI = {"entailment": 0, "neutral": 1, "contradiction": 2}


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
    gold: tuple[Gold, ...] = ()
    """The first whose field a row has says which choice is right."""
    labelled: Mapping[str, str] = field(default_factory=dict)
    """By name, fields that hold answers with whether they are right: `{text: 1 or 0}`, or `choices` and `labels`."""
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What else a question is asked with, by name: the first of these fields that a row has."""
    verbatim: Mapping[str, str] = field(default_factory=dict)
    """Fields that are passed on as they stand, by name: white space belongs to a program. What is no text is written as JSON."""

    def names(self) -> frozenset[str]:
        """Every field that is read."""
        groups = (
            *self.question,
            *self.passage,
            *self.choices,
            *self.answers,
            *(name for each in self.fields.values() for name in each),
        )
        gold = (name for each in self.gold for name in (each.name, *each.among))
        return frozenset(name.split(".")[0] for name in (*groups, *gold, *self.labelled.values(), *self.verbatim.values()))


def _mmlu_prompt(text: str) -> tuple[str, tuple[str, ...]]:
    question, *choices = _LETTER.split(_MMLU_HEADER.sub("", text).removesuffix("Answer:").rstrip())
    return question, tuple(choices)


def _kobalt_prompt(text: str) -> tuple[str, tuple[str, ...]]:
    """A question with its choices below it, `A: .. B: ..` a line each; another letter than the next is text."""
    asked, *lines = text.split("\n")
    choices: list[str] = []
    for line in lines:
        found = _CHOICE_LINE.fullmatch(line)
        if found is not None and len(choices) < len(LETTERS) and LETTERS[found[1]] == len(choices):
            choices.append(found[2])
        elif choices:
            choices[-1] += f"\n{line}"
        else:
            asked += f"\n{line}"
    return asked.strip(), tuple(choice.strip() for choice in choices)


def _numbered_prompt(text: str) -> tuple[str, tuple[str, ...]]:
    """`Please choose ..: QUESTION` with `Answer1: .. Answer2: ..` below it and a line on the format."""
    text = text.split("\n\nAnswer format:")[0]
    question, *choices = _NUMBERED.split(text)
    return re.sub(r"\APlease [^:\n]*: ", "", question).strip(), tuple(choice.strip() for choice in choices)


SCHEMAS: dict[str, Schema] = {
    "arc": Schema(("question",), choices=("choices.text",), gold=(Gold("answerKey", among=("choices.label",)),)),
    "bbh": Schema(("input",), answers=("target",)),
    "click": Schema(
        ("question",),
        ("paragraph",),
        ("choices",),
        ("answer",),
        gold=(Gold("answer", among=("choices",)),),
        fields={"id": ("id",)},
        verbatim={"asked": "question", "context": "paragraph"},
    ),
    "gsm8k": Schema(("question",), answers=("answer",), verbatim={"asked": "question"}),
    "haerae": Schema(
        ("query", "question"),
        choices=("options", "o1", "o2", "o3", "o4", "o5"),
        gold=(Gold("answer", {**LETTERS, **{f"({letter})": number for letter, number in LETTERS.items()}}),),
        verbatim={"asked": "query"},
    ),
    "hellaswag": Schema(("ctx", "ctx_a"), choices=("endings",), gold=(Gold("label", _numbers(0)),)),
    "humaneval": Schema(
        ("prompt",),
        answers=("canonical_solution",),
        verbatim={"program": "prompt", "test": "test", "entry_point": "entry_point"},
    ),
    "ifeval": Schema(("prompt",), verbatim={"instructions": "instruction_id_list", "arguments": "kwargs"}),
    "kmmlu": Schema(
        ("question",),
        choices=("A", "B", "C", "D"),
        gold=(Gold("answer", _numbers(1)),),
        fields={"subject": ("Category", "category")},
    ),
    "kobest_boolq": Schema(
        ("Question", "question"), ("Text", "paragraph"), gold=(Gold("Answer", _TRUTHS), Gold("label", _numbers(0, 2)))
    ),
    "kobest_copa": Schema(
        ("sentence", "premise"),
        choices=("1", "2", "alternative_1", "alternative_2"),
        gold=(Gold("Answer", _numbers(1, 2)), Gold("label", _numbers(0, 2))),
        fields={"relation": ("question",)},
    ),
    "kobest_hellaswag": Schema(
        ("context",),
        choices=("choice1", "choice2", "choice3", "choice4", "ending_1", "ending_2", "ending_3", "ending_4"),
        gold=(Gold("label", _numbers(0, 4)),),
    ),
    "kobest_sentineg": Schema(
        ("Text", "sentence"),
        choices=("Text_origin",),
        gold=(Gold("Label", _numbers(0, 2)), Gold("label", _numbers(0, 2))),
    ),
    "kobest_wic": Schema(
        ("context_1", "SENTENCE1"),
        choices=("context_2", "SENTENCE2"),
        gold=(Gold("ANSWER", _TRUTHS), Gold("label", _numbers(0, 2))),
        fields={"second": ("context_2", "SENTENCE2"), "word": ("word", "Target")},
    ),
    "kobalt": Schema(
        ("Question",), taken_apart=_kobalt_prompt, gold=(Gold("Answer", LETTERS),), fields={"subject": ("Class",), "id": ("ID",)}
    ),
    "kosimpleqa": Schema(("content",), answers=("answer",), fields={"subject": ("category",), "answer_type": ("answer_type",)}),
    "kornat": Schema(("Question",), choices=("A", "B", "C", "D", "E")),
    "kornlu_nli": Schema(
        ("sentence1", "premise"),
        choices=("sentence2", "hypothesis"),
        gold=(Gold("gold_label", _NLI), Gold("label", _numbers(0, 3) | _NLI)),
        fields={"hypothesis": ("sentence2", "hypothesis")},
    ),
    "kornlu_sts": Schema(("sentence1",), choices=("sentence2",)),
    "logickor": Schema(("questions", "turns"), answers=("references",)),
    "mmlu": Schema(
        ("question",),
        choices=("choices", "A", "B", "C", "D"),
        gold=(Gold("answer", _numbers(0, 4) | LETTERS),),
        fields={"subject": ("subject",)},
    ),
    "mmlu_prompts": Schema(("input",), taken_apart=_mmlu_prompt, gold=(Gold("output", LETTERS),), fields={"subject": ("subject",)}),
    "mt_bench": Schema(("turns",), answers=("reference",)),
    "numbered_choices": Schema(
        ("instruction",),
        taken_apart=_numbered_prompt,
        gold=(Gold("answer", {f"answer{number + 1}": number for number in range(10)}),),
    ),
    "openbookqa": Schema(("question_stem",), choices=("choices.text",), gold=(Gold("answerKey", among=("choices.label",)),)),
    "truthfulqa": Schema(("Question",), answers=("Best Answer", "Correct Answers", "Incorrect Answers"), separator="; "),
    "truthfulqa_mc": Schema(
        ("question",), answers=("mc1_targets", "mc2_targets"), labelled={"mc1": "mc1_targets", "mc2": "mc2_targets"}
    ),
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
    return EvaluationItem(
        question,
        where,
        "\n".join(_fields(value, schema.passage)),
        choices,
        _fields(value, schema.answers, schema.separator),
        _gold(value, schema) if _are_whole(value, schema, choices) else None,
        tuple((name, found) for name, field in schema.labelled.items() if (found := _labelled(lookup(value, field)))),
        (
            *((name, texts[0]) for name, fields in schema.fields.items() if (texts := _fields(value, fields))),
            *((name, _verbatim(found)) for name, field in schema.verbatim.items() if (found := lookup(value, field)) is not None),
        ),
    )


def _verbatim(value: Any) -> str:
    """A field as it stands; lists and objects as JSON, arrays as lists."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)


def _gold(value: Any, schema: Schema) -> int | None:
    """The number of the right choice; None where the row does not say."""
    for gold in schema.gold:
        found = lookup(value, gold.name)
        if found is None:
            continue
        text = str(found) if isinstance(found, bool) else (scalar(found) or "").strip()
        if not gold.among:
            return gold.values.get(text)
        among = [other.strip() for other in _fields(value, gold.among)]
        return among.index(text) if text in among else None
    return None


def _are_whole(value: Any, schema: Schema, choices: tuple[str, ...]) -> bool:
    """Whether none of the choices is empty, which is left out, so that those after it have other numbers."""
    if schema.taken_apart is not None:
        return all(choices)
    found = [lookup(value, name) for name in schema.choices]
    return sum(_count(each) for each in found if each is not None) == len(choices)


def _count(value: Any) -> int:
    """How many texts `_texts` would give if none were empty."""
    if isinstance(value, list):
        return sum(map(_count, value))
    if isinstance(value, dict):
        return _count(value.get("text", value.get("choices", list(value))))
    return 1


def _labelled(value: Any) -> tuple[tuple[str, bool], ...]:
    """Answers with whether they are right; none where the field is of another form."""
    if not isinstance(value, dict):
        return ()
    if value.keys() >= {"choices", "labels"}:
        choices, labels = plain(value["choices"]), plain(value["labels"])
        pairs = list(zip(choices, labels, strict=False)) if isinstance(choices, list) and isinstance(labels, list) else []
    else:
        pairs = list(value.items())
    return tuple((text, right == 1) for text, right in pairs if isinstance(text, str) and right in (0, 1))


def _known(schema: Schema) -> Adapter:
    def convert(value: Any, source: SourceSpec, where: str) -> EvaluationItem | Drop:
        return _item(value, schema, where)

    question = " or ".join(f"`{name}`" for name in schema.question)
    fields = schema.names()
    meaning = f"The benchmark as published; the question is in {question}."
    return Adapter("evaluation", guarded(convert), TABLES, meaning=meaning, reads=lambda source: Reads(fields))


def _named(source: SourceSpec, option: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    given = source.options.get(option, list(default))
    return tuple(map(str, given if isinstance(given, list) else [given]))


def _by_options(value: Any, source: SourceSpec, where: str) -> EvaluationItem | Drop:
    """Items of a benchmark whose fields the options name."""
    passage, choices, answers, fields = (_named(source, name) for name in ("passage", "choices", "answers", "fields"))
    gold = tuple(_gold_of(source.options.get("gold_is", _GOLD_IS[0]), name, choices) for name in _named(source, "gold"))
    others = {name: (name,) for name in fields}
    return _item(
        value, Schema(_named(source, "question", ("question",)), passage, choices, answers, gold=gold, fields=others), where
    )


_GOLD_IS = ("text", "letter", "from_0", "from_1")


def _gold_of(form: str, name: str, choices: tuple[str, ...]) -> Gold:
    """A field that says which choice is right, in one of the forms of `_GOLD_IS`."""
    if form == "text":
        return Gold(name, among=choices)
    return Gold(name, LETTERS if form == "letter" else _numbers(int(form[-1])))


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
            "gold": Option(NAME, "field that says which choice is right, for those who ask the items"),
            "gold_is": Option(TEXT, "how it says so: by the choice's text, its letter or its number", _GOLD_IS[0], _GOLD_IS),
            "fields": Option(NAMES, "further fields that the items are asked with"),
        },
        meaning=described(_by_options),
    ),
    **{name: _known(schema) for name, schema in SCHEMAS.items()},
}
