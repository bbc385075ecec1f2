"""Arithmetic in words: sums of two-digit numbers without a carry."""

from random import Random

from keural.microworld import english, korean
from keural.microworld.content import Split, Sum, sums
from keural.microworld.exercise import Answer, Exercise, Language, Task, korean_prompt

# {a} and {b} are the operands, {c} their total; {b은} is b with the particle that fits.
_KOREAN_FRAMES = (
    ("{a} 더하기 {b은} 뭐예요?", "{a} 더하기 {b은} 뭐야?"),
    ("{a}에 {b을} 더하면 얼마예요?", "{a}에 {b을} 더하면 얼마야?"),
    ("{a과} {b의} 합을 알려 주세요.", "{a과} {b의} 합을 알려 줘."),
)
_KOREAN_STATEMENTS = ("{a} 더하기 {b은} {c이다}.", "{a}에 {b을} 더하면 {c이다}.", "{a과} {b의} 합은 {c이다}.")
_ENGLISH_FRAMES = ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {b} to {a}.", "What is the sum of {a} and {b}?")
_ENGLISH_STATEMENTS = ("The sum of {a} and {b} is {c}.", "If you add {b} to {a}, you get {c}.", "We know that {a} plus {b} is {c}.")


def _draw(rng: Random, split: Split) -> tuple[int, int, int]:
    """Operands in either order, and their total."""
    content: Sum = rng.choice(sums(split))
    one, other = rng.sample([content.first, content.second], 2)
    return one, other, content.total


def _korean(frame: str, a: int, b: int, c: int = 0) -> str:
    words = {"a": korean.number(a), "b": korean.number(b)}
    forms = words | {
        "a과": korean.with_particle(words["a"], "과"),
        "b은": korean.with_particle(words["b"], "은"),
        "b을": korean.with_particle(words["b"], "을"),
        "b의": words["b"] + "의",
        "c이다": korean.plain_noun(korean.number(c)) if c else "",
    }
    return frame.format_map(forms)


def _english(frame: str, a: int, b: int, c: int = 20) -> str:
    return frame.format(a=english.number(a), b=english.number(b), c=english.number(c))


def _wrong_results(rng: Random, right: int) -> tuple[int, ...]:
    """Numbers that miss the result by one in one digit."""
    near = [right + step for step in (-10, -1, 1, 10) if 20 <= right + step <= 99]
    return tuple(rng.sample(near, 2))


def _exercise(rng: Random, split: Split, language: Language) -> Exercise:
    a, b, c = _draw(rng, split)
    results = (c, *_wrong_results(rng, c))
    if language == "ko":
        frame, polite = korean_prompt(rng, _KOREAN_FRAMES)
        words = [korean.number(value) for value in results]
        answers = [Answer(korean.is_noun(word, True) + ".", korean.is_noun(word, False) + ".") for word in words]
        return Exercise("arithmetic", language, _korean(frame, a, b), polite, answers[0], tuple(answers[1:]))
    answers = [Answer.english(f"It is {english.number(value)}.") for value in results]
    prompt = _english(rng.choice(_ENGLISH_FRAMES), a, b)
    return Exercise("arithmetic", language, prompt, True, answers[0], tuple(answers[1:]))


def _prose(rng: Random, split: Split, language: Language, parallel: bool) -> str:
    """Two statements about different content; in parallel texts the same statement in both languages."""
    a, b, c = _draw(rng, split)
    texts = {
        "ko": lambda: _korean(rng.choice(_KOREAN_STATEMENTS), a, b, c),
        "en": lambda: _english(rng.choice(_ENGLISH_STATEMENTS), a, b, c),
    }
    first = texts[language]()
    if not parallel:
        a, b, c = _draw(rng, split)
    second = texts["en" if parallel and language == "ko" else "ko" if parallel else language]()
    return f"{first} {second}"


ARITHMETIC = Task("arithmetic", _exercise, _prose)
