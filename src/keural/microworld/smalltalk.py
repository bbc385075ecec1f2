"""Small talk: what people type first, and say last. Greetings, who the model is, thanks, and goodbyes.

In: nothing. Out: a `Task`. Content is what is said, word for word: an opening, what is put to it, and how it ends. The words and
endings of held-out ones all occur in training, these combinations of them do not; what stands alone is never held out.
"""

import itertools
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Literal

from keural.microworld.content import Split, Talk, of_split
from keural.microworld.exercise import Answer, Exercise, Language, Task

Kind = Literal["greeting", "who", "thanks", "goodbye"]


@dataclass(frozen=True, slots=True)
class _Wordings:
    """Ways to say one thing: what may stand before it, itself, what may follow, and how it may end."""

    before: tuple[str, ...]
    said: tuple[str, ...]
    after: tuple[str, ...]
    ends: tuple[str, ...]


_STATED = ("", ".", "!")
_ASKED = ("?", ".", "")
_ENGLISH: dict[Kind, _Wordings] = {
    "greeting": _Wordings(
        ("", "Oh, "),
        ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Nice to meet you", "Hello, hello", "Hi, hi"),
        ("", " there", ", Keural", ", my friend", " again"),
        _STATED,
    ),
    "who": _Wordings(
        ("", "Hello. ", "Hi, ", "Hi. ", "So, ", "Sorry, "),
        ("Who are you", "What are you", "What is your name", "What are you called", "Who is this", "Who am I talking to"),
        ("", ", please", ", my friend"),
        _ASKED,
    ),
    "thanks": _Wordings(
        ("", "OK. ", "Good. ", "Oh, "),
        ("Thank you", "Thanks", "Many thanks", "Thanks a lot", "Thank you very much"),
        ("", ", Keural", ", my friend", " again"),
        _STATED,
    ),
    "goodbye": _Wordings(
        ("", "OK. ", "Good. ", "Thanks. "),
        ("Goodbye", "Bye", "Bye bye", "See you", "Good night"),
        ("", ", Keural", ", my friend", " then"),
        _STATED,
    ),
}
_KOREAN_POLITE: dict[Kind, _Wordings] = {
    "greeting": _Wordings(
        ("", "아, ", "케우랄, "),
        ("안녕하세요", "안녕하십니까", "반가워요", "반갑습니다", "처음 뵙겠습니다"),
        ("",),
        ("", ".", "!", "?"),
    ),
    "who": _Wordings(
        ("", "안녕하세요. ", "아, ", "그런데 "),
        ("누구세요", "누구예요", "당신은 누구세요", "이름이 뭐예요", "이름이 무엇입니까", "이름을 알려 주세요"),
        ("",),
        ("", "?", "."),
    ),
    "thanks": _Wordings(
        ("", "아, ", "정말 ", "네, "), ("고마워요", "고맙습니다", "감사합니다", "감사해요"), ("", ", 케우랄"), ("", ".", "!")
    ),
    "goodbye": _Wordings(
        ("", "네, ", "그럼 "), ("안녕히 계세요", "잘 있어요", "다음에 봐요", "또 만나요"), ("", ", 케우랄"), ("", ".", "!")
    ),
}
_KOREAN_BLUNT: dict[Kind, _Wordings] = {
    "greeting": _Wordings(
        ("", "아, ", "케우랄, "), ("안녕", "안녕, 안녕", "반가워", "만나서 반가워"), ("", ", 친구야"), ("", ".", "!", "?")
    ),
    "who": _Wordings(
        ("", "안녕. ", "아, ", "그런데 "),
        ("누구야", "너는 누구야", "너 누구야", "이름이 뭐야", "네 이름은 뭐야", "이름을 알려 줘"),
        ("",),
        ("", "?", "."),
    ),
    "thanks": _Wordings(
        ("", "아, ", "정말 ", "그래, "), ("고마워", "정말 고마워", "참 고마워"), ("", ", 케우랄", ", 친구야"), ("", ".", "!")
    ),
    "goodbye": _Wordings(("", "그래, ", "그럼 "), ("잘 있어", "잘 가", "다음에 봐", "또 만나"), ("", ", 케우랄"), ("", ".", "!")),
}
_ANSWERS: dict[Language, dict[Kind, Answer]] = {
    "en": {
        "greeting": Answer.english("Hello! Nice to meet you."),
        "who": Answer.english("I am Keural, a small language model."),
        "thanks": Answer.english("You are welcome."),
        "goodbye": Answer.english("Goodbye! See you again."),
    },
    "ko": {
        "greeting": Answer("안녕하세요! 반가워요.", "안녕! 반가워."),
        "who": Answer("저는 작은 언어 모델 케우랄이에요.", "나는 작은 언어 모델 케우랄이야."),
        "thanks": Answer("천만에요.", "천만에."),
        "goodbye": Answer("안녕히 가세요. 또 만나요.", "잘 가. 또 만나."),
    },
}


def _said(wordings: dict[Kind, _Wordings], language: Language, polite: bool) -> list[Talk]:
    """Every way to say everything; in English also as it is typed in haste."""
    found = []
    for kind, ways in wordings.items():
        for before, said, after, end in itertools.product(ways.before, ways.said, ways.after, ways.ends):
            text = f"{before}{said[0].lower() + said[1:] if before.endswith(', ') else said}{after}{end}"
            forms = (text, text.lower()) if language == "en" else (text,)
            found += [Talk(language, kind, written, polite, not before + after) for written in forms]
    return found


@cache
def talks(split: Split) -> tuple[Talk, ...]:
    """All small talk of a split."""
    everything = [*_said(_ENGLISH, "en", True), *_said(_KOREAN_POLITE, "ko", True), *_said(_KOREAN_BLUNT, "ko", False)]
    return of_split(list(dict.fromkeys(everything)), split)


@cache
def _by_kind(split: Split, language: Language, kind: Kind, polite: bool, plain: bool) -> tuple[Talk, ...]:
    found = (talk for talk in talks(split) if (talk.language, talk.kind, talk.polite) == (language, kind, polite))
    return tuple(talk for talk in found if talk.is_plain or not plain)


def _draw(rng: Random, split: Split, language: Language, plain: bool) -> tuple[Talk, Kind]:
    kind = rng.choice(list(_ANSWERS[language]))
    polite = language == "en" or rng.random() < 0.5
    return rng.choice(_by_kind(split, language, kind, polite, plain)), kind


def _exercise(rng: Random, split: Split, language: Language, plain: bool = False) -> Exercise:
    talk, kind = _draw(rng, split, language, plain)
    wrong = [answer for other, answer in _ANSWERS[language].items() if other != kind]
    return Exercise("smalltalk", language, talk.text, talk.polite, _ANSWERS[language][kind], tuple(rng.sample(wrong, 2)))


def _prose(rng: Random, split: Split, language: Language, parallel: bool, plain: bool = False) -> str:
    """What is said and what is answered; in parallel texts the answer in both languages."""
    talk, kind = _draw(rng, split, language, plain)
    answer = _ANSWERS[language][kind].text(talk.polite)
    if not parallel:
        return f"{talk.text} {answer}"
    return f"{answer} {_ANSWERS['en' if language == 'ko' else 'ko'][kind].polite}"


SMALLTALK = Task("smalltalk", _exercise, _prose)
PLAIN_SMALLTALK = Task("smalltalk", partial(_exercise, plain=True), partial(_prose, plain=True))
