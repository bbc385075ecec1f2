"""What can be counted in a text without a model: letters by script, Korean function words, broken encodings, words.

In: text. Out: shares between 0 and 1, and words. Nothing here needs datatrove.
"""

import re
import string
import unicodedata
from functools import lru_cache

HANGUL = re.compile("[가-힣]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u200b\u2060\ufeff]")
_LINE_END = re.compile("\r\n?|[\x0c\x85\u2028]")
_MARKUP = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|<[^>\n]{1,200}>|\]\([^)\n]*\)|https?://\S+|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
_FENCE = re.compile(r"^([ \t]*)(```+|~~~+)[^\n]*\n.*?^[ \t]*\2[ \t]*$", re.DOTALL | re.MULTILINE)
_SENTENCE = re.compile(r"""[.!?。？！…]["'”’」』)\]]*\s*$|[다요죠까][\s~^ㅋㅎㅠㅜ]*$|[다요죠까음함][.!?…]""")
_JAMO_LINE = re.compile(r"[\s\W\d]*[ㄱ-ㅎㅏ-ㅣ\u1100-\u11ff][\s\W\d ㄱ-ㅎㅏ-ㅣ\u1100-\u11ff]*")
_EDGES = string.punctuation + "“”‘’「」『』《》〈〉【】·…—–~、。，！？：；（）•→※▶■□○●★☆"

PARTICLES = (
    "에서", "으로", "에게", "까지", "부터", "처럼", "보다", "의", "는", "은", "이", "가", "을", "를", "에", "로", "와", "과", "도",
    "만", "한", "하", "했", "고", "다", "되",
)  # fmt: skip
"""Endings that are cut off an eojeol, longest first: particles, and the endings among FineWeb-2's Korean stop words."""
_ENDINGS = (
    *PARTICLES, "요", "며", "면", "서", "지", "게", "기", "할", "된", "될", "인", "적", "들", "여", "해", "어", "아", "니", "까",
    "나", "던", "야", "든", "록", "음", "함", "랑", "러", "려", "자", "네", "죠", "데",
)  # fmt: skip
"""What most eojeol of running text end in: particles, verb endings, the commonest derivations."""


def normalize(text: str) -> str:
    """NFC, one kind of line end, no control or zero-width characters; newlines, tabs and runs of spaces stay as they are."""
    text = _LINE_END.sub("\n", text)
    text = _CONTROL.sub("", text)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def prose_of(text: str) -> str:
    """The text without fenced code, whose lines and signs say nothing of the prose around it; the whole text where little else is
    left.
    """
    prose = _FENCE.sub("", text)
    return prose if 4 * len(prose.strip()) >= len(text.strip()) else text


def without_markup(text: str) -> str:
    """The text without code blocks, tags, link targets, addresses and formulas: what a reader reads."""
    return _MARKUP.sub(" ", text)


def script_share(text: str, script: re.Pattern[str]) -> float:
    """Share of `script` among the letters of a text; 0 where there are none."""
    letters = len(_LETTER.findall(text))
    return len(script.findall(text)) / letters if letters else 0.0


@lru_cache(maxsize=1)  # several filters ask for the words of one text
def eojeol_words(text: str) -> list[str]:
    """Words between white space without punctuation around them; a particle or ending counts as a word of its own.

    A stand-in for morphemes that is a thousand times faster than an analyser: stop words are found, and word lengths come near
    those that published thresholds were made on.
    """
    words = []
    for eojeol in text.split():
        core = eojeol.strip(_EDGES)
        if not core:
            words.append(eojeol)
        elif core[-1] in _LAST and (particle := next((end for end in PARTICLES if core.endswith(end)), "")) and core != particle:
            words += [core[: -len(particle)], particle]
        else:
            words.append(core)
    return words


@lru_cache(maxsize=1)
def plain_words(text: str) -> list[str]:
    """Words between white space, punctuation around them cut off; what is nothing but punctuation stays a word."""
    return [word.strip(_EDGES) or word for word in text.split()]


def function_word_share(text: str) -> float:
    """Share of eojeol with Hangul that end in a particle or ending; lists of keywords have few. 1 where there are no eojeol."""
    eojeol = [core for word in text.split() if HANGUL.search(core := word.strip(_EDGES))]
    return sum(core.endswith(_ENDINGS) for core in eojeol) / len(eojeol) if eojeol else 1.0


def sentence_line_share(text: str) -> float:
    """Share of lines with text that end a Korean sentence, with or without a full stop, or hold the end of one."""
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(_SENTENCE.search(line) is not None for line in lines) / len(lines) if lines else 0.0


def broken_share(text: str) -> float:
    """Share of letters that Korean text does not have, but text decoded with a wrong encoding does.

    Counted are replacement characters, ideographs and syllables outside KS X 1001, whose 2,350 are all that almost every Korean
    text is written with (UTF-8 read as CP949 is full of the other 8,822), Latin letters with accents (either read as Latin-1), and
    private-use characters.
    """
    letters = len(_LETTER.findall(text)) + len(_NO_LETTER.findall(text))
    return len(_BROKEN.findall(text)) / letters if letters else 0.0


def jamo_line_share(text: str) -> float:
    """Share of lines with text that hold letters of Hangul only as single jamo, such as ㅋㅋㅋ."""
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(_JAMO_LINE.fullmatch(line) is not None for line in lines) / len(lines) if lines else 0.0


_LAST = frozenset(particle[-1] for particle in PARTICLES)


_COMMON = {bytes((lead, trail)).decode("euc_kr") for lead in range(0xB0, 0xC9) for trail in range(0xA1, 0xFF)}
"""KS X 1001's syllables."""
_RARE = "".join(syllable for syllable in map(chr, range(ord("가"), ord("힣") + 1)) if syllable not in _COMMON)
_NO_LETTER = re.compile("[\ufffd\ue000-\uf8ff]")
_BROKEN = re.compile(f"[{_RARE}\ufffd\ue000-\uf8ff\u4e00-\u9fff\u00c0-\u024f]")
