"""Processes that are killed at a planted place of writing a checkpoint."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keural.train.checkpoints import checkpoints, writing
from keural.train.checkpoints.checkpoints import Checkpoints
from keural.train.checkpoints.writing import Buffers, Note
from tests.helpers.train_small import train_and_save

Plant = Callable[[Callable[[], None]], None]
"""Puts a call of a function at its place."""


def before(owner: Any, name: str) -> Plant:
    def plant(strike: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def patched(*arguments: Any, **keywords: Any) -> Any:
            strike()
            return original(*arguments, **keywords)

        setattr(owner, name, patched)

    return plant


def after(owner: Any, name: str) -> Plant:
    def plant(strike: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def patched(*arguments: Any, **keywords: Any) -> Any:
            found = original(*arguments, **keywords)
            strike()
            return found

        setattr(owner, name, patched)

    return plant


def half_a_file(strike: Callable[[], None]) -> None:
    """The process has written the beginning of a file."""

    def patched(path: Path, pieces: Any, go_on: Callable[[], None]) -> str:
        path.write_bytes(b"half")
        strike()
        found: str = original(path, pieces, go_on)
        return found

    module: Any = writing
    original = module.write_file
    module.write_file = patched


POINTS: dict[str, Plant] = {
    "before the copy": before(Buffers, "copy"),
    "after the copy": after(Buffers, "copy"),
    "in a file": half_a_file,
    "before the note": before(Note, "write"),
    "after the note": after(Note, "write"),
    "before the manifest": before(Checkpoints, "_finish"),
    "before the name": before(checkpoints, "flush_directory"),
    "after the name": before(checkpoints, "flush"),
    "after old ones are deleted": after(Checkpoints, "_finish"),
}


def train_killed(point: str, occasion: int, spec: dict[str, Any], rank: int = 0) -> None:
    """Train a job of `train_and_save`; on the given rank the process is killed when the `occasion`-th checkpoint is at `point`."""
    count = [0]

    def strike() -> None:
        count[0] += 1
        if count[0] == occasion:
            os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ.get("RANK", "0")) == rank:
        POINTS[point](strike)
    train_and_save(**spec)
