"""The catalogue parser gives back what a catalogue says, drops what must not be used, and names the line of what is broken."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.readers.po import PoError, parse_po

HEADER = 'msgid ""\nmsgstr ""\n"Language: ko\\n"\n"Content-Type: text/plain; charset=UTF-8\\n"\n\n'
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def quoted(text: str, cuts: list[int]) -> str:
    """A string as catalogues write it, cut into several lines."""
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    parts = [text[start:end] for start, end in pairwise(places)] or [""]
    for character, code in {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}.items():
        parts = [part.replace(character, code) for part in parts]
    return "\n".join(f'"{part}"' for part in ["", *parts])


@given(st.lists(st.tuples(TEXT.filter(bool), TEXT, st.lists(st.integers(1, 29), max_size=3)), max_size=8), st.booleans())
def test_what_is_written_is_read(messages: list[tuple[str, str, list[int]]], crlf: bool) -> None:
    body = "".join(f"#: place\nmsgid {quoted(one, cuts)}\nmsgstr {quoted(other, cuts)}\n\n" for one, other, cuts in messages)
    text = (HEADER + body).replace("\n", "\r\n") if crlf else HEADER + body
    # other line separators of Unicode are ordinary characters in a catalogue
    assert [(found.source, found.translations) for found in parse_po(text)] == [(one, {0: other}) for one, other, _ in messages]


def test_plural_forms_and_contexts() -> None:
    (message,) = parse_po(
        'msgctxt "files"\nmsgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] "파일 "\n"%d개"\nmsgstr[1] "파일들 %d개"\n'
    )
    assert (message.context, message.source, message.plural) == ("files", "%d file", "%d files")
    assert message.translations == {0: "파일 %d개", 1: "파일들 %d개"}


def test_header_fuzzy_and_obsolete_messages_are_left_out() -> None:
    text = HEADER + (
        '#, fuzzy, python-format\n#| msgid "old"\nmsgid "guess"\nmsgstr "추측"\n\n'
        '#, fuzzy\n#~ msgid "gone"\n#~ msgstr "없음"\n\nmsgid "kept"\nmsgstr "남음"\n\n#~ msgid "also gone"\n#~ msgstr "역시"\n'
    )
    assert [message.source for message in parse_po(text)] == ["kept"]


def test_messages_need_no_blank_line_between_them() -> None:
    text = 'msgid "a"\nmsgstr "ㄱ"\nmsgid "b"\nmsgstr "ㄴ"\n# comment\nmsgid "c"\n\nmsgstr ""\n'
    assert [(one.source, one.translations[0]) for one in parse_po(text)] == [("a", "ㄱ"), ("b", "ㄴ"), ("c", "")]


def test_escapes() -> None:
    (message,) = parse_po(r'msgid "a\tb\\n\"c\"\x41\101\q"' + '\nmsgstr ""')
    assert message.source == 'a\tb\\n"c"AA\\q'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('msgid "a"\nmsgid "b"\n', 2),
        ('msgid "a"\n', 1),
        ('\nmsgstr "a"\n', 2),
        ('"a"\n', 1),
        ('msgid "a\nmsgstr "b"\n', 1),
        ('msgid "a"\nmsgstr "b"\nnonsense\n', 3),
        ('msgid "a" "b"\nmsgstr ""\n', 1),
        ('msgid "a"\nmsgstr[0] "b"\nmsgstr[0] "c"\n', 3),
    ],
)
def test_a_broken_catalogue_names_its_line(text: str, line: int) -> None:
    with pytest.raises(PoError) as caught:
        parse_po(text)
    assert caught.value.line == line
