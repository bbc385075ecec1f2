"""Korean grammar of the micro-world: particles and the copula by final consonant, number words, politeness of a sentence."""

import re

TENS = ("", "십", "이십", "삼십", "사십", "오십", "육십", "칠십", "팔십", "구십")
ONES = ("", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")

_PARTICLES = {"은": ("은", "는"), "이": ("이", "가"), "을": ("을", "를"), "과": ("과", "와")}
_LAST_WORD = re.compile(r"[가-힣]+(?=[^가-힣]*$)")


def ends_in_consonant(word: str) -> bool:
    """Whether the last syllable has a final consonant (Unicode orders syllables by lead, vowel, final; there are 28 finals)."""
    code = ord(word[-1]) - ord("가")
    assert 0 <= code < 11_172, f"{word!r} does not end in a Hangul syllable"
    return code % 28 > 0


def with_particle(word: str, particle: str) -> str:
    """`word` with 은, 이, 을 or 과, or the form these take after a vowel: 는, 가, 를, 와."""
    after_consonant, after_vowel = _PARTICLES[particle]
    return word + (after_consonant if ends_in_consonant(word) else after_vowel)


def is_noun(word: str, polite: bool) -> str:
    """'it is `word`': 책이에요, 사과예요; 책이야, 사과야 when blunt."""
    after_consonant, after_vowel = ("이에요", "예요") if polite else ("이야", "야")
    return word + (after_consonant if ends_in_consonant(word) else after_vowel)


def plain_noun(word: str) -> str:
    """'it is `word`' in the written plain style: 책이다, 사과다."""
    return word + ("이다" if ends_in_consonant(word) else "다")


def number(value: int) -> str:
    """Sino-Korean number word of 1 to 99, as in sums."""
    assert 1 <= value <= 99, value
    return TENS[value // 10] + ONES[value % 10]


def is_polite(answer: str) -> bool:
    """Whether a Korean answer ends politely (존댓말): its last Korean word ends in -요 or -니다."""
    match = _LAST_WORD.search(answer)
    return match is not None and match[0].endswith(("요", "니다"))
