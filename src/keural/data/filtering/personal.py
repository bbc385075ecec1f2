"""Personal data in Korean and English text: one set of patterns, which the gate of chats finds and the cleaning of documents masks.

In: text. Out: which kinds of personal data it holds. All patterns run in time linear in the text.

What differs: a chat is dropped or counted only for what is sure (`kinds_in`: addresses of e-mail, telephone numbers, resident
registration numbers with their hyphen). Documents lose more (`keural.data.cleaning.private`): also resident numbers without a
hyphen whose check digit fits, account numbers that are named as such, and addresses of computers. In chats these are sums,
versions and examples of networks as often as they are anybody's.
"""

import re
from collections.abc import Iterator
from datetime import date

EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
IP = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
RESIDENT = re.compile(r"(?<![\d-])(\d{6})([- ]?)([1-8]\d{6})(?![\d-]*\d)")
"""Born, what stands between, and the rest of a resident registration number; `is_resident` says whether it can be one."""
PHONE = re.compile(
    r"(?<![\d-])(?:(?:\+82[- ]?|0)1[016789]([-. ]?)\d{3,4}\1\d{4}|0(?:2|[3-6][1-5]|70)[-.)] ?\d{3,4}[-.]\d{4})(?![\d-]*\d)"
)
ACCOUNT = re.compile(r"((?:계좌(?:번호)?|은행|농협|뱅크|우체국|새마을금고|신협)[ :：]{0,3})\d{2,6}-\d{2,6}-\d{2,8}(?:-\d{1,4})?")
_DIGITS = re.compile(r"\d{4}")
_CENTURIES = {"1": 1900, "2": 1900, "5": 1900, "6": 1900}
_WEIGHTS = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)


def kinds_in(text: str) -> Iterator[str]:
    """The kinds of personal data that a text surely holds."""
    if "@" in text and EMAIL.search(text):
        yield "an e-mail address"
    if not _DIGITS.search(text):
        return
    if any(match[2] == "-" and is_resident(match) for match in RESIDENT.finditer(text)):
        yield "a resident registration number"
    if PHONE.search(text):
        yield "a telephone number"


def is_resident(match: re.Match[str]) -> bool:
    """Six digits that are a date and seven of which the first tells the century; without a hyphen the check digit must fit."""
    born, hyphen, rest = match.groups()
    try:
        date(_CENTURIES.get(rest[0], 2000) + int(born[:2]), int(born[2:4]), int(born[4:]))
    except ValueError:
        return False
    digits = [int(digit) for digit in born + rest]
    fits = (11 - sum(w * d for w, d in zip(_WEIGHTS, digits, strict=False)) % 11) % 10 == digits[-1]
    return bool(hyphen) or fits
