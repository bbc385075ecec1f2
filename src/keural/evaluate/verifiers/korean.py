"""Korean instructions that a program can check: what an answer's form, words, marks and speech level must be.

In: an answer and arguments. Out: whether it follows. Each kind is a function whose arguments are the instruction's;
`korean_items` has the sentences in which a person would give it.
"""

import re
import unicodedata
from collections.abc import Sequence

from keural.evaluate.verifiers.base import Registry, compare
from keural.evaluate.verifiers.ifeval import json_format, number_highlighted_sections, number_placeholders, title, two_responses
from keural.evaluate.verifiers.korean_text import POLITE, level_of, levels, sentences
from keural.parsing import Malformed, parse_json

HANJA = re.compile("[\u2e80-\u2fdf\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_COMMAS = re.compile("[,，、﹐､]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]")
_EMOJI = re.compile("[\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff]|\\^\\^|[ㅋㅎㅠㅜ]{2,}|:\\)|:\\(")
_BULLET = re.compile(r"^[ \t]*[-*•·▪◦●○][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d{1,3})[.)][ \t]*\S", re.MULTILINE)
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"))
_CLOSERS = " \t\n\"”’'」』)*_"


def _plain(text: str) -> str:
    """Text with composed syllables, as answers and arguments are compared."""
    return unicodedata.normalize("NFC", text)


def _characters(answer: str, count: int, relation: str, with_spaces: bool) -> bool:
    text = _plain(answer).strip()
    return compare(len(text if with_spaces else "".join(text.split())), relation, count)


def _words(answer: str, count: int, relation: str) -> bool:
    words = [word for word in answer.split() if any(letter.isalnum() for letter in word)]
    return compare(len(words), relation, count)


def _sentences(answer: str, count: int, relation: str) -> bool:
    return compare(len(sentences(_plain(answer))), relation, count)


def _paragraphs(answer: str, count: int) -> bool:
    return len([part for part in re.split(r"\n[ \t]*\n", answer) if part.strip()]) == count


def _lines(answer: str, count: int) -> bool:
    return len([line for line in answer.split("\n") if line.strip()]) == count


def _polite(answer: str) -> bool:
    found = levels(_plain(answer))
    return bool(found) and all(level in POLITE for level in found)


def _casual(answer: str) -> bool:
    found = levels(_plain(answer))
    return bool(found) and not any(level in POLITE for level in found)


def _haeyo(answer: str) -> bool:
    found = levels(_plain(answer))
    return bool(found) and all(level == "haeyo" for level in found)


def _hapsyo(answer: str) -> bool:
    found = levels(_plain(answer))
    return bool(found) and all(level == "hapsyo" for level in found)


def _plain_style(answer: str) -> bool:
    found = levels(_plain(answer))
    return bool(found) and all(level == "plain" for level in found)


def _forbidden(answer: str, words: Sequence[str]) -> bool:
    return not any(_plain(word).lower() in _plain(answer).lower() for word in words)


def _required(answer: str, words: Sequence[str]) -> bool:
    return all(_plain(word).lower() in _plain(answer).lower() for word in words)


def _frequency(answer: str, word: str, count: int, relation: str) -> bool:
    return compare(_plain(answer).lower().count(_plain(word).lower()), relation, count)


def _bullets(answer: str, count: int) -> bool:
    return len(_BULLET.findall(answer)) == count


def _numbered(answer: str, count: int) -> bool:
    return [int(number) for number in _NUMBERED.findall(answer)] == list(range(1, count + 1))


def _json(answer: str, keys: Sequence[str]) -> bool:
    if not json_format(answer):
        return False
    text = re.sub(r"\A```\w*|```\Z", "", answer.strip())
    try:
        value = parse_json(text.strip(), unique=True)
    except Malformed:
        return False
    return isinstance(value, dict) and {_plain(str(key)) for key in value} == {_plain(key) for key in keys}


def _hangul_only(answer: str) -> bool:
    letters = [letter for letter in _plain(answer) if letter.isalpha()]
    return bool(letters) and all("가" <= letter <= "힣" or "ㄱ" <= letter <= "ㅣ" for letter in letters)


def _no_latin(answer: str) -> bool:
    return _LATIN.search(answer) is None


def _no_digits(answer: str) -> bool:
    return not any(letter.isdigit() or (letter.isnumeric() and HANJA.match(letter) is None) for letter in answer)


def _no_hanja(answer: str) -> bool:
    return HANJA.search(answer) is None


def _no_comma(answer: str) -> bool:
    return _COMMAS.search(answer) is None


def _no_exclamation(answer: str) -> bool:
    return re.search("[!！‼❗❕]", answer) is None


def _no_emoji(answer: str) -> bool:
    return _EMOJI.search(answer) is None


def _quoted(answer: str) -> bool:
    text = answer.strip()
    return any(len(text) > 2 and text.startswith(begin) and text.endswith(end) for begin, end in _QUOTES)


def _first_line_title(answer: str, word: str) -> bool:
    first, _, rest = answer.strip().partition("\n")
    after = re.sub(r"[*#]", "", first).strip().removeprefix(word)
    return first.strip("*# ").startswith(word) and bool(re.match(r"\s*[:：]\s*\S", after)) and bool(rest.strip())


def _start_phrase(answer: str, phrase: str) -> bool:
    return _plain(answer).lstrip("\"“'「 \n").startswith(_plain(phrase))


def _end_phrase(answer: str, phrase: str) -> bool:
    return _plain(answer).rstrip(_CLOSERS).endswith(_plain(phrase).rstrip(_CLOSERS))


def _acrostic(answer: str, word: str) -> bool:
    lines = [line.strip() for line in _plain(answer).split("\n") if line.strip()]
    firsts = [
        re.sub(rf"^[\"“'(\[*\-•\s]*(?:{re.escape(syllable)}\s*[:：)\]\-—*]+\s*[\"“']?)?", "", line)
        for syllable, line in zip(word, lines, strict=False)
    ]
    return len(lines) == len(word) and all(first.startswith(syllable) for first, syllable in zip(firsts, word, strict=True))


def _last_is_question(answer: str) -> bool:
    found = sentences(_plain(answer))
    return bool(found) and found[-1].rstrip(_CLOSERS).endswith(("?", "？"))


def _table(answer: str, columns: int, rows: int) -> bool:
    lines = [line.strip() for line in answer.split("\n") if "|" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    marked = [all(re.fullmatch(r":?-{1,}:?", cell) for cell in row) for row in cells]
    return len(cells) == rows + 2 and marked == [False, True] + [False] * rows and all(len(row) == columns for row in cells)


def _postscript(answer: str, marker: str) -> bool:
    lines = [line.strip("*_ ") for line in answer.strip().split("\n") if line.strip()]
    places = [place for place, line in enumerate(lines) if line.startswith(marker)]
    return bool(places) and places[-1] > 0 and len(lines[places[-1]].removeprefix(marker).strip(" :：*")) > 0


def _one_of(answer: str, options: Sequence[str]) -> bool:
    return _plain(answer).strip().rstrip(".。!").strip("\"“”' ") in {_plain(option).rstrip(".") for option in options}


def _sections(answer: str, word: str, count: int) -> bool:
    numbers = re.findall(rf"^[#*\[ \t]*{re.escape(word)}[ \t]*(\d+)", answer, re.MULTILINE)
    return [int(number) for number in numbers] == list(range(1, count + 1))


def _same_ending(answer: str, ending: str) -> bool:
    found = [sentence for sentence in sentences(_plain(answer)) if level_of(sentence) or re.search(r"[.?!]$", sentence)]
    return bool(found) and all(re.sub(r"[^가-힣]+$", "", sentence).endswith(ending) for sentence in found)


KOREAN: Registry = {
    "length:characters": _characters,
    "length:words": _words,
    "length:sentences": _sentences,
    "length:paragraphs": _paragraphs,
    "length:lines": _lines,
    "speech:polite": _polite,
    "speech:casual": _casual,
    "speech:haeyo": _haeyo,
    "speech:hapsyo": _hapsyo,
    "speech:plain": _plain_style,
    "speech:ending": _same_ending,
    "words:forbidden": _forbidden,
    "words:required": _required,
    "words:frequency": _frequency,
    "form:bullets": _bullets,
    "form:numbered": _numbered,
    "form:json": _json,
    "form:title": title,
    "form:title_line": _first_line_title,
    "form:table": _table,
    "form:sections": _sections,
    "form:highlights": number_highlighted_sections,
    "form:placeholders": number_placeholders,
    "form:two_answers": two_responses,
    "form:one_of": _one_of,
    "form:acrostic": _acrostic,
    "script:hangul_only": _hangul_only,
    "script:no_latin": _no_latin,
    "script:no_digits": _no_digits,
    "script:no_hanja": _no_hanja,
    "marks:no_comma": _no_comma,
    "marks:no_exclamation": _no_exclamation,
    "marks:no_emoji": _no_emoji,
    "marks:quoted": _quoted,
    "place:start_phrase": _start_phrase,
    "place:end_phrase": _end_phrase,
    "place:last_is_question": _last_is_question,
    "place:postscript": _postscript,
}
"""Kinds of Korean instructions by name."""
