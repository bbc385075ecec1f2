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


class TaskDrop(BaseModel):
    """Documents of one source that were dropped for one reason."""

    model_config = ConfigDict(strict=True, extra="forbid")

    place: int
    """Of the source in the recipe."""
    reason: str
    count: int
    first: str
    """Place of the first one."""


class TaskDrops(CheckedFile):
    """What one task of one step dropped; `work/drops/STEP-TASK.json`."""

    remedy: ClassVar[str] = "delete the directory `work` that it is in and run the same command again"

    drops: list[TaskDrop]
    examples: dict[str, list[dict[str, Any]]]
    """The first documents that were dropped, shortened, by reason; `source` is a place in the recipe."""


class TaskKept(CheckedFile):
    """Documents that one task kept, by the place of their source in the recipe; `work/kept/TASK.json`."""

    remedy: ClassVar[str] = TaskDrops.remedy

    kept: dict[str, int]


class CleaningFile(CheckedFile):
    """`cleaning.json`, written last."""

    remedy: ClassVar[str] = "delete the directory that it is in and run the same command again"

    sources: dict[str, CleanedSource]
    examples: dict[str, list[dict[str, Any]]]
    """Dropped documents, shortened, by reason."""
    files: dict[str, str]
    """SHA-256 of every file of documents, by its path below the directory."""
