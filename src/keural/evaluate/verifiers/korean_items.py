"""Items of the Korean instructions: a wish in Korean with one to three instructions, each in one of several phrasings.

In: a number and a seed. Out: prompts with their instructions, the same for the same seed in every version of Python. No file is
needed; the wishes, words and phrasings are in `korean_phrasings.yaml`.
"""

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.evaluate.verifiers.base import Instruction, parse_instructions
from keural.evaluate.verifiers.korean import KOREAN
from keural.files import read_yaml
from keural.microworld.korean import ends_in_consonant

PHRASINGS = Path(__file__).with_name("korean_phrasings.yaml")
_RELATIONS = {"at least": "이상", "at most": "이하", "exactly": "정확히"}


@dataclass(frozen=True)
class KoreanItem:
    """A prompt, and what its answer must follow."""

    prompt: str
    instructions: tuple[Instruction, ...]


def korean_items(count: int, seed: int) -> list[KoreanItem]:
    """`count` different items in which every kind of `KOREAN` comes equally often as the first, one to three instructions each."""
    rng = random.Random(seed)
    kinds = sorted(KOREAN)
    items: dict[str, KoreanItem] = {}
    while len(items) < count:
        item = _item(rng, kinds[len(items) % len(kinds)])
        items.setdefault(item.prompt, item)
    return list(items.values())


def _item(rng: random.Random, first: str) -> KoreanItem:
    table = _phrasings()
    chosen = [first]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        fitting = [kind for kind in sorted(KOREAN) if all(_fit(kind, other) for other in chosen)]
        if fitting:
            chosen.append(rng.choice(fitting))
    wishes = table["questions"] if "form:one_of" in chosen else table["wishes"]
    arguments = [_ARGUMENTS[kind](rng, table) if kind in _ARGUMENTS else {} for kind in chosen]
    instructions = parse_instructions(KOREAN, chosen, arguments, "ko_instructions")
    told = [_told(rng.choice(table["phrasings"][one.kind]), one.arguments) for one in instructions]
    return KoreanItem(" ".join([rng.choice(wishes), *told]), instructions)


@functools.cache
def _phrasings() -> Any:
    return read_yaml(PHRASINGS)


def _told(phrasing: str, arguments: Any) -> str:
    """The sentence in which an instruction is given."""
    shown = {
        name: ", ".join(f"'{part}'" for part in value) if isinstance(value, tuple) else value for name, value in arguments.items()
    }
    if "relation" in shown:
        shown["amount"] = f"정확히 {shown['count']}" if shown["relation"] == "exactly" else shown["count"]
        shown["bound"] = "" if shown["relation"] == "exactly" else f" {_RELATIONS[shown['relation']]}"
    if "with_spaces" in shown:
        shown["spaces"] = "공백을 포함하여" if shown["with_spaces"] else "공백을 빼고"
    return _PARTICLE.sub(_particle, phrasing.format(**shown))


_PARTICLE = re.compile(r"([가-힣])(['.]{0,2})(\(으\)로|\(이\)라는|\(이\)어야|이\(가\)|을\(를\))")
_FORMS = {
    "(으)로": ("으로", "로"),
    "(이)라는": ("이라는", "라는"),
    "(이)어야": ("이어야", "여야"),
    "이(가)": ("이", "가"),
    "을(를)": ("을", "를"),
}
_RIEUL = 8


def _particle(match: re.Match[str]) -> str:
    """The particle that fits the syllable before it, marks between them aside."""
    before, marks, particle = match.groups()
    after_consonant, after_vowel = _FORMS[particle]
    closed = ends_in_consonant(before) and not (particle == "(으)로" and (ord(before) - ord("가")) % 28 == _RIEUL)
    return before + marks + (after_consonant if closed else after_vowel)


_GROUPS: dict[str, set[str]] = {
    "whole": {"form:json", "form:one_of", "form:acrostic", "form:table"},
    "lines": {
        "length:lines",
        "length:paragraphs",
        "form:acrostic",
        "form:bullets",
        "form:numbered",
        "form:sections",
        "form:table",
        "form:two_answers",
        "form:title_line",
        "place:postscript",
        "form:title",
    },
    "level": {kind for kind in KOREAN if kind.startswith("speech:")},
    "length": {kind for kind in KOREAN if kind.startswith("length:")},
    "start": {
        "place:start_phrase",
        "marks:quoted",
        "form:title",
        "form:title_line",
        "form:bullets",
        "form:numbered",
        "form:sections",
        "form:acrostic",
        "form:json",
        "form:table",
        "form:one_of",
    },
    "end": {
        "place:end_phrase",
        "place:postscript",
        "place:last_is_question",
        "marks:quoted",
        "form:acrostic",
        "form:json",
        "form:table",
        "form:one_of",
        "speech:ending",
        "form:two_answers",
        "form:placeholders",
    },
    "digits": {"script:no_digits", "form:numbered", "form:sections"},
    "nouns": {
        "speech:polite",
        "speech:casual",
        "speech:haeyo",
        "speech:hapsyo",
        "speech:plain",
        "speech:ending",
        "form:table",
        "form:json",
        "form:one_of",
    },
    "fixed": {
        "speech:hapsyo",
        "speech:casual",
        "speech:plain",
        "speech:haeyo",
        "speech:polite",
        "speech:ending",
        "place:end_phrase",
        "place:start_phrase",
    },
}
"""Kinds of which an answer can hardly follow two."""


def _fit(kind: str, other: str) -> bool:
    if kind == other or "form:one_of" in (kind, other):
        return False
    return not any(kind in group and other in group for group in _GROUPS.values())


def _counted(low: int, high: int, step: int, relations: Sequence[str]) -> Callable[[random.Random, Any], dict[str, Any]]:
    return lambda rng, table: {"count": rng.randrange(low, high + 1, step), "relation": rng.choice(relations)}


def _number(name: str, low: int, high: int) -> Callable[[random.Random, Any], dict[str, Any]]:
    return lambda rng, table: {name: rng.randint(low, high)}


def _word(name: str, words: str) -> Callable[[random.Random, Any], dict[str, Any]]:
    return lambda rng, table: {name: rng.choice(table[words])}


def _several(name: str, words: str, low: int, high: int) -> Callable[[random.Random, Any], dict[str, Any]]:
    return lambda rng, table: {name: rng.sample(table[words], rng.randint(low, high))}


_ARGUMENTS: dict[str, Callable[[random.Random, Any], dict[str, Any]]] = {
    "length:characters": lambda rng, table: {
        "count": rng.randrange(50, 301, 50),
        "relation": rng.choice(("at least", "at most")),
        "with_spaces": rng.random() < 0.5,
    },
    "length:words": _counted(10, 60, 10, ("at least", "at most")),
    "length:sentences": _counted(2, 6, 1, ("at least", "at most", "exactly")),
    "length:paragraphs": _number("count", 2, 4),
    "length:lines": _number("count", 2, 6),
    "speech:ending": _word("ending", "endings"),
    "words:forbidden": _several("words", "common", 1, 3),
    "words:required": _several("words", "common", 1, 3),
    "words:frequency": lambda rng, table: {
        "word": rng.choice(table["common"]),
        "count": rng.randint(2, 4),
        "relation": rng.choice(("at least", "exactly")),
    },
    "form:bullets": _number("count", 2, 6),
    "form:numbered": _number("count", 2, 6),
    "form:json": _several("keys", "keys", 2, 4),
    "form:title_line": lambda rng, table: {"word": "제목"},
    "form:table": lambda rng, table: {"columns": rng.randint(2, 3), "rows": rng.randint(2, 4)},
    "form:sections": lambda rng, table: {"word": rng.choice(table["section_words"]), "count": rng.randint(2, 4)},
    "form:highlights": _number("num_highlights", 1, 4),
    "form:placeholders": _number("num_placeholders", 1, 4),
    "form:one_of": lambda rng, table: {"options": rng.choice(table["options"])},
    "form:acrostic": _word("word", "acrostics"),
    "place:start_phrase": _word("phrase", "starts"),
    "place:end_phrase": _word("phrase", "ends"),
    "place:postscript": _word("marker", "markers"),
}
"""How the arguments of a kind are drawn; kinds without any are not here."""
