"""Word lists: the micro-world's words in both languages, word by word.

They name words only, one class at a time, so they say nothing about held-out content.
"""

from random import Random

from keural.microworld import english, korean
from keural.microworld.content import OBJECTS, PEOPLE, PLACES, SUBJECTS, THINGS, VERBS

ENTRIES_PER_TEXT = 5

# Words that questions are made of.
_FRAME_WORDS = (
    ("plus", "더하기"),
    ("sum", "합"),
    ("sentence", "문장"),
    ("English", "영어"),
    ("Korean", "한국어"),
    ("past tense", "과거형"),
    ("negative", "부정문"),
    ("home", "집"),
    ("where", "어디"),
    ("what", "무엇"),
)
# Classes of (English, Korean) words.
_CLASSES = (
    tuple((noun.english, noun.korean) for noun in SUBJECTS),
    tuple((noun.english, noun.korean) for noun in OBJECTS.values()),
    tuple((verb.present, verb.plain) for verb in VERBS),
    tuple((verb.past, f"{verb.past_stem}다") for verb in VERBS),
    tuple((f"does not {verb.english}", f"{verb.stem}지 않는다") for verb in VERBS),
    PEOPLE,
    PLACES,
    THINGS,
    _FRAME_WORDS,
    tuple(zip(english.ONES[1:], korean.ONES[1:], strict=True)),
    tuple((english.number(value), korean.number(value)) for value in range(10, 20)),
    tuple(zip(english.TENS[2:], korean.TENS[2:], strict=True)),
)


def glossary(rng: Random, language: str) -> str:
    """Some words of one class, each with its translation; `language` is the one explained."""
    words = rng.choice(_CLASSES)
    entries = rng.sample(words, min(ENTRIES_PER_TEXT, len(words)))
    return " ".join(f"{there}: {here}." if language == "ko" else f"{here}: {there}." for here, there in entries)
