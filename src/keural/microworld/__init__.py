"""The embedded bilingual micro-world: rows for the toy recipe's stages, and what is held out of them.

Five families of short tasks in Korean and English: arithmetic in words and digits, translation between the two, facts to look up in
a given text, rewriting, and small talk. Out come rows of three parts: prose for pretraining, instructions for SFT, pairs for DPO;
and held-out items and pairs for evaluation.

Held out is content (`content.py`): sums of two numbers, clauses (who does what to what), profiles (who lives where and likes what),
small talk (its wording). The words, numbers, frames and forms of held-out items all occur in training; their combination never
does, in any language, phrasing, notation, tense, register, part or option. In rows of the split "train"

* no sentence or exchange adds the two numbers of a held-out sum,
* no sentence has subject, verb and object of a held-out clause,
* no row has person, place and thing of a held-out profile,
* no one says what is held out of small talk.

Sums up to twenty, and of numbers up to twelve, are learnt by heart, as at school: all of them occur in training, in both
languages, in words and in digits. What is held out of them is questions, word for word.

Korean answers come in two registers, polite (존댓말, -요) and blunt (반말); both count as correct in the evaluation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, cast, get_args

from keural.errors import UserError, nearest
from keural.microworld.arithmetic import ARITHMETIC, LARGE_SUMS, SMALL_SUMS
from keural.microworld.clauses import REWRITING, TRANSLATION
from keural.microworld.content import Split
from keural.microworld.exercise import Answer, Exercise, Language, Task
from keural.microworld.facts import FACTS
from keural.microworld.glossary import glossary
from keural.microworld.korean import is_polite
from keural.microworld.smalltalk import PLAIN_SMALLTALK, SMALLTALK
from keural.tokenizer.message import Message

__all__ = ["DRAWN", "LANGUAGES", "TASKS", "Item", "Pair", "as_document", "heldout_items", "heldout_pairs", "is_polite", "rows"]

TASKS = {task.name: task for task in (ARITHMETIC, TRANSLATION, FACTS, REWRITING, SMALLTALK)}
DRAWN = TASKS | {"small_sums": SMALL_SUMS, "large_sums": LARGE_SUMS, "plain_smalltalk": PLAIN_SMALLTALK}
"""What rows can be about: a task, or a part of one that is to be drilled apart from the rest."""
LANGUAGES = ("ko", "en")
REGISTERS = ("mirror", "polite", "blunt")
CONTRASTS = ("wrong", "blunt")
FORMS = ("plain", "parallel", "glossary", "questions", "transcripts")

_TRIES = 200
"""Draws for each item that is to be another than all before it."""
_QUESTION_FRAMES = {
    "ko": ("질문: {prompt} 답: {answer}", "{prompt} {answer}"),
    "en": ("Question: {prompt} Answer: {answer}", "{prompt} {answer}"),
}


@dataclass(frozen=True, slots=True)
class Item:
    """A held-out question: every accepted answer, and those of them that are polite (in English: all)."""

    task: str
    language: str
    prompt: str
    answers: tuple[str, ...]
    polite_answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out preference: the turns of a prompt, the answer to prefer and the one not to."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    language: str

    @property
    def question(self) -> str:
        """What its one turn asks."""
        return self.prompt[-1].content


@dataclass(frozen=True, slots=True)
class _Options:
    """What a row is made of; the defaults are all tasks in both languages."""

    part: str
    count: int
    split: str = "train"
    phase: int = 1
    tasks: tuple[str, ...] = tuple(TASKS)
    languages: tuple[str, ...] = LANGUAGES
    forms: tuple[str, ...] = ("plain",)
    register: str = "mirror"
    contrasts: tuple[str, ...] = CONTRASTS


# Which options mean something for which part, and the values a choice has.
_PARTS: dict[str, tuple[str, ...]] = {
    "prose": ("forms",),
    "instructions": ("register",),
    "pairs": ("contrasts",),
}
_CHOICES = {
    "part": tuple(_PARTS),
    "split": get_args(Split),
    "tasks": tuple(DRAWN),
    "languages": LANGUAGES,
    "forms": FORMS,
    "register": REGISTERS,
    "contrasts": CONTRASTS,
}


def rows(options: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the micro-world, the same ones for the same options and seed.

    Args:
        options: `part` (prose, instructions, pairs) and `count`, the number of rows; and as wanted

            * `split`: train (default) or heldout,
            * `phase`: a number (default 1); stages with different phases get different rows,
            * `tasks`: list of arithmetic, translation, facts, rewriting, smalltalk (default these), and of small_sums and
              large_sums, the two parts of arithmetic, and plain_smalltalk, what stands alone; each row draws one,
            * `languages`: list of ko, en (default both; each row draws one),
            * prose: `forms`, list of plain (statements in one language), parallel (in both), glossary (words), questions (with
              their answers), transcripts (questions and answers with the role names of a chat, to train a tokenizer on); each
              row draws one,
            * instructions: `register` of Korean answers: mirror (that of the question, half are polite), polite, blunt,
            * pairs: `contrasts`, list of what the rejected answer is: wrong (in the chosen one's polite register), blunt (the right
              answer, in Korean; English rows are wrong instead); each row draws one. The chosen answer is right and polite.
        seed: of the drawing; content that is held out does not depend on it.

    Yields:
        {"text", "language"} for prose; {"messages": [{"role", "content"}, ...], "language", "task"} for instructions;
        {"messages": prompt turns, "chosen", "rejected", "language", "task"} for pairs.

    Raises:
        UserError: for an unknown option or value, naming the nearest one, or a wrong type.
    """
    wanted = _checked(options)
    rng = Random(f"microworld {wanted.part} {wanted.phase} {seed}")
    make = _MAKERS[wanted.part]
    return (make(rng, wanted) for _ in range(wanted.count))


def heldout_items(count_per_task: int, seed: int) -> list[Item]:
    """`count_per_task` different questions of each task on held-out content, half of them Korean (the larger half of an odd
    number).

    Half of the Korean ones are asked politely. Raises `UserError` when there are not that many.
    """
    rng = Random(f"microworld items {seed}")
    items = []
    for task in TASKS.values():
        for language, count in zip(LANGUAGES, (count_per_task - count_per_task // 2, count_per_task // 2), strict=True):
            items += [_item(exercise) for exercise in _distinct(rng, task, cast(Language, language), count)]
    return items


def heldout_pairs(count: int, seed: int) -> list[Pair]:
    """`count` different preference pairs on held-out content, tasks and languages in turn; half of the Korean rejected ones are
    blunt.

    Raises `UserError` when there are not that many.
    """
    rng = Random(f"microworld heldout pairs {seed}")
    kinds = [(task, language) for language in LANGUAGES for task in TASKS]
    pairs: dict[Pair, None] = {}
    for index in range(count):
        task, language = kinds[index % len(kinds)]
        contrast = CONTRASTS[index // len(kinds) % 2]
        for _ in range(_TRIES):
            exercise = TASKS[task].exercise(rng, "heldout", cast(Language, language))
            rejected = _rejected(rng, exercise, contrast)
            pair = Pair((Message("user", exercise.prompt),), exercise.right.polite, rejected, language)
            if pair not in pairs:
                pairs[pair] = None
                break
        else:
            raise UserError(f"the micro-world has fewer than {count} held-out pairs; ask for fewer pairs")
    return list(pairs)


def as_document(prompt: str, language: str) -> str:
    """The beginning of a document that asks a question, up to where its answer would follow; the form `questions` of prose."""
    return _QUESTION_FRAMES[language][0].partition(" {answer}")[0].format(prompt=prompt)


def _distinct(rng: Random, task: Task, language: Language, count: int) -> list[Exercise]:
    """`count` exercises on held-out content with different prompts, both registers of Korean questions alike."""
    found: dict[str, Exercise] = {}
    room = {True: count - count // 2, False: count // 2} if language == "ko" else {True: count}
    for _ in range(_TRIES * count):
        exercise = task.exercise(rng, "heldout", language)
        if exercise.prompt not in found and room.get(exercise.polite, 0):
            found[exercise.prompt] = exercise
            room[exercise.polite] -= 1
        if len(found) == count:
            return list(found.values())
    if count == 0:
        return []
    raise UserError(
        f"the micro-world has fewer than {count} held-out questions of task {task.name!r} in {language!r}; ask for fewer items"
    )


def _item(exercise: Exercise) -> Item:
    right = exercise.right
    answers = (right.polite,) if right.polite == right.blunt else (right.polite, right.blunt)
    return Item(exercise.task, exercise.language, exercise.prompt, answers, (right.polite,))


def _exercise(rng: Random, options: _Options) -> Exercise:
    task, language = DRAWN[rng.choice(options.tasks)], rng.choice(options.languages)
    return task.exercise(rng, cast(Split, options.split), cast(Language, language))


def _prose_row(rng: Random, options: _Options) -> dict[str, Any]:
    form = rng.choice(options.forms)
    if form in ("questions", "transcripts"):
        exercise = _exercise(rng, options)
        answer = exercise.right.text(exercise.polite)
        frame = rng.choice(_QUESTION_FRAMES[exercise.language]) if form == "questions" else "user\n{prompt}\nassistant\n{answer}"
        return {"text": frame.format(prompt=exercise.prompt, answer=answer), "language": exercise.language}
    language = rng.choice(options.languages)
    if form == "glossary":
        return {"text": glossary(rng, language), "language": language}
    task = DRAWN[rng.choice(options.tasks)]
    text = task.prose(rng, cast(Split, options.split), cast(Language, language), form == "parallel")
    return {"text": text, "language": language}


def _instruction_row(rng: Random, options: _Options) -> dict[str, Any]:
    exercise = _exercise(rng, options)
    polite = exercise.polite if options.register == "mirror" else options.register == "polite"
    messages = [
        {"role": "user", "content": exercise.prompt},
        {"role": "assistant", "content": exercise.right.text(polite)},
    ]
    return {"messages": messages, "language": exercise.language, "task": exercise.task}


def _pair_row(rng: Random, options: _Options) -> dict[str, Any]:
    exercise = _exercise(rng, options)
    rejected = _rejected(rng, exercise, rng.choice(options.contrasts))
    return {
        "messages": [{"role": "user", "content": exercise.prompt}],
        "chosen": exercise.right.polite,
        "rejected": rejected,
        "language": exercise.language,
        "task": exercise.task,
    }


def _rejected(rng: Random, exercise: Exercise, contrast: str) -> str:
    """The right answer but blunt where the language has registers and the contrast asks for it, else a polite wrong one."""
    if contrast == "blunt" and exercise.language == "ko":
        return exercise.right.blunt
    wrong: Answer = rng.choice(exercise.wrong)
    return wrong.polite


_MAKERS: dict[str, Callable[[Random, _Options], dict[str, Any]]] = {
    "prose": _prose_row,
    "instructions": _instruction_row,
    "pairs": _pair_row,
}


def _checked(options: Mapping[str, Any]) -> _Options:
    for name in ("part", "count"):
        if name not in options:
            raise UserError(f"micro-world: option {name!r} is missing")
    part = _choice("part", options["part"])
    known = ["part", "count", "split", "phase", "tasks", "languages", *_PARTS[part]]
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"micro-world: unknown option {name!r} of part {part!r}{nearest(name, known)}; it has {', '.join(known)}"
            )
        values[name] = _number(name, value) if name in ("count", "phase") else _value(name, value)
    return _Options(**values)


def _number(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"micro-world: option {name!r} must be a whole number of at least 1, got {value!r}")
    return value


def _value(name: str, value: Any) -> str | tuple[str, ...]:
    if name in ("part", "split", "register"):
        return _choice(name, value)
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"micro-world: option {name!r} must be a list of {', '.join(_CHOICES[name])}, got {value!r}")
    return tuple(_choice(name, entry) for entry in value)


def _choice(name: str, value: Any) -> str:
    if value not in _CHOICES[name]:
        raise UserError(
            f"micro-world: option {name!r} has no value {value!r}{nearest(str(value), _CHOICES[name])}; "
            f"it takes {', '.join(_CHOICES[name])}"
        )
    return cast(str, value)
