"""Whether a chat is in the language that its source states: Korean by Hangul, English by Latin letters, in prose alone.

In: a record whose source says `ko` or `en`. Out: which side is not in it and how it begins, or None. Other languages are not
judged.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from keural.data.filtering.gaps import Chat
from keural.data.filtering.prose import HANGUL, LATIN, disguised_words, prose_of, script_share
from keural.data.records import Conversation, PreferencePair
from keural.tokenizer.message import Message

MIN_LETTERS = 20
"""Fewer letters say nothing about a language."""
MIN_SHARE = {"ko": 0.3, "en": 0.5}
"""A side must have this share of the language's letters: Korean leaves more to names, terms and quotations than English does."""
PARAGRAPH_LETTERS = 10
"""A question is in the language if it has a line of so many letters that is: the rest is what the question is about."""
DISGUISED_SHARE, LEAST_DISGUISED = 0.01, 2
"""A larger share of words with letters of another script, and no fewer of them, is no slip."""
_PROPER = re.compile(
    r"\b[A-Z][\w'’.-]*(?:[ ,&/]{1,3}[A-Z][\w'’.-]*)+|(?<=[^.!?:\n] )[A-Z][\w'’.-]*|^\W*[A-Z][\w'’.-]*\W*$", re.MULTILINE
)
"""Names, titles and abbreviations in Latin letters are the same in Korean: several words with capitals, one that begins no
sentence, one alone on its line.
"""
_FOREIGN_WANTED = re.compile(
    r"번역|영작|영역하|옮겨|옮기|(?:영어|영문|일본어|일어|중국어|한문|프랑스어|불어|독일어|스페인어|러시아어|베트남어|태국어|라틴어|외국어|외래어)"
    r"(?:으?로|식|판| ?(?:문장|표현|이메일|메일|단어|이름|제목|대화|예문|작문|편지|에세이|시|가사|답변|철자|약자))"
    r"|translat\w{1,6}|\bin(?:to)? (?:English|Japanese|Chinese|French|German|Spanish|Russian|Vietnamese|Latin)\b",
    re.IGNORECASE,
)
_KOREAN_WANTED = re.compile(
    r"\btranslat\w{1,6}|\b(?:in|into|to) (?:\w+ )?(?:Korean|Hangul|Hangeul|Japanese|Chinese|Russian|Arabic|Hindi|Greek|Thai)\b"
    r"|\b(?:Korean|Japanese|Chinese|Russian|Arabic|Hindi|Greek|Thai) (?:word|phrase|sentence|expression|poem|song|letter|email"
    r"|name|text|version|translation|alphabet|character)s?\b|한국어|일본어|중국어|번역",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Language:
    """How one language is known."""

    script: re.Pattern[str]
    wanted_other: re.Pattern[str]
    """Questions whose answers are in another language."""
    is_sure: Callable[[str], bool]
    """Whether a text is in the language for sure: most texts are, and the rest takes long."""
    without: Callable[[str], str] = str
    """Prose without words that are the same in this language and others."""


def _is_surely_korean(text: str) -> bool:
    return len(HANGUL.findall(text)) >= MIN_SHARE["ko"] * len(text)


def _is_surely_english(text: str) -> bool:
    """Whether there are more letters of ASCII than of anything else."""
    ascii_text = text.encode("ascii", "ignore")
    return len(ascii_text.translate(None, _NO_LETTERS)) >= len(text) - len(ascii_text)


_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
LANGUAGES = {
    "ko": Language(HANGUL, _FOREIGN_WANTED, _is_surely_korean, lambda prose: _PROPER.sub(" ", prose)),
    "en": Language(LATIN, _KOREAN_WANTED, _is_surely_english),
}


def foreign_side(record: Chat) -> str | None:
    """The side of a record that is not in its language, with its beginning: the questions, or an answer, chosen or rejected."""
    language = LANGUAGES.get(record.language or "")
    if language is None or (record.language == "en" and all(text.isascii() for text in (asked(record), *answers(record)))):
        return None
    least, question = MIN_SHARE[str(record.language)], asked(record)
    wanted = language.wanted_other.search(question)
    asks = wanted and language.script.search(question)
    if not asks and _is_foreign(question, language, least) and not any(_is_in(line, language) for line in question.split("\n")):
        return f"question {_beginning(question)}"
    if wanted:
        return None
    return next((f"answer {_beginning(text)}" for text in answers(record) if _is_foreign(text, language, least)), None)


def disguised_word(record: Chat) -> str | None:
    """The first of the words of an English record whose letters only look like Latin ones."""
    if record.language != "en":
        return None
    words, found = 0, list[str]()
    for text in (asked(record), *answers(record)):
        count, disguised = disguised_words(text)
        words, found = words + count, [*found, *disguised]
    return found[0] if len(found) >= LEAST_DISGUISED and len(found) > DISGUISED_SHARE * words else None


def hangul_share(text: str) -> float | None:
    """Hangul among the letters of a text's prose; None where there are too few letters to tell."""
    return script_share(prose_of(text), HANGUL, MIN_LETTERS)


def _is_foreign(text: str, language: Language, least: float) -> bool:
    if language.is_sure(text):
        return False
    share = script_share(text, language.script, MIN_LETTERS)
    if share is None or share >= least:  # what is not prose has hardly Hangul, and to find it takes long
        return False
    share = script_share(language.without(prose_of(text)), language.script, MIN_LETTERS)
    return share is not None and share < least


def _is_in(line: str, language: Language) -> bool:
    share = script_share(line, language.script, PARAGRAPH_LETTERS)
    return share is not None and share >= 0.5


def asked(record: Chat) -> str:
    """The questions of a record."""
    turns: tuple[Message, ...] = record.messages if isinstance(record, Conversation) else record.prompt
    return "\n".join(turn.content for turn in turns if turn.role == "user")


def answers(record: Chat) -> list[str]:
    """Each answer of a pair, or those of a conversation that are trained, together."""
    if isinstance(record, PreferencePair):
        return [record.chosen, record.rejected]
    return ["\n".join(turn.content for turn in record.messages if turn.role == "assistant" and turn.is_trained)]


def _beginning(text: str) -> str:
    return f"{' '.join(text.split())[:30]!r}"
