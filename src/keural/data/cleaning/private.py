"""Private data replaced by fixed placeholders, and boilerplate of news removed. All patterns run in time linear in the text.

In: the text of a document. Out: the same without. What personal data is, `keural.data.filtering.personal` says for chats, too.
"""

import ipaddress
import re

from keural.data.filtering import personal

EMAIL, IP, PHONE, RESIDENT, ACCOUNT = "email@example.com", "192.0.2.1", "010-0000-0000", "000000-0000000", "000-00-000000"

_NEWS = re.compile(
    r"무단\s?(?:전재|복제|배포|전제)|재\s?배포\s?금지|저작권자\s?[ⓒ©(]|^\W{0,3}[가-힣]{2,4}\s?(?:인턴|수습|선임)?기자\W{0,3}\s*\S{1,64}@\S{1,80}\W{0,3}$"
    r"|^\W{0,3}\S{1,64}@\S{1,80}\s?(?:[가-힣]{2,4}\s?기자)?\W{0,3}$"
)
_LONGEST_BOILERPLATE = 120


def mask(text: str, addresses: bool = True) -> str:
    """The text with placeholders for e-mail and (with `addresses`) public IP addresses, Korean telephone numbers, resident
    registration numbers and account numbers that are named as such.
    """
    text = personal.EMAIL.sub(EMAIL, text) if "@" in text else text
    text = personal.IP.sub(_ip, text) if addresses else text
    text = personal.RESIDENT.sub(lambda match: RESIDENT if personal.is_resident(match) else match[0], text)
    text = personal.ACCOUNT.sub(rf"\g<1>{ACCOUNT}", text)
    return personal.PHONE.sub(PHONE, text)


def _ip(match: re.Match[str]) -> str:
    try:
        return IP if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]


def without_boilerplate(text: str) -> str:
    """The text without short lines that forbid copying or sign a report. Other lines stay as they are."""
    lines = text.split("\n")
    kept = [line for line in lines if len(line) > _LONGEST_BOILERPLATE or not _NEWS.search(line)]
    return text if len(kept) == len(lines) else "\n".join(kept)
