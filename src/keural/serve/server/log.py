"""The log: one JSON object a line on standard error, without what anybody wrote and without keys.

In: entries, and what libraries report through `logging`. Out: lines.
"""

import json
import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keural.terminal import note


def write_entry(entry: Mapping[str, Any]) -> None:
    """Write one entry."""
    note(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}, default=str))


class Lines(logging.Handler):
    """Writes what libraries report as entries; of an exception its type and where it was raised, not its text, which may quote."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        entry: dict[str, Any] = {"event": "log", "level": record.levelname.lower(), "logger": record.name, "message": record.msg}
        if record.exc_info and record.exc_info[1] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            entry["error"] = type(record.exc_info[1]).__name__
            entry["at"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-8:]]
        write_entry(entry)


def set_up_logging() -> None:
    """Let warnings and errors of the server and its libraries become entries."""
    for name in ("keural", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [Lines()]
        logger.setLevel(logging.WARNING)
        logger.propagate = False
