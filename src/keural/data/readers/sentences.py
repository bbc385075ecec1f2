"""Running text inside subtitles and annotated sentences: what is said in `.srt` and `.vtt`, what stands in `.conllu`.

In: the numbered lines of a file. Out: cues and sentences, each with the number of its first line, without times and annotation.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_TIME = re.compile(r"\s*(?:\d+:)?\d{1,2}:\d{2}[,.]\d{1,3}\s*-->\s*(?:\d+:)?\d{1,2}:\d{2}[,.]\d{1,3}(?:\s.*)?")
_MARKUP = re.compile(r"</?(?:[ibuc]|v|font|lang|ruby|rt)\b[^<>]*>|\{\\[^{}]*\}", re.IGNORECASE)
_BESIDE = ("WEBVTT", "NOTE", "STYLE", "REGION")
"""How blocks of WebVTT begin that say nothing."""
_TOKENS = 10
"""Columns of a line of CoNLL-U."""


class Sentence(NamedTuple):
    """A cue or a sentence; `problem` says why it has no text. `begins_document`: a new document begins with it."""

    line: int
    text: str
    problem: str = ""
    begins_document: bool = False


def _blocks(lines: Iterable[tuple[int, str | None]]) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines between empty ones. A line that is too long makes its block unusable: it stands for nothing."""
    block: list[str] = []
    first = 0
    for number, line in lines:
        text = "\0" if line is None else line.rstrip("\r\n")
        if text.strip():
            first = first or number
            block.append(text)
        elif block:
            yield first, block
            block, first = [], 0
    if block:
        yield first, block


def cues(lines: Iterable[tuple[int, str | None]]) -> Iterator[Sentence]:
    """What the cues of a SubRip or WebVTT file say, without markup, each in its lines."""
    for first, block in _blocks(lines):
        place = next((place for place, line in enumerate(block[:2]) if _TIME.fullmatch(line)), None)
        if place is None:
            if not block[0].removeprefix("\ufeff").startswith(_BESIDE):
                yield Sentence(first, "", "a cue without a line of times")
            continue
        text = "\n".join(line for line in (_MARKUP.sub("", line).strip() for line in block[place + 1 :]) if line)
        if text:
            yield Sentence(first, text)


def sentences(lines: Iterable[tuple[int, str | None]]) -> Iterator[Sentence]:
    """The sentences of a CoNLL-U file: what `# text` says, else the words as they are spaced."""
    for first, block in _blocks(lines):
        comments = [line[1:].strip() for line in block if line.startswith("#")]
        tokens = [line.split("\t") for line in block if not line.startswith("#")]
        begins = any(re.match(r"newdoc\b", comment) for comment in comments)
        text = next((comment.partition("=")[2].strip() for comment in comments if re.match(r"text\s*=", comment)), None)
        if any(len(token) != _TOKENS for token in tokens):
            yield Sentence(first, "", f"a line has not {_TOKENS} columns", begins)
        elif text is not None or tokens:
            yield Sentence(first, text if text is not None else _spaced(tokens), "", begins)


def _spaced(tokens: list[list[str]]) -> str:
    """The words of a sentence: of a contraction its surface form, no empty nodes, spaces unless `SpaceAfter=No` says otherwise."""
    text, covered = "", 0
    for number, form, *rest in tokens:
        if match := re.fullmatch(r"(\d+)-(\d+)", number):
            covered = int(match[2])
        elif not number.isdecimal() or int(number) <= covered:
            continue
        text += form + ("" if "SpaceAfter=No" in rest[-1].split("|") else " ")
    return text.rstrip()
