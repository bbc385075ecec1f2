"""What is changed in documents that are kept: encodings mended, personal data replaced, boilerplate lines taken out.

Line ends and indentation stay. Replacements are fixed, so that the same document always gives the same text.
"""

import contextlib
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.formatters import FTFYFormatter

from keural.data.cleaning.blocks import Account
from keural.data.cleaning.private import mask, without_boilerplate


class Formatter(PipelineStep):
    """Changes documents by the kind of their source: prose is mended and freed of boilerplate, personal data goes everywhere."""

    type = "FORMAT"
    name = "formatter"

    def __init__(self, personal_data: bool, account: Account | None = None) -> None:
        super().__init__()
        self._personal_data, self._account = personal_data, account
        self._mend = FTFYFormatter()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Any:
        """See `PipelineStep.run`."""
        with self._account or contextlib.nullcontext() as account:
            for document in data:
                before, document.text = document.text, self.format(document.text, document.metadata["kind"])
                if document.text.strip():
                    yield document
                elif account is not None:
                    account.add(document.metadata["place"], "only_boilerplate", document.metadata["where"], before, rank)

    def format(self, text: str, kind: str) -> str:
        """The text as it is kept."""
        prose = kind != "code"  # in code, four numbers with dots are a version as often as an address
        if prose:
            text = without_boilerplate(self._mend.format(text))
        return mask(text, addresses=prose) if self._personal_data else text
