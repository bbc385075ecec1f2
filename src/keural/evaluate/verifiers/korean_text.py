"""Korean text as the Korean instructions count it: sentences, and the speech level that each ends in.

In: a text. Out: sentences; for each its level. Rules without a dictionary: an ending is known by its last syllables. What they
cannot know is said where they stand.
"""

import re
from typing import Literal

Level = Literal["hapsyo", "haeyo", "plain", "casual"]
"""합쇼체 (-습니다) and 해요체 (-요), which are 존댓말; 해라체 (-다) and 해체 (-어, -지, …), which are 반말."""
POLITE: tuple[Level, ...] = ("hapsyo", "haeyo")

_QUOTED = re.compile(
    r"[\"“‘'「『]([^\"“”‘’'「」『』\n]{0,300})[\"”’'」』](?=이?라고|이?라는|이?라며|하고|하며|란|이란|[은는이가을를도에의와과로])"
)
"""Speech inside a sentence: a particle follows the closing mark, so its own full stop ends nothing."""
_MARKS = ".?!…。！？"
_END = re.compile(rf"[{_MARKS}]+[\"”’'」』)\]*_~]*(?=\s|$)")
_NO_END = re.compile(r"(?:(?:^|\s)[A-Za-z]|\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|etc|e\.g|i\.e|No)|\d)\.$")
"""Before a space: a letter, an abbreviation or a number with a point, as in dates and numbered lists."""
_LONGEST_NO_END = 8
"""Characters in which one can be seen."""
_ITEM = re.compile(r"^\s*(?:[-*•·▪◦○●]\s+|\(?\d{1,3}[.)]\s*|[①-⑳]\s*|[가-하][.)]\s+|#{1,6}\s+|>\s+)")
_TAIL = re.compile(r"(?:[^가-힣]|[ㄱ-ㅎㅏ-ㅣ])*$")
_WORD = re.compile(r"[가-힣]+$")
_RULE = re.compile(r"^[\s\-*_=~#|:]*$")


def sentences(text: str) -> list[str]:
    """Sentences of a Korean text, markup of lists and headings left out of them.

    One ends at `.`, `?`, `!`, `…` before a space, and at the end of a line. None ends inside quoted speech that a particle follows,
    after a number with a point (`3.14`, `2024. 3. 5.`, `1. 사과`) or after a Latin abbreviation, unless the line ends there. Two
    sentences with nothing but a space between them are one.
    """
    found = []
    for line in text.split("\n"):
        line = _ITEM.sub("", line).strip()
        if _RULE.match(line) or not any(letter.isalnum() for letter in line):
            continue
        found += _of_line(line)
    return found


def _of_line(line: str) -> list[str]:
    masked = _QUOTED.sub(lambda match: re.sub(rf"[{_MARKS}]", "_", match.group()), line)
    parts, start = [], 0
    for match in _END.finditer(masked):
        if (
            match.end() < len(masked)
            and match.group() == "."
            and _NO_END.search(masked[max(0, match.end() - _LONGEST_NO_END) : match.end()])
        ):
            continue
        parts.append(line[start : match.end()].strip())
        start = match.end()
    parts.append(line[start:].strip())
    return [part for part in parts if any(letter.isalnum() for letter in part)]


_EXACTLY_POLITE = frozenset({"네", "예", "넵", "아니요", "아뇨", "아니오", "천만에요", "별말씀을요", "글쎄요", "그럼요"})
_NOUNS_IN_YO = ("필요", "중요", "수요", "개요", "소요", "주요", "강요", "동요", "민요", "담요", "긴요", "요요")
"""Nouns that end as 해요체 does; a sentence that ends in one has no speech level."""
_NOUNS_IN_DA = ("바다", "캐나다", "우간다", "르완다", "소다", "수다", "판다", "베란다", "사이다", "프라다", "마다", "보다")
"""Nouns and particles that end as 해라체 does."""
_CASUAL = frozenset("어아해야여지네래까걸든군나냐니자라게줘봐와돼데져려켜쳐워러텨떠써꺼커퍼둬놔줄마렴구고서면거내춰궈눠뤄뭐겨껴")
"""Syllables that 해체 and 해라체 sentences end in, 다 aside."""


def level_of(sentence: str) -> Level | None:
    """The speech level of a sentence by its last word; None where it ends in no Korean word, or in a noun that looks like one.

    Marks, emoji and single letters such as ㅋㅋ after the last word do not count. A noun that ends as a casual verb does (언어,
    의자) is taken for one: only sentences with a mark at their end, or of several words, are judged by `levels`.
    """
    word = _last_word(sentence)
    if word is None or word.endswith(_NOUNS_IN_YO):
        return None
    if word in _EXACTLY_POLITE or (word.endswith("요") and word != "요"):
        return "haeyo"
    if (word.endswith(("니다", "니까", "시다")) and len(word) > 2 and _final(word[-3]) == "ㅂ") or word.endswith(
        ("십시오", "소서")
    ):
        return "hapsyo"
    if word.endswith("죠"):
        return "haeyo"
    if word.endswith("다"):
        return None if word in _NOUNS_IN_DA or (len(word) > 2 and word.endswith(("마다", "보다"))) else "plain"
    return "casual" if word[-1] in _CASUAL else None


def levels(text: str) -> list[Level]:
    """Levels of the sentences of a text, those without one left out: headings, list items that are nouns, single words."""
    found = []
    for sentence in sentences(text):
        level = level_of(sentence)
        if level is None or (level not in POLITE and not _is_sentence(sentence)):
            continue
        found.append(level)
    return found


def _is_sentence(text: str) -> bool:
    """Whether something ends with a mark, or has two words and no colon at its end."""
    return bool(_END.search(text)) or (len(text.split()) > 1 and not text.endswith((":", "：")))


def _last_word(sentence: str) -> str | None:
    match = _WORD.search(_TAIL.sub("", _without_bracket(sentence)))
    return match.group() if match else None


def _without_bracket(sentence: str) -> str:
    """A sentence without a remark in brackets at its end: 좋아요(정말로)."""
    return re.sub(r"\s*[(（][^()（）]*[)）](?=[\s.?!…~]*$)", "", sentence)


_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"


def _final(syllable: str) -> str:
    """The final consonant of a syllable; a space where it has none."""
    return _FINALS[(ord(syllable) - ord("가")) % 28]
