"""Checkpoints that are kept no longer, and what killed processes left: deleted, or said to be there.

In: directories. Out: nothing is left of them, or a line for a person. What cannot be deleted is no reason to stop training, nor to
call the newer checkpoint, which is whole by then, one that could not be written.
"""

import shutil
from collections.abc import Callable
from pathlib import Path


class Unneeded:
    """Deletes directories, and remembers those that the system does not let go."""

    def __init__(self) -> None:
        self._stuck: dict[Path, str] = {}
        self._said: set[Path] = set()

    def discard(self, directory: Path, hidden: Path) -> None:
        """Delete a checkpoint: it is renamed to `hidden` first, so that one that is half deleted is none."""
        try:
            directory.rename(hidden)
        except OSError as error:
            self._stuck[directory] = error.strerror or str(error)
        else:
            self.delete(hidden)

    def delete(self, directory: Path) -> None:
        """Delete a directory."""
        try:
            shutil.rmtree(directory)
        except OSError as error:
            self._stuck[directory] = error.strerror or str(error)

    def say(self, log: Callable[[str], None]) -> None:
        """Say of each directory that could not be deleted that it is there, once."""
        for directory in self._stuck.keys() - self._said:
            self._said.add(directory)
            log(
                f"{directory}: is needed no longer and cannot be deleted ({self._stuck[directory]}); delete it yourself, it takes "
                "the space of a checkpoint. Newer checkpoints are whole, and training goes on"
            )
