"""Private data replaced by fixed placeholders, and boilerplate of news removed. All patterns run in time linear in the text."""

import ipaddress
import re
from datetime import date

EMAIL, IP, PHONE, RESIDENT, ACCOUNT = "email@example.com", "192.0.2.1", "010-0000-0000", "000000-0000000", "000-00-000000"

_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
_IP = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_RESIDENT = re.compile(r"(?<![\d-])(\d{6})([- ]?)([1-8]\d{6})(?![\d-]*\d)")
_PHONE = re.compile(
    r"(?<![\d-])(?:(?:\+82[- ]?|0)1[016789]([-. ]?)\d{3,4}\1\d{4}|0(?:2|[3-6][1-5]|70)[-.)] ?\d{3,4}[-.]\d{4})(?![\d-]*\d)"
)
_ACCOUNT = re.compile(r"((?:계좌(?:번호)?|은행|농협|뱅크|우체국|새마을금고|신협)[ :：]{0,3})\d{2,6}-\d{2,6}-\d{2,8}(?:-\d{1,4})?")
_NEWS = re.compile(
    r"무단\s?(?:전재|복제|배포|전제)|재\s?배포\s?금지|저작권자\s?[ⓒ©(]|^\W{0,3}[가-힣]{2,4}\s?(?:인턴|수습|선임)?기자\W{0,3}\s*\S{1,64}@\S{1,80}\W{0,3}$"
    r"|^\W{0,3}\S{1,64}@\S{1,80}\s?(?:[가-힣]{2,4}\s?기자)?\W{0,3}$"
)
_LONGEST_BOILERPLATE = 120


def mask(text: str, addresses: bool = True) -> str:
    """The text with placeholders for e-mail and (with `addresses`) public IP addresses, Korean telephone numbers, resident
    registration numbers and account numbers that are named as such.
    """
    text = _EMAIL.sub(EMAIL, text) if "@" in text else text
    text = _IP.sub(_ip, text) if addresses else text
    text = _RESIDENT.sub(_resident, text)
    text = _ACCOUNT.sub(rf"\g<1>{ACCOUNT}", text)
    return _PHONE.sub(PHONE, text)


def _ip(match: re.Match[str]) -> str:
    try:
        return IP if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]


def _resident(match: re.Match[str]) -> str:
    """Six digits that are a date and seven of which the first tells the century; without a hyphen the check digit must fit."""
    born, hyphen, rest = match.groups()
    century = {"1": 1900, "2": 1900, "5": 1900, "6": 1900}.get(rest[0], 2000)
    try:
        date(century + int(born[:2]), int(born[2:4]), int(born[4:]))
    except ValueError:
        return match[0]
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    digits = [int(digit) for digit in born + rest]
    fits = (11 - sum(w * d for w, d in zip(weights, digits, strict=False)) % 11) % 10 == digits[-1]
    return RESIDENT if hyphen or fits else match[0]


def without_boilerplate(text: str) -> str:
    """The text without short lines that forbid copying or sign a report. Other lines stay as they are."""
    lines = text.split("\n")
    kept = [line for line in lines if len(line) > _LONGEST_BOILERPLATE or not _NEWS.search(line)]
    return text if len(kept) == len(lines) else "\n".join(kept)
