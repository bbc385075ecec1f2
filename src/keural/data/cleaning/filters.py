"""The filter sets by kind of text: Korean, English, code.

Korean: FineWeb-2's published `kor_Hang` thresholds in datatrove's own filters, on eojeol, and filters of ours for what those let
through. English: FineWeb's, which are datatrove's defaults, and one of ours for letters of another script. Code: the heuristics of
The Stack and StarCoder (Li et al. 2023, §3.3).
A filter says of a document that it is kept, or the reason why not.
"""

from collections.abc import Callable
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from keural.data.adapters.corpora import LEAST_ALPHANUMERIC, LONGEST_LINE, LONGEST_MEAN_LINE
from keural.data.cleaning import measures
from keural.data.cleaning.words import EOJEOL, PLAIN
from keural.data.filtering.prose import disguised_words

STOP_WORDS_KO = [
    "의", "다", "이", "는", "에", "을", "한", "년", "하", "은", "를", "했", "고", "에서",
    "가", "있", "으로", "인", "월", "로", "되",
]  # fmt: skip
BROKEN_SHARE = 0.05
"""Korean: a larger share of letters that it does not have means a broken encoding; hanja in brackets stay far below."""
FUNCTION_WORD_SHARE = 0.3
"""Korean: running text has 0.5 or more of eojeol with a particle or ending, lists of keywords below 0.1."""
JAMO_LINE_SHARE = 0.3
LINE_PUNCT = 0.062
"""Of FineWeb-2's `kor_Hang`: least share of lines that end as sentences do."""
DISGUISED_SHARE = 0.01
"""English: more words with letters of another script inside are a text that was disguised or scanned wrong."""

Check = Callable[[str], str | None]
"""The reason to drop a text, or None."""


def broken_encoding(text: str) -> str | None:
    """Text decoded with a wrong encoding."""
    return "broken_encoding" if measures.broken_share(text) > BROKEN_SHARE else None


def no_sentences(text: str) -> str | None:
    """Words in a row that no grammar holds together: keywords, menus."""
    return "no_sentences" if measures.function_word_share(measures.without_markup(text)) < FUNCTION_WORD_SHARE else None


def few_sentence_lines(text: str) -> str | None:
    """Menus and lists: hardly a line is or holds a sentence.

    FineWeb's rule counts lines that end in punctuation. Korean sentences often end without, and a whole document in one line, as
    boards store them, would stand or fall with its last sign.
    """
    return "line_punct_ratio" if measures.sentence_line_share(text) < LINE_PUNCT else None


def jamo_lines(text: str) -> str | None:
    """Chat in which many lines are only ㅋㅋㅋ or ㅠㅠ."""
    return "jamo_lines" if measures.jamo_line_share(text) > JAMO_LINE_SHARE else None


def disguised_letters(text: str) -> str | None:
    """Words with Cyrillic, full-width or other letters among Latin ones, which read alike and are other tokens."""
    words, found = disguised_words(text)
    return "disguised_letters" if len(found) > max(1, DISGUISED_SHARE * words) else None


def code_lines(text: str) -> str | None:
    """Minified or generated code, data in the form of code."""
    lines = text.splitlines()
    if max(map(len, lines), default=0) > LONGEST_LINE:
        return "code_long_line"
    if len(text) > LONGEST_MEAN_LINE * max(len(lines), 1):
        return "code_mean_line"
    if sum(map(str.isalnum, text)) < LEAST_ALPHANUMERIC * len(text):
        return "code_few_letters"
    return None


class Checks(BaseFilter):
    """Checks of ours, in order, as one filter."""

    name = "checks"

    def __init__(self, *checks: Check) -> None:
        super().__init__()
        self._checks = checks

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """See `BaseFilter.filter`."""
        reason = next(filter(None, (check(doc.text) for check in self._checks)), None)
        return True if reason is None else (False, reason)


def korean() -> list[tuple[str, BaseFilter]]:
    """Filters of Korean text with the prefix of their reasons; thresholds of FineWeb-2's `kor_Hang`."""
    return [
        ("", Checks(broken_encoding, jamo_lines)),
        (
            "repetition",
            GopherRepetitionFilter(
                dup_line_frac=0.374,
                dup_para_frac=0,
                dup_line_char_frac=0,
                dup_para_char_frac=0,
                top_n_grams=((2, 0.282), (3, 0.228), (4, 0.185)),
                dup_n_grams=((5, 0.201), (6, 0.184), (7, 0.168), (8, 0.154), (9, 0.140), (10, 0.127)),
                language=EOJEOL,
            ),
        ),
        ("quality", Checks(few_sentence_lines)),
        (
            "quality",
            FineWebQualityFilter(
                line_punct_thr=0, short_line_thr=999, char_duplicates_ratio=0.1, new_line_ratio=0.196, language=EOJEOL
            ),
        ),
        (
            "quality",
            GopherQualityFilter(
                min_avg_word_length=1,
                max_avg_word_length=6,
                max_non_alpha_words_ratio=0.791,
                min_stop_words=2,
                stop_words=STOP_WORDS_KO,
                language=EOJEOL,
            ),
        ),
        ("", Checks(no_sentences)),
    ]


def english() -> list[tuple[str, BaseFilter]]:
    """Filters of English text with the prefix of their reasons; datatrove's defaults, which are FineWeb's and Gopher's, see
    words but no letters.
    """
    return [
        ("", Checks(disguised_letters)),
        ("repetition", GopherRepetitionFilter(language=PLAIN)),
        ("quality", FineWebQualityFilter(language=PLAIN)),
        ("quality", GopherQualityFilter(language=PLAIN)),
    ]


def code() -> list[tuple[str, BaseFilter]]:
    """Filters of source code."""
    return [("", Checks(code_lines))]


FILTER_SETS: dict[str, Callable[[], list[tuple[str, BaseFilter]]]] = {"ko": korean, "en": english, "code": code}


class QualityFilter(BaseFilter):
    """Sends each document through the filters of its source's kind (`metadata["kind"]`)."""

    name = "quality"

    def __init__(self, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self._sets = {kind: make() for kind, make in FILTER_SETS.items()}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """See `BaseFilter.filter`."""
        if not doc.text.strip():
            return False, "empty"
        kind = doc.metadata["kind"]
        judged = doc if kind == "code" else Document(text=measures.prose_of(doc.text), id=doc.id)
        for prefix, inner in self._sets.get(kind, []):
            result = inner.filter(judged)
            if result is not True:
                reason = str(result[1] if isinstance(result, tuple) else inner.name).removeprefix("gopher_")
                return False, f"{prefix}_{reason}".lstrip("_")
        return True
