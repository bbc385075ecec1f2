"""How text is encoded, judged by what it says when it is read so: not by the absence of an error.

In: the first bytes of a file, perhaps with samples from further in. Out: a `Guess`: an encoding and the evidence for it, or none
with what was found. A byte order mark decides, valid UTF-8 decides, zero bytes decide between the forms of UTF-16 and UTF-32.
Anything else is read in every encoding that people still use, and each reading is compared with how a language looks: how much of
it the most frequent characters make up, which are rare, which do not stand inside words. CP949 reads almost any bytes, and
most of them as Hangul that nobody writes.

The comparison is a naive Bayes classifier over characters with hand-made classes of characters; the frequent ones of each language
are common knowledge. It answers only where the best reading looks like its language and is far from the second.
"""

import codecs
import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

MARGIN = 7.0
"""Nats by which the best reading must be more likely than the second: a thousand to one."""
MIN_UTF8 = 0.9
"""Share of the bytes beyond ASCII that must be valid UTF-8 where some are not: few bad bytes are damage, not another encoding."""
MIN_CONTROLS, MAX_CONTROLS = 16, 0.25
"""So many control characters, and such a share of them, are in data that is no text."""
_SAMPLE_BYTES = 1 << 15
"""So much of what is beyond ASCII is looked at."""
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNDECODED = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")


class Guess(NamedTuple):
    """An encoding by Python's name (UTF-8 with or without a mark is `utf-8`), None where the evidence does not decide.

    `evidence` is a clause for people.
    """

    encoding: str | None
    evidence: str


def guess_encoding(start: bytes, complete: bool = False) -> Guess:
    """The encoding of a text that begins with these bytes; `complete`: they are all of it."""
    for mark, encoding in _BOMS:
        if start.startswith(mark):
            return Guess(encoding, "it begins with a byte order mark")
    if start.isascii() and b"\0" not in start:
        return _seven_bit(start)
    decoded = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(start, complete)
    beyond_ascii = sum(byte >= 0x80 for byte in start) if not start.isascii() else 0
    undecodable = len(_UNDECODED.findall(decoded)) if beyond_ascii else 0
    if b"\0" in start and (wide := _wide(start, complete)):
        return wide
    if undecodable <= (1 - MIN_UTF8) * beyond_ascii:
        return _unless_controls(decoded, "it is valid UTF-8" if not undecodable else f"it is UTF-8 but for {undecodable:,} bytes")
    return _by_languages(start, complete)


def _seven_bit(start: bytes) -> Guess:
    """ASCII, unless escape sequences switch to other characters."""
    for mark, encoding in ((b"\x1b$)C", "iso2022_kr"), (b"\x1b$B", "iso2022_jp"), (b"\x1b$@", "iso2022_jp")):
        if mark in start:
            return Guess(encoding, "it switches characters by escape sequences")
    return _unless_controls(start.decode("ascii"), "it is ASCII")


def _unless_controls(text: str, evidence: str) -> Guess:
    """UTF-8 with this evidence, unless too much of the text is control characters."""
    controls = len(_CONTROL.findall(text))
    if controls >= MIN_CONTROLS and controls > MAX_CONTROLS * len(text):
        return Guess(None, f"{controls / len(text):.0%} of it are control characters, as in data that is no text")
    return Guess("utf-8", evidence)


def _wide(start: bytes, complete: bool) -> Guess | None:
    """UTF-16 or UTF-32 without a mark: which bytes of each unit are zero says which, and the text must look like one."""
    found = []
    for encoding, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        whole = start if complete else start[: len(start) // width * width]
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(whole, complete)
        except UnicodeDecodeError:
            continue
        if text and "\0" not in text and not _CONTROL.search(text):
            found.append((_best_fit(text).per_character, encoding))
    found.sort(reverse=True)
    if not found or found[0][0] < -10 or (len(found) > 1 and found[0][0] - found[1][0] < 1):
        return None
    encoding = found[0][1]
    return Guess(encoding, f"zero bytes stand as in {encoding.upper()} without a byte order mark")


# ---------------------------------------------------------------------------------------------------------------- languages

KOREAN = (
    "이는다하에가을지고어니나아기를로요일의해서은도리있한그사수시자내게인보들으것라정주스대제만여오면야부거좋장세구마러드전려트과안할되우습너음소"
    "메생무모었입동까원상없데용않와비간적때문예저했말바금네조알위래물신집남타두더줘개성터번미치유실방분화"
)
"""Syllables that make up about two thirds of any Korean text."""
KOREAN_TOO = (
    "합늘함연중람운같공국경겠식점작교관계날진온각레행학결추선파건매잘르많명년먹회히랑후불재친반살프며처울았달당단발차체현통호약난른산코또된버감속"
    "애줄록싶피받변출눈확워언심청든직임업올못순영법노배테크양복열질강디등색봐민력종값였별얼본새포걸근월돌졌좀렇필져표던참씨름키편환준머능설켜루께"
    "님런죠왔길카최료련몇역힘외럼태형될린혼죽목겨락쓰뭐느갈손놓막절책떤토담짝듯따뒤렸급녀잡침패십악떻취맞빠검녕란왜초꺼놀군육멋천티찾백앞브접볼병"
    "붙끝품술채누권항커험족증읽먼축독냐림떨밖곳컴헤평특짜망째황완났슬답허큰틀갔푸향량턴긴택북휴령격득류쪼끼응귀김뿐케박컨꾸삭됩희엄낸송삼녁칠돼놈찮벌풍럽엇창잠페깔쌈활돈석괜움염글꽃"
)
"""Those that make up a quarter of it."""
SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同"
    "现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日"
)
TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種事成方多經麼去法學如都同"
    "現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日"
)
KANJI = "日人大年一国会中本事時者出行見上分生月自前言合場今何手学間部子方後思同地気回的文体法当作使用物私語水山食書"
LATIN = "éáíóñüäöèàçß"
LATIN_TOO = "êâîôûëïùòúãõåæøœì"
CENTRAL = "ąęłśżźćńěščřžőűů"
CENTRAL_TOO = "áéíóúýöüä"
TURKISH = "ıüşğçöİâîû"
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
GREEK = "αοιετσνηυρπκμλςάίωόέδγχήύθφώβξζψ"
HEBREW = "יוהלאמתרבשנםדקחעפטכגזןסץצךף"


def _codes(codec: str, first: range, second: Iterable[int]) -> str:
    """The characters of a double-byte table."""
    trails = list(second)
    return "".join(bytes((high, low)).decode(codec, "ignore") for high in first for low in trails)


_EUC_TRAILS = range(0xA1, 0xFF)
_BIG5_TRAILS = (*range(0x40, 0x7F), *range(0xA1, 0xFF))


def _between(first: int, last: int) -> str:
    return "".join(map(chr, range(first, last + 1)))


_Classes = Callable[[], list[tuple[str, float]]]
"""Characters, and the share of a language's characters beyond ASCII that they make up; the first class with a character counts."""


def _korean() -> list[tuple[str, float]]:
    return [
        (KOREAN, 0.68),
        (KOREAN_TOO, 0.22),
        (_codes("euc_kr", range(0xB0, 0xC9), _EUC_TRAILS), 0.06),
        ("·…‘’“”「」『』《》〈〉→※○●■□▲△▶◆★☆①②③④⑤─℃㎡", 0.02),
        (_between(0x3131, 0x3163), 0.01),
        (_codes("euc_kr", range(0xCA, 0xFE), _EUC_TRAILS), 0.01),
        (_codes("euc_kr", range(0xA1, 0xAD), _EUC_TRAILS), 0.001),
        (_between(0xAC00, 0xD7A3), 0.0005),
    ]


def _simplified() -> list[tuple[str, float]]:
    level_1, level_2 = (_codes("gb2312", range(*rows), _EUC_TRAILS) for rows in ((0xB0, 0xD8), (0xD8, 0xF8)))
    return [
        (SIMPLIFIED, 0.38),
        ("，。、“”：；？！（）《》…—", 0.11),
        (level_1, 0.48),
        (level_2, 0.02),
        (_codes("gb2312", range(0xA1, 0xAA), _EUC_TRAILS), 0.002),
        (_between(0x4E00, 0x9FA5), 0.002),
    ]


def _traditional() -> list[tuple[str, float]]:
    return [
        (TRADITIONAL, 0.38),
        ("，。、「」『』：；？！（）《》…—", 0.11),
        (_codes("big5", range(0xA4, 0xC7), _BIG5_TRAILS), 0.49),
        (_codes("big5", range(0xC9, 0xFA), _BIG5_TRAILS), 0.01),
        (_codes("big5", range(0xA1, 0xA4), _BIG5_TRAILS), 0.002),
    ]


def _japanese() -> list[tuple[str, float]]:
    return [
        ("のにはをたがでとしれさいるなもてかあっらりこすくよまきうそけんえおだせみわじめどつばご", 0.5),
        (_between(0x3041, 0x3093), 0.03),
        ("、。「」・ー", 0.08),
        (_between(0x30A1, 0x30F6), 0.09),
        (KANJI, 0.09),
        (_codes("euc_jp", range(0xB0, 0xD0), _EUC_TRAILS), 0.2),
        (_codes("euc_jp", range(0xD0, 0xF5), _EUC_TRAILS), 0.003),
        (_codes("euc_jp", range(0xA1, 0xA9), _EUC_TRAILS), 0.003),
        (_between(0xFF61, 0xFF9F), 0.0005),
    ]


def _latin() -> list[tuple[str, float]]:
    return [
        (LATIN, 0.45),
        (LATIN_TOO, 0.17),
        ("’“”‘–—…«»\xa0°€£©®·§½¿¡„", 0.35),
        ((LATIN.replace("ß", "") + LATIN_TOO).upper(), 0.04),
        ("•™‹›šžŠŽªº¨´¹²³±×¢¥µ¶", 0.002),
        (_between(0xA1, 0xFF) + "‚ƒ†‡ˆ‰˜Ÿ", 0.0003),
    ]


def _central() -> list[tuple[str, float]]:
    return [
        (CENTRAL, 0.48),
        (CENTRAL_TOO, 0.25),
        ("„”“’‘–—…«»\xa0°§", 0.15),
        ((CENTRAL + CENTRAL_TOO).upper(), 0.06),
        ("ďťňôĺľŕăâîșțđ", 0.02),
        (_between(0xA1, 0x17F), 0.001),
    ]


def _turkish() -> list[tuple[str, float]]:
    return [(TURKISH, 0.8), ("“”’‘–—…\xa0°", 0.12), ("ÜŞĞÇÖÂÎÛ", 0.07), (_between(0xA1, 0x17F), 0.001)]


def _cyrillic() -> list[tuple[str, float]]:
    rare = CYRILLIC.translate(dict.fromkeys(map(ord, "оеаинтсрвлкмдпу")))
    return [("оеаинт", 0.45), ("срвлкмдпу", 0.31), (rare, 0.18), (CYRILLIC.upper(), 0.04), ("«»—–…№“”„’\xa0", 0.02)]


def _greek() -> list[tuple[str, float]]:
    return [(GREEK[:12], 0.65), (GREEK[12:], 0.28), ("«»—–…“”’\xa0", 0.02), (_between(0x386, 0x3CE), 0.05)]


def _hebrew() -> list[tuple[str, float]]:
    return [(HEBREW[:10], 0.62), (HEBREW[10:], 0.36), ("–—…“”’\xa0", 0.02)]


@dataclass(frozen=True)
class _Language:
    """How a language looks: its classes, what its characters cost on average, and what hardly stands in its words."""

    name: str
    classes: _Classes
    least: float
    """Mean log-probability of a character beyond ASCII below which text does not look like it."""
    odd: str = ""
    """What makes a reading unlikely, as a regular expression: each find counts `_ODD`."""


_ODD = -6.0
_ASCII = -3.0
"""Log-probability of an ASCII character in any language."""
_UNKNOWN = -18.0
_LATIN_ODD = (
    r"(?<=[a-zà-öø-ÿ])[À-ÖØ-ÞŠŒŽŸ]|(?<=[A-Za-zà-öø-ÿ])[^\x00-\x7fÀ-ÖØ-öø-ÿŒœŠšŽžŸ’\xa0–—…·°®©‘](?=[A-Za-zà-öø-ÿ])"
    r"|[ÂÃ][^\x00-\x7f]|â€|(?<=[¢-ª¬-º¼-¾])[¢-ª¬-º¼-¾]|[€™](?=[a-z])"  # UTF-8 read as if it were not; signs in a row
    r"|(?<=[À-ÿ]{2})[À-ÿ]|(?<=[À-ÿ])[’‘“”](?=[À-ÿ])|(?<=[a-z])[§¿¡£€]|(?<=[A-Z])[À-ÖØ-ÞŠŒŽŸ](?=[a-z])"
)
_CENTRAL_ODD = (
    r"(?<=[a-zà-ž])[ĄĆĘŁŃÓŚŹŻĚŠČŘŽŮÁÉÍÖÜŐŰ]|(?<=[A-Za-zà-ž])[^\x00-\x7fÀ-ž’\xa0–—…°](?=[A-Za-zà-ž])"
    r"|(?<=[À-ž]{3})[À-ž]|(?<=[a-z])[§„]|(?<=[A-Z])[ĄĆĘŁŃÓŚŹŻĚŠČŘŽŮÁÉÍÖÜŐŰ](?=[a-z])"
)
_OTHER_SCRIPT = r"(?<=[{lower}])[{upper}]|(?<=[A-Za-z])[{lower}{upper}]|[{lower}{upper}](?=[A-Za-z])"
"""Capitals inside words, and letters beside Latin ones."""
_LANGUAGES = {
    language.name: language
    for language in (
        _Language("Korean", _korean, -8.0),
        _Language("Chinese", _simplified, -8.3),
        _Language("traditional Chinese", _traditional, -8.3),
        _Language("Japanese", _japanese, -7.0),
        _Language("a language of western Europe", _latin, -6.0, _LATIN_ODD),
        _Language("a language of central Europe", _central, -5.5, _CENTRAL_ODD),
        _Language("Turkish", _turkish, -4.2, _LATIN_ODD.replace("À-ÖØ-öø-ÿ", "À-ÖØ-öø-ÿıİşŞğĞ")),
        _Language("Russian", _cyrillic, -3.9, _OTHER_SCRIPT.format(lower="а-яё", upper="А-ЯЁ")),
        _Language("Greek", _greek, -4.4, _OTHER_SCRIPT.format(lower="ά-ώ", upper="Ά-Ϋ")),
        _Language("Hebrew", _hebrew, -3.9, _OTHER_SCRIPT.format(lower="א-ת", upper="א-ת")[len("(?<=[א-ת])[א-ת]|") :]),
    )
}
_ENCODINGS: dict[str, tuple[str, float]] = {
    "cp949": ("Korean", 0.0),
    "cp1252": ("a language of western Europe", 0.0),
    "gb18030": ("Chinese", -2.0),
    "cp932": ("Japanese", -2.0),
    "cp950": ("traditional Chinese", -2.0),
    "euc_jp": ("Japanese", -3.0),
    "cp1251": ("Russian", -3.0),
    "koi8_r": ("Russian", -4.0),
    "cp1250": ("a language of central Europe", -5.0),
    "cp1254": ("Turkish", -3.0),
    "cp1253": ("Greek", -3.0),
    "cp1255": ("Hebrew", -4.0),
    "johab": ("Korean", -6.0),
}
"""Encodings that are tried, each with its language and how likely it is before the text is looked at (nats)."""


_WIDE = -4.0
"""How likely UTF-16 without a mark and without zero bytes is; it is never taken, but keeps others from being taken."""


class _Fit(NamedTuple):
    total: float
    per_character: float


@cache
def _weights(name: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for characters, share in _LANGUAGES[name].classes():
        fresh = set(characters) - weights.keys()
        weights |= dict.fromkeys(fresh, math.log(share / max(len(fresh), 1)))
    return weights


def _fit(text: str, language: _Language) -> _Fit:
    """How likely the text is in a language: the whole, and the mean of its characters beyond ASCII."""
    weights, counts = _weights(language.name), Counter(text)
    ascii_count = sum(count for character, count in counts.items() if character < "\x80")
    beyond = sum(weights.get(character, _UNKNOWN) * count for character, count in counts.items() if character >= "\x80")
    if language.odd:
        beyond += _ODD * len(re.findall(language.odd, text))
    number = len(text) - ascii_count
    return _Fit(beyond + _ASCII * ascii_count, beyond / number if number else 0.0)


def _best_fit(text: str) -> _Fit:
    """The fit of a text, which may be a little beyond ASCII, in the language that it looks like most."""
    return max((_fit(text, language) for language in _LANGUAGES.values()), key=lambda fit: fit.per_character)


class _Reading(NamedTuple):
    score: float
    encoding: str
    text: str
    is_plausible: bool


def _by_languages(start: bytes, complete: bool) -> Guess:
    """The encoding in which the text looks like the encoding's language, if it is clear which."""
    sample, whole = _sample(start, complete)
    readings = sorted(_readings(sample, whole), reverse=True)
    if not readings:
        return Guess(None, "its bytes are no text in any known encoding")
    best = readings[0]
    if not best.is_plausible:
        return Guess(None, f"its bytes fit no encoding well ({best.encoding} least badly)")
    rivals = [other.encoding for other in readings[1:] if best.score - other.score < MARGIN and other.text != best.text]
    if rivals:
        return Guess(None, f"its bytes fit {' and '.join([best.encoding, *rivals])}")
    return Guess(best.encoding, f"read so it looks like {_ENCODINGS[best.encoding][0]}")


def _readings(sample: bytes, whole: bool) -> Iterator[_Reading]:
    for encoding, (name, prior) in _ENCODINGS.items():
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample, whole)
        except UnicodeDecodeError:
            continue
        fit = _fit(text, _LANGUAGES[name])
        yield _Reading(fit.total + prior, encoding, text, fit.per_character >= _LANGUAGES[name].least)
    for encoding in ("utf-16-le", "utf-16-be") if len(sample) % 2 == 0 else ():  # without one space or line end
        with contextlib.suppress(UnicodeDecodeError):
            text = sample.decode(encoding)
            best = max(_fit(text, language).total for language in _LANGUAGES.values())
            yield _Reading(best + _WIDE, encoding, text, False)


def _sample(start: bytes, complete: bool) -> tuple[bytes, bool]:
    """The lines that hold something beyond ASCII, up to `_SAMPLE_BYTES`; and whether the end is an end."""
    if len(start) <= _SAMPLE_BYTES:
        return start, complete
    lines, size = [], 0
    for line in start.split(b"\n"):
        if not line.isascii():
            lines.append(line)
            size += len(line)
            if size > _SAMPLE_BYTES:
                break
    return b"\n".join(lines)[: 2 * _SAMPLE_BYTES], False
