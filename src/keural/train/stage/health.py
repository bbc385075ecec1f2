"""What keeps a stage from harm: steps that are not taken, a rank that does not come back, memory and disks that are too small.

In: the figures of a step before it is taken, signs of life, what checkpoints weigh. Out: whether the step is taken; the end of a
process that is stuck, with the place where it is; a `UserError` before the first step instead of a full disk after the tenth hour.
"""

import contextlib
import faulthandler
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from types import TracebackType
from typing import Self

import torch

from keural.errors import UserError
from keural.terminal import note

WINDOW, FEWEST = 128, 64
"""A step is compared with so many before it that were taken, and not before there are so many."""
IN_A_ROW = 10
"""So many steps in a row that are not taken are no spike: the stage stops."""
NARROWEST = 1e-3
"""A standard deviation counts as at least this share of the mean: figures that hardly vary are not left by rounding."""
STUCK = 3
"""Exit code of a process that was stuck."""


@dataclass
class SpikeGuard:
    """Which steps are spikes: those whose loss or gradient norm lies more than `sigmas` standard deviations above the mean of the
    `WINDOW` steps before that were taken (Groeneveld et al. 2025, OLMo 2, use 6). None: none is.
    """

    sigmas: float | None = None
    taken: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the latest steps that were taken, in order."""
    in_a_row: int = 0
    """Latest steps that were not."""

    def spike(self, loss: float, gradient_norm: float) -> str | None:
        """What of a step is a spike; None where nothing is. The step is remembered, so this is asked once for each."""
        if self.sigmas is None:
            return None
        found = self._found(("loss", loss), ("gradient norm", gradient_norm))
        if found is None:
            self.taken = [*self.taken, [loss, gradient_norm]][-WINDOW:]
        self.in_a_row = self.in_a_row + 1 if found else 0
        return found

    def _found(self, *figures: tuple[str, float]) -> str | None:
        assert self.sigmas is not None
        if len(self.taken) < FEWEST:
            return None
        for (name, value), before in zip(figures, zip(*self.taken, strict=True), strict=True):
            mean = fmean(before)
            deviation = max(pstdev(before, mean), NARROWEST * abs(mean))
            if value > mean + self.sigmas * deviation:
                return f"{name} {value:.4g} where the steps before have {mean:.4g} ± {deviation:.2g}"
        return None


class Watchdog:
    """Ends the process when no sign of life came for `seconds`: a rank whose partner is gone waits for hours otherwise.

    A context manager. It says which rank was stuck in what, and where all of its threads are; the exit code is `STUCK`.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._over = threading.Event()
        self._signs, self._doing = 0, "the start"

    def sign(self, doing: str) -> None:
        """The process lives, and begins `doing`."""
        self._signs, self._doing = self._signs + 1, doing

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    def _watch(self) -> None:
        pause = min(self._seconds / 4, 10.0)
        silent, seen, before = 0.0, self._signs, time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            silent = silent + min(now - before, 2 * pause) if seen == self._signs else 0.0  # to be suspended is not to be stuck
            seen, before = self._signs, now
            if silent > self._seconds:
                self._end()

    def _end(self) -> None:
        note(
            f"keural: error: rank {self._rank} is stuck: nothing happened for {self._seconds:g} s in {self._doing} "
            "(train.stuck_after); the same command goes on from the newest checkpoint. Where its threads are:"
        )
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(2, all_threads=True)  # the stream's number: whatever sys.stderr is by now
        os._exit(STUCK)


def free_bytes(directory: Path) -> int:
    """What can still be written where `directory` is or will be."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def check_disk(directory: Path, name: str, checkpoint: int, keep: int, there: int, model: int) -> None:
    """Refuse a stage whose checkpoints do not fit on the disk.

    Args:
        directory: of the stage.
        name: of the stage.
        checkpoint: bytes of one checkpoint.
        keep: checkpoints that are kept; one more is there while it is written.
        there: checkpoints that are there already.
        model: bytes of the model that the stage ends with.
    """
    needed, free = max(keep + 1 - there, 1) * checkpoint + model, free_bytes(directory)
    if needed > free:
        raise UserError(
            f"{directory}: {free / 1e9:.1f} GB are free, and {name} will write up to {needed / 1e9:.1f} GB (checkpoints of "
            f"{checkpoint / 1e9:.1f} GB each, {keep} that train.keep_checkpoints and train.keep_every keep and one more, and the "
            "model); free some space, or run it on another disk"
        )


@contextlib.contextmanager
def enough_memory(stage: str, what: str) -> Iterator[None]:
    """Inside the block, memory that runs out is a `UserError` that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"{stage}: memory ran out in {what} ({str(error).splitlines()[0][:200]}); lower train.micro_batch_tokens, set "
            "train.recompute: full, or take train.precision split (split-host where the host has memory)"
        ) from error
