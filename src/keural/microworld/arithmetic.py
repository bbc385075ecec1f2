"""Arithmetic in words and in digits: small sums, up to twenty or of numbers up to twelve, and sums of numbers from twenty to 79
without a carry.
"""

from functools import cache, partial
from random import Random

from keural.microworld import english, korean
from keural.microworld.content import Question, Split, Sum, is_held_out, sums
from keural.microworld.exercise import Answer, Exercise, Language, Task, korean_prompt

# {a} and {b} are the operands, {c} their total; {b은} is b with the particle that fits.
_KOREAN_FRAMES = (
    ("{a} 더하기 {b은} 뭐예요?", "{a} 더하기 {b은} 뭐야?"),
    ("{a}에 {b을} 더하면 얼마예요?", "{a}에 {b을} 더하면 얼마야?"),
    ("{a과} {b의} 합을 알려 주세요.", "{a과} {b의} 합을 알려 줘."),
)
_KOREAN_SHORT = "{a} 더하기 {b은}?"
_KOREAN_STATEMENTS = ("{a} 더하기 {b은} {c이다}.", "{a}에 {b을} 더하면 {c이다}.", "{a과} {b의} 합은 {c이다}.")
_ENGLISH_FRAMES = (
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "Add {b} to {a}.",
    "What is the sum of {a} and {b}?",
    "{a} plus {b}?",
)
_ENGLISH_STATEMENTS = ("So {a} plus {b} is {c}.", "The sum of {a} and {b} is {c}.", "If you add {b} to {a}, you get {c}.")
_EQUATION = "{a} + {b} = {c}."
_SHORTEST_SHARE = 0.5
"""Of statements in the first, shortest form, which has the most sums for its tokens; in digits it is an equation."""
_STATEMENTS = 3
"""Of a text."""
_BARE = ("{a} + {b}?", "{a} + {b} = ?", "{a} + {b} =", "{a}+{b}")
"""In digits, in no language: the answer is the number."""

_SMALL_SHARE: dict[Split, float] = {"train": 0.5, "heldout": 0.3}
"""Of small sums: a hundred facts to be learnt one by one, which takes longer than the few digits that the others are of."""
_DIGITS_SHARE: dict[Split, float] = {"train": 0.35, "heldout": 0.25}
"""Of sums in digits, where one and the same digit stands for tens and for ones."""
_SHORT_SHARE = 0.2
_BARE_SHARE = 0.3
"""Of English sums in digits."""
_HASTE_SHARE = 0.2
"""Of questions without a mark at their end; and of English ones without a capital."""


@cache
def _small() -> tuple[Sum, ...]:
    return tuple(content for content in sums("train") if content.is_small)


@cache
def _large(split: Split) -> tuple[Sum, ...]:
    return tuple(content for content in sums(split) if not content.is_small)


def _is_small(rng: Random, split: Split) -> bool:
    """Whether a small sum is drawn."""
    return rng.random() < _SMALL_SHARE[split]


def _draw(rng: Random, split: Split, small: bool) -> tuple[int, int, int]:
    """Operands in either order, and their total; small ones are learnt by heart, so that both splits have all of them."""
    content = rng.choice(_small() if small else _large(split))
    one, other = rng.sample([content.first, content.second], 2)
    return one, other, content.total


def _korean(frame: str, a: int, b: int, c: int = 1, digits: bool = False) -> str:
    """A frame filled in; particles follow how numbers are read, also where they stand in digits."""

    def written(value: int, read: str) -> str:
        return str(value) + read.removeprefix(korean.number(value)) if digits else read

    def with_particle(value: int, particle: str) -> str:
        return written(value, korean.with_particle(korean.number(value), particle))

    forms = {
        "a": written(a, korean.number(a)),
        "b": written(b, korean.number(b)),
        "a과": with_particle(a, "과"),
        "b은": with_particle(b, "은"),
        "b을": with_particle(b, "을"),
        "b의": written(b, korean.number(b) + "의"),
        "c": written(c, korean.number(c)),
        "c이다": written(c, korean.plain_noun(korean.number(c))),
    }
    return frame.format_map(forms)


def _english(frame: str, a: int, b: int, c: int = 1, digits: bool = False) -> str:
    one, other, total = (str(value) if digits else english.number(value) for value in (a, b, c))
    return frame.format(a=one, b=other, c=total)


def _in_haste(rng: Random, prompt: str) -> str:
    """A question as it is, or as it is typed in haste."""
    if rng.random() < _HASTE_SHARE:
        prompt = prompt[0].lower() + prompt[1:]
    return prompt.rstrip("?.") if rng.random() < _HASTE_SHARE else prompt


def _wrong_results(rng: Random, right: int) -> tuple[int, ...]:
    """Numbers that miss the result by one in one digit."""
    near = [right + step for step in (-10, -1, 1, 10) if 1 <= right + step <= 99]
    return tuple(rng.sample(near, 2))


def _korean_answer(value: int, digits: bool) -> Answer:
    word = korean.number(value)
    polite, blunt = (korean.is_noun(word, polite).removeprefix(word) for polite in (True, False))
    written = str(value) if digits else word
    return Answer(f"{written}{polite}.", f"{written}{blunt}.")


def _exercise(rng: Random, split: Split, language: Language, small: bool | None = None) -> Exercise:
    """A question, about a small sum or not as `small` says; of small sums every one, in its words, is of one split alone."""
    small = _is_small(rng, split) if small is None else small
    while True:
        exercise = _drawn(rng, split, language, small)
        if not small or is_held_out(Question(exercise.prompt)) == (split == "heldout"):
            return exercise


def _drawn(rng: Random, split: Split, language: Language, small: bool) -> Exercise:
    a, b, c = _draw(rng, split, small)
    digits = rng.random() < _DIGITS_SHARE[split]
    results = (c, *_wrong_results(rng, c))
    if language == "ko":
        frame, polite = (_KOREAN_SHORT, True) if rng.random() < _SHORT_SHARE else korean_prompt(rng, _KOREAN_FRAMES)
        answers = [_korean_answer(value, digits) for value in results]
        prompt = _in_haste(rng, _korean(frame, a, b, digits=digits))
        return Exercise("arithmetic", language, prompt, polite, answers[0], tuple(answers[1:]))
    if digits and rng.random() < _BARE_SHARE:
        prompt = _english(rng.choice(_BARE), a, b, digits=True)
        answers = [Answer.english(f"{value}.") for value in results]
    else:
        prompt = _in_haste(rng, _english(rng.choice(_ENGLISH_FRAMES), a, b, digits=digits))
        answers = [Answer.english(f"It is {value if digits else english.number(value)}.") for value in results]
    return Exercise("arithmetic", language, prompt, True, answers[0], tuple(answers[1:]))


def _statement(rng: Random, language: Language, content: tuple[int, int, int], digits: bool) -> str:
    frames = _KOREAN_STATEMENTS if language == "ko" else _ENGLISH_STATEMENTS
    frame = (_EQUATION if digits else frames[0]) if rng.random() < _SHORTEST_SHARE else rng.choice(frames)
    return (_korean if language == "ko" else _english)(frame, *content, digits)


def _prose(rng: Random, split: Split, language: Language, parallel: bool, small: bool | None = None) -> str:
    """Some statements about different content; in parallel texts one in both languages."""
    digits = rng.random() < _DIGITS_SHARE[split]

    def draw() -> tuple[int, int, int]:
        return _draw(rng, split, _is_small(rng, split) if small is None else small)

    if parallel:
        content = draw()
        other: Language = "en" if language == "ko" else "ko"
        return f"{_statement(rng, language, content, digits)} {_statement(rng, other, content, digits)}"
    return " ".join(_statement(rng, language, draw(), digits) for _ in range(_STATEMENTS))


ARITHMETIC = Task("arithmetic", _exercise, _prose)
SMALL_SUMS, LARGE_SUMS = (
    Task("arithmetic", partial(_exercise, small=small), partial(_prose, small=small)) for small in (True, False)
)
