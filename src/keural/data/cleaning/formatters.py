"""What is changed in documents that are kept: encodings mended, personal data replaced, boilerplate lines taken out.

Line ends and indentation stay. Replacements are fixed, so that the same document always gives the same text.
"""

import re
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

_RESIDENT_NUMBER = re.compile(r"(?<!\d)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\s?[-–]\s?[1-8]\d{6}(?!\d)")
_PHONE = re.compile(r"(?<![\d-])(?:\+82[-\s.]?(?:\(0\))?|0)(?:1[016789]|2|[3-6]\d|70)[-\s.)]{1,2}\d{3,4}[-\s.]\d{4}(?![\d-])")
_MOBILE = re.compile(r"(?<!\d)01[016789]\d{7,8}(?!\d)")
_ACCOUNT = re.compile(r"((?:계좌|은행|농협|신협|우체국|새마을금고)[^\n\d]{0,20})\d{2,6}-\d{2,6}-\d{2,7}(?:-\d{1,5})?(?!\d)")
_COPYRIGHT = re.compile(
    r"무단\s*(?:전재|복제|배포|도용)|재배포\s*(?:를\s*)?금지|저작권자\s*[ⓒ©(:]|[ⓒ©]\s*\S.{0,60}(?:무단|all rights reserved)",
    re.IGNORECASE,
)
_REPORTER = re.compile(r"^[\s(\[=/]*[가-힣]{2,4}\s*(?:선임|전문|수습|인턴)?\s*(?:기자|특파원|앵커|리포터)[\s)\]=/:]*\S+@\S+\s*$")
BOILERPLATE_LENGTH = 120
"""Longer lines are text that speaks of copyright, not a notice of it."""


def without_personal_data(text: str) -> str:
    """Korean resident numbers, phone numbers and account numbers replaced by zeros of the same form."""
    text = _RESIDENT_NUMBER.sub("000000-0000000", text)
    text = _PHONE.sub("010-0000-0000", text)
    text = _MOBILE.sub("01000000000", text)
    return _ACCOUNT.sub(r"\g<1>000-000-000000", text)


def without_boilerplate(text: str) -> str:
    """The text without notices of copyright and reporters' address lines, as news sites put them under articles."""
    return "\n".join(line for line in text.split("\n") if not is_boilerplate(line))


def is_boilerplate(line: str) -> bool:
    """Whether a line is a copyright notice or a reporter's address."""
    return len(line) <= BOILERPLATE_LENGTH and bool(_COPYRIGHT.search(line) or _REPORTER.match(line))


class Formatter(PipelineStep):
    """Changes documents by the kind of their source: prose is mended and freed of boilerplate, personal data goes everywhere.

    `stats` count the documents that each change touched.
    """

    type = "FORMAT"
    name = "formatter"

    def __init__(self, personal_data: bool) -> None:
        super().__init__()
        self._personal_data = personal_data
        self._mend = FTFYFormatter()
        self._addresses = PIIFormatter(email_replacement="email@example.com", ip_replacement="22.214.171.124")

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Any:
        """See `PipelineStep.run`."""
        for document in data:
            document.text = self.format(document.text, document.metadata["kind"])
            yield document

    def format(self, text: str, kind: str) -> str:
        """The text as it is kept."""
        changes = [] if kind == "code" else [("mended", self._mend.format), ("boilerplate", without_boilerplate)]
        if self._personal_data:
            changes += [("personal_data", self._addresses.format), ("personal_data", without_personal_data)]
        for name, change in changes:
            changed = change(text)
            if changed != text:
                self.stat_update(name)
            text = changed
        return text
