"""Rows that are running text: `text` (whole files or a field of a table), `markdown`, `po` (one document per catalogue)."""

import re
from typing import Any

from keural.data.adapters.base import TABLES, Adapter, Reads, described, document, guarded, text_of
from keural.data.readers.options import NAMES, TEXT, Option, OptionTable
from keural.data.readers.po import PoMessage
from keural.data.records import Document, Drop
from keural.recipe import SourceSpec

_FRONT_MATTER = re.compile(
    r"\A(---|\+\+\+)[ \t]*\n(?:#[^\n]*\n)*(?:(?:[\w\"'.-]+[ \t]*[:=](?:[ \t][^\n]*)?|\[[^\n]*\])\n.*?)?^\1[ \t]*(?:\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
"""Settings before a text, in YAML or TOML; a rule at the head of a text that says no setting below it is part of the text."""


def _text(value: Any, source: SourceSpec, where: str) -> Document | Drop:
    """Running text: a file, a paragraph or line of one, or a field of a table."""
    if isinstance(value, str):
        return document(value, where, source.language)
    return document(text_of(value, source.options.get("field", "text")), where, source.language)


def _markdown(value: Any, source: SourceSpec, where: str) -> Document | Drop:
    """A Markdown file: the text as it stands, code and indentation included, without front matter."""
    return document(_FRONT_MATTER.sub("", text_of(value, "text"), count=1).lstrip("\n"), where, source.language)


def _po(value: Any, source: SourceSpec, where: str) -> Document | Drop:
    """A gettext catalogue as one document."""
    side = source.options.get("side", "ko")
    paragraphs = [paragraph for message in value["messages"] if (paragraph := _paragraph(message, side))]
    return document("\n\n".join(paragraphs), where, source.language if side == "both" else side)


def _paragraph(message: PoMessage, side: str) -> str:
    original = [text for text in (message.source, message.plural) if text]
    translated = [text for _, text in sorted(message.translations.items()) if text]
    if side == "both" and not (original and translated):
        return ""
    return "\n".join({"ko": translated, "en": original, "both": original + translated}[side]).strip("\n")


def reads_text(source: SourceSpec) -> Reads:
    """The field that holds the text."""
    named = source.options.get("field", "text")
    names = [str(name) for name in (named if isinstance(named, list) else [named])]
    return Reads(frozenset(part for name in names for part in (name, name.split(".")[0])))


FIELD: OptionTable = {"field": Option(NAMES, "field with the text, where rows are not texts themselves", "text")}
SIDE: OptionTable = {
    "side": Option(TEXT, "translations, originals, or each original with its translation", "ko", ("ko", "en", "both"))
}
ADAPTERS = {
    "text": Adapter(
        "documents",
        guarded(_text),
        ("text", "markdown", "srt", "conllu", *TABLES),
        FIELD,
        meaning=described(_text),
        reads=reads_text,
        example={"text": "The mill stands by the river."},
    ),
    "markdown": Adapter(
        "documents",
        guarded(_markdown),
        ("markdown", "text"),
        meaning=described(_markdown),
        reads=lambda source: Reads(frozenset(("text",))),
        directory=("markdown",),
    ),
    "po": Adapter(
        "documents",
        _po,
        ("po",),
        SIDE,
        meaning=described(_po),
        reads=lambda source: Reads(frozenset(("messages",))),
    ),
}
