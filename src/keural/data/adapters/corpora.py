"""Published pretraining corpora by name: where a row's text is, what is known of the set, and one rule for each known defect.

`CORPORA` is the table; a corpus of the same kind is one more row of it. Rules that judge quality are filters over all
documents. Here is only what follows from how a publisher made or cut the rows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from keural.data.adapters.base import TABLES, Adapter, BadRow, Reads, described, document, guarded, lookup, missing, scalar, text_of
from keural.data.readers.options import LIST, NUMBER, SWITCH, Option, OptionTable
from keural.data.records import Document, Drop
from keural.recipe import SourceSpec

OTHER_LANGUAGE = "other_language"
"""Reason of rows in another language than the one that is wanted; not a defect."""
OTHER_LICENSE = "other_license"
"""Reason of files whose own licence the recipe does not take; not a defect."""
STUB_CHARACTERS = 100
"""A Wikipedia page with less text is a title with a category, not an article."""
LONGEST_LINE, LONGEST_MEAN_LINE, LEAST_ALPHANUMERIC = 1000, 100, 0.25
"""Bounds for code files, above and below which they are generated or hold data (arXiv 2305.06161, section 3.1)."""
LARGEST_CUT = 0.5
"""A paper that loses more than this share of its characters with its formulas is dropped."""

Rule = Callable[[Any, SourceSpec], None]
"""Raises `BadRow` for a row with a known defect."""
Mend = Callable[[str, Any, SourceSpec], str]
"""The text without what the publisher's processing left in it."""


def _in_language(*wanted: str) -> Rule:
    """FineWeb's rows carry the language (and FineWeb-2's the script) they were sorted by, and how sure that was."""

    def rule(row: Any, source: SourceSpec) -> None:
        found = [scalar(row[name]) for name in ("language", "language_script") if name in row]
        if any(name is not None and name != expected for name, expected in zip(found, wanted, strict=False)):
            raise BadRow(OTHER_LANGUAGE)
        score, least = row.get("language_score"), source.options.get("min_language_score")
        if least is not None and not (isinstance(score, int | float) and score >= least):
            raise BadRow("low_language_score")

    return rule


def _is_article(row: Any, source: SourceSpec) -> None:
    """Dumps hold redirects, and pages that are a name and a category."""
    text = text_of(row, "text").strip()
    if re.match(r"#\s*(넘겨주기|redirect)", text, re.IGNORECASE):
        raise BadRow("redirect")
    if text and len(text) < STUB_CHARACTERS:
        raise BadRow("stub")


def _is_wanted_code(row: Any, source: SourceSpec) -> None:
    """Option `lang`: languages by the name in `lang`. Option `licenses`: patterns, of which every licence of the file must match
    one; a file whose list is empty is never taken, since nothing allows its use.
    """
    wanted = source.options.get("lang")
    if wanted is not None and scalar(row.get("lang")) not in (wanted if isinstance(wanted, list) else [wanted]):
        raise BadRow(OTHER_LANGUAGE)
    found = row.get("max_stars_repo_licenses", row.get("licenses"))
    names = [name for item in found if (name := scalar(item))] if isinstance(found, list) else []
    if not names:
        raise BadRow("no_license")
    patterns = source.options.get("licenses", ["*"])
    if not all(any(fnmatchcase(name.lower(), str(pattern).lower()) for pattern in patterns) for name in names):
        raise BadRow(OTHER_LICENSE)


def _is_written_code(row: Any, source: SourceSpec) -> None:
    """Minified, generated and data files, by the figures that stand in the row."""
    bounds = {"max_line_length": LONGEST_LINE, "avg_line_length": LONGEST_MEAN_LINE}
    figures = {name: row.get(name) for name in (*bounds, "alphanum_fraction")}
    known = {name: value for name, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    if any(name in known and known[name] > bound for name, bound in bounds.items()):
        raise BadRow("long_lines")
    if known.get("alphanum_fraction", 1) < LEAST_ALPHANUMERIC:
        raise BadRow("few_letters")


_CATEGORY = re.compile(r"^(?:분류|Category|파일|File)\s*:.*\n?", re.MULTILINE)
_EMPTY_END = re.compile(r"(?:\s*\n\s*(?:각주|같이 보기|외부 링크|참고 문헌|참고 자료|출처|주석)\s*)+\Z")


def _without_wiki_ends(text: str, row: Any, source: SourceSpec) -> str:
    """Without category lines and the headings of sections at the end whose lists the dump left out. Option `title`: the title,
    which is not part of the text, first.
    """
    text = _EMPTY_END.sub("\n", _CATEGORY.sub("", text)).strip("\n") + "\n"
    title = (scalar(row.get("title")) or "").strip()
    return f"{title}\n\n{text}" if source.options.get("title") and title else text


_CITATION = re.compile(r"\s*[\[(]?\s*@xcite(?:\s*[,;]\s*@xcite)*(?:\s*[\])])?")
_LABEL = re.compile(r"\s*\[\s*(?:sec|fig|eq|tab|tbl|app|thm|lem|def)\s*[:_.][^\]\n]*\]", re.IGNORECASE)
_FORMULA = re.compile(r"@x?math\d*")
_SENTENCE = re.compile(r"(?<=[ \t][.?!])[ \t]+|(?<=\n)")
_SPACED = [
    (re.compile(r"[ \t]+([.,;:?!%)\]}])"), r"\1"),
    (re.compile(r"([(\[{])[ \t]+"), r"\1"),
    (re.compile(r"``[ \t]*(.*?)[ \t]*''"), r'"\1"'),
    (re.compile(r"[ \t]+('(?:s|re|ve|ll|d|m|t)\b|n't\b)"), r"\1"),
    (re.compile(r"[ \t]{2,}"), " "),
]


def _without_paper_marks(text: str, row: Any, source: SourceSpec) -> str:
    """Papers come as tokens between spaces, with marks for formulas and citations. Citations and labels are taken out;
    a sentence with a formula's mark says nothing without it, and goes; the spaces that the tokeniser put in go. Option `abstract`:
    the abstract first.
    """
    marked = _LABEL.sub("", _CITATION.sub("", text))
    kept = "".join(_joined(part) for part in _SENTENCE.split(marked) if not _FORMULA.search(part))
    if len(kept) < (1 - LARGEST_CUT) * len(marked):
        raise BadRow("mostly_formulas")
    for pattern, replacement in _SPACED:
        kept = pattern.sub(replacement, kept)
    abstract = _abstract(row) if source.options.get("abstract") else ""
    return f"{abstract}\n\n{kept.strip()}" if abstract else kept.strip()


def _joined(sentence: str) -> str:
    return sentence if sentence.endswith("\n") else f"{sentence} "


def _abstract(row: Any) -> str:
    text = re.sub(r"</?S>", "", scalar(row.get("abstract")) or "").strip()
    if _FORMULA.search(text):
        return ""
    for pattern, replacement in _SPACED:
        text = pattern.sub(replacement, _CITATION.sub("", text))
    return text


_BOOK_LICENSE = re.compile(
    r"^.*(?:licensed for your personal (?:enjoyment|use)|all rights reserved|smashwords (?:edition|license)"
    r"|may not be re-?sold).*\n?",
    re.IGNORECASE | re.MULTILINE,
)


def _without_book_license(text: str, row: Any, source: SourceSpec) -> str:
    """Without the lines of the seller's licence, which stands in every book."""
    return _BOOK_LICENSE.sub("", text)


@dataclass(frozen=True)
class Corpus:
    """One corpus: the keys a row must have (the first holds the text), and what is known of it."""

    keys: tuple[str, ...]
    language: str | None = None
    license: str | None = None
    rules: tuple[Rule, ...] = ()
    mend: Mend | None = None
    options: OptionTable = field(default_factory=dict)
    plain: bool = False
    """Also published as plain text files."""
    reading: dict[str, Any] = field(default_factory=dict)
    """How plain text files are read, where the recipe does not say."""
    also: tuple[str, ...] = ()
    """Fields that rules look at, where a row has them."""


_SCORE: OptionTable = {"min_language_score": Option(NUMBER, "least certainty of the language, 0 to 1, that a document must have")}
_PAPER: OptionTable = {"abstract": Option(SWITCH, "put the abstract before the text", False)}
_TITLE: OptionTable = {"title": Option(SWITCH, "put the title before the text", False)}
_SORTED = ("language", "language_script", "language_score")
CORPORA = {
    "fineweb": Corpus(("text",), "en", "ODC-By", (_in_language("en"),), options=_SCORE, also=_SORTED),
    "fineweb2_ko": Corpus(("text",), "ko", "ODC-By", (_in_language("kor", "Hang"),), options=_SCORE, also=_SORTED),
    "korean_webtext": Corpus(("text",), "ko"),
    # the original is one file with a paragraph per line and an empty line between documents
    "cc100_ko": Corpus(("text",), "ko", plain=True, reading={"split": "paragraph"}),
    "wikipedia_ko": Corpus(("text", "title"), "ko", "CC-BY-SA-3.0", (_is_article,), _without_wiki_ends, options=_TITLE),
    "wanjuan_korean": Corpus(("content",), "ko", "CC-BY-4.0"),
    "the_stack": Corpus(
        ("content", "lang"),
        None,
        "other",
        (_is_wanted_code, _is_written_code),
        options={
            "lang": Option((str, list), "programming languages, as the set names them; not given: all"),
            "licenses": Option(LIST, "patterns, of which every licence of a file must match one", ("*",)),
        },
        also=("max_stars_repo_licenses", "licenses", "max_line_length", "avg_line_length", "alphanum_fraction"),
    ),
    "arxiv": Corpus(("article", "abstract"), "en", mend=_without_paper_marks, options=_PAPER),
    "pubmed": Corpus(("article", "abstract"), "en", mend=_without_paper_marks, options=_PAPER),
    "pg19": Corpus(("text",), "en", "Apache-2.0", plain=True),
    "bookcorpusopen": Corpus(("text", "title"), "en", mend=_without_book_license),
}


def _adapter(corpus: Corpus) -> Adapter:
    def convert(value: Any, source: SourceSpec, where: str) -> Document | Drop:
        text = str(_text(value, corpus))
        if text.strip() and not _is_plain(value, corpus):
            for rule in corpus.rules:
                rule(value, source)
            text = corpus.mend(text, value, source) if corpus.mend else text
        return document(text, where, source.language or corpus.language)

    formats = ("text", *TABLES) if corpus.plain else TABLES
    known: dict[str, Any] = {"license": corpus.license, "language": corpus.language, "reading": corpus.reading}
    known["reads"] = lambda source: Reads(frozenset((*corpus.keys, *corpus.also)))
    meaning = f"The corpus as published, its text in `{corpus.keys[0]}`. {described(corpus.mend) if corpus.mend else ''}".strip()
    return Adapter("documents", guarded(convert), formats, corpus.options, meaning, **known)


def _text(value: Any, corpus: Corpus) -> str:
    if not _is_plain(value, corpus):
        for key in corpus.keys:
            if not isinstance(value, dict) or key not in value:
                raise missing(value, key)
    found = lookup(value, corpus.keys[0])
    if found is None:
        raise BadRow("null_text")
    text = scalar(found)
    if text is None:
        raise BadRow("text_is_not_text")
    return text


def _is_plain(value: Any, corpus: Corpus) -> bool:
    """Whether a row is a plain text file, or a piece of one."""
    return corpus.plain and isinstance(value, dict) and list(value) == ["text"]


ADAPTERS = {name: _adapter(corpus) for name, corpus in CORPORA.items()}
