"""The account of a cleaning, as it is kept on disk.

In: counts. Out: `cleaning.json`, checked when it is read; it needs nothing that cleaning itself needs.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from keural.files import CheckedFile

SUMMARY = "cleaning.json"


class CleanedSource(BaseModel):
    """What cleaning did with the rows of a source."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rows: int
    kept: int
    drops: dict[str, int]
    unreadable: dict[str, int]
    """Those of the drops that are defects of the source."""
    first: dict[str, str]
    """Place of the first drop, by reason."""


class CleaningFile(CheckedFile):
    """`cleaning.json`, written last."""

    remedy: ClassVar[str] = "delete the directory that it is in and run the same command again"

    sources: dict[str, CleanedSource]
    examples: dict[str, list[dict[str, Any]]]
    """Dropped documents, shortened, by reason."""
    files: dict[str, str]
    """SHA-256 of every file of documents, by its path below the directory."""
