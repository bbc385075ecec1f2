"""English text as IFEval counts it: sentences as Punkt finds them, words of the Penn Treebank that are in capitals.

In: a text. Out: counts. Both are rules of our own after the published descriptions: Punkt (Kiss & Strunk 2006) learned its
abbreviations and sentence starters from a corpus, here they are short lists, so that counts differ where an abbreviation is in only
one of them.
"""

import re
from collections.abc import Sequence

_ABBREVIATION_LIST = """
mr mrs ms dr prof rev hon gen col maj capt lt sgt cmdr sen rep gov pres st mt ft jr sr esq messrs vs etc cf al ca e.g
i.e eg ie viz ed eds vol vols fig figs p pp ch sec art op approx dept univ assn bros co corp inc ltd llc plc jan feb mar
apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun ave blvd rd a.m p.m u.s u.k u.n u.s.a d.c
n.y l.a ph.d m.d b.a m.a b.c a.d r.i.p
"""
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())
"""In small letters, without the last period."""
_STARTER_LIST = (
    "the he she it they we you this that these those there in on at if when while but and however also as after before for"
)
_STARTERS = frozenset(_STARTER_LIST.split())
"""Words that begin a sentence even after an abbreviation, when they have a capital."""
_PIECE = re.compile(r"\S+")
_END = re.compile(r"[.?!](?=[?!)\";}\]*:@'({\[]|$)")
_CLOSERS = "\"')]}"
_MARKS = "*:;@?!"
_NEXT = re.compile(r"[\"'`(\[{*]*(\S*)")
_INITIAL = re.compile(r"[^\W\d_]\.")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.")


def sentences(text: str) -> int:
    """Number of sentences: text ends one at a period, question mark or exclamation mark before a space or a closing mark.

    A period ends none after an abbreviation or an initial, unless a word with a capital follows that often begins a sentence; nor
    after an ellipsis or a number that a small letter follows. A line end is a space: headings belong to what follows them.
    """
    pieces = _PIECE.findall(text)
    said = [place for place, piece in enumerate(pieces) if piece.strip(_CLOSERS + _MARKS)]
    last = said[-1] if said else -1
    return sum(_ends_sentence(pieces, place, place < last) for place in range(len(pieces))) + bool(pieces)


def _ends_sentence(pieces: Sequence[str], place: int, goes_on: bool) -> bool:
    """Whether a sentence ends in a piece between spaces, at the last of its marks that can end one; `goes_on`: more follows."""
    piece = pieces[place]
    ends = [match.end() for match in _END.finditer(piece)]
    if not ends:
        return False
    token, rest = piece[: ends[-1]], piece[ends[-1] :].lstrip(_CLOSERS)
    if not rest.strip(_MARKS) and not goes_on:
        return False  # only closing marks follow: the last sentence goes on to the end
    if token[-1] != ".":
        return True
    after = (pieces[number].lstrip(_CLOSERS) for number in range(place + 1, len(pieces)))
    following = _following(rest or next(filter(None, after), ""))
    if token.endswith(".."):
        return following[:1].isupper() and following.lower() in _STARTERS
    word = token.lstrip("\"'([{*`").rstrip(".").lower()
    begins = following[:1].isupper() and following.strip(".,;:!?").lower() in _STARTERS
    if word in _ABBREVIATIONS or (_INITIAL.fullmatch(token) and token != "I."):
        return begins
    if _NUMBER.fullmatch(token):
        return not following[:1].islower()
    return True


def _following(rest: str) -> str:
    """The word after an end, without the marks that open it."""
    match = _NEXT.match(rest)
    return match[1] if match else ""


_SEPARATORS = re.compile(r"[\]\[(){}<>;@#$%&?!*\"“”„«»‘’`\u2012-\u2015]|--|\.{2,}|''|[:,](?!\d)")
_OPENING_APOSTROPHE = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=[^\s'])('[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T|')(?=\s)")
_CONTRACTION = re.compile(
    r"(?i)\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b|\b(wan)(na)(?=\s)"
    r"|(?<=\s)('t)(is)\b|(?<=\s)('t)(was)\b"
)


def capital_words(text: str) -> int:
    """Number of words in capitals, as the Penn Treebank cuts words: I'M and CANNOT are two, U.S. and AND/OR one."""
    text = _SEPARATORS.sub(" ", text)
    text = _OPENING_APOSTROPHE.sub("' ", text)
    text = f" {' '.join(text.split())} "
    text = _CLITIC.sub(r" \1 ", text)
    text = _CONTRACTION.sub(lambda match: " " + " ".join(part for part in match.groups() if part) + " ", text)
    return sum(word.isupper() for word in text.split())
