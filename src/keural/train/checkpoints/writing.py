"""A checkpoint that is written while training goes on.

In: this rank's pieces. Out: files, written by a thread. The pieces are copied to buffers on the host while the next step's forward
and backward passes run, and only the change of the weights at its end waits for the copy (`wait_for_copy`). Then the files are
written. Each rank leaves a note of its files and their SHA-256; when all ranks' notes are there, rank 0's thread writes the
manifest and gives the directory its name. The threads need no communication, so a checkpoint becomes whole whatever the ranks do.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from keural.errors import UserError
from keural.files import CheckedFile
from keural.train.checkpoints.pieces import Piece, file_name, in_files, write_file

PAUSE = 0.05
"""Seconds between two looks for the notes of other ranks."""
PATIENCE = 60.0
"""So many seconds a process that ends waits for the checkpoint that is being written."""
ROOM = 0.8
"""Share of the host's free memory that buffers may take."""


class Note(CheckedFile):
    """What a rank has written: `note-00000.json`, until the checkpoint is whole."""

    files: dict[str, str]


class Given(Exception):
    """The checkpoint has been given up."""


def note_name(rank: int) -> str:
    """The file of a rank's note."""
    return f"note-{rank:05d}.json"


class Buffers:
    """Memory on the host for copies of a rank's pieces, the same for every checkpoint; pinned where they come from a device."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def make(self, pieces: Sequence[Piece]) -> None:
        """Have room for these pieces."""
        for name, _, values in pieces:
            if name not in self._kept:
                self._kept[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)

    def copy(self, pieces: Sequence[Piece], ready: torch.cuda.Event | None) -> list[Piece]:
        """The pieces with values of their own, once `ready` has happened on the device."""
        self.make(pieces)
        copies = [Piece(name, offsets, self._kept[name]) for name, offsets, _ in pieces]
        if ready is None:
            for piece, copied in zip(pieces, copies, strict=True):
                copied.values.copy_(piece.values)
            return copies
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for piece, copied in zip(pieces, copies, strict=True):
                copied.values.copy_(piece.values, non_blocking=True)
        stream.synchronize()
        return copies


class Writing:
    """One checkpoint on its way to the disk.

    Args:
        directory: the temporary one, which is there.
        pieces: of this rank.
        rank: this one.
        world: ranks that write into it.
        buffers: where pieces are copied to; None: they are written as they lie, and the copy takes until all is written.
        finish: on rank 0, what makes a directory with all files a checkpoint; it gets their SHA-256 by name.
        device: of the pieces.
    """

    def __init__(
        self,
        directory: Path,
        pieces: Sequence[Piece],
        rank: int,
        world: int,
        buffers: Buffers | None,
        finish: Callable[[dict[str, str]], None] | None,
        device: torch.device,
    ) -> None:
        self._directory, self._rank, self._world, self._buffers, self._finish = directory, rank, world, buffers, finish
        self.error: BaseException | None = None
        self._copied, self._stopped = threading.Event(), threading.Event()
        self._deadline = float("inf")
        ready = None
        if device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        # a daemon: a process that must end at once is not kept by it
        self._thread = threading.Thread(target=self._run, args=(list(pieces), ready, device), name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no further thread may be started: told like every other failure, so that no rank waits
            self.error = error
            self._copied.set()

    @property
    def is_done(self) -> bool:
        """Whether this rank's part is over, well or not; of rank 0 the whole checkpoint."""
        return not self._thread.is_alive()

    def wait_for_copy(self) -> None:
        """Wait until the tensors may be changed."""
        self._copied.wait()

    def wait_a_while(self) -> None:
        """Wait until this rank's part is over, but not for long."""
        self._join(1.0)

    def give_up(self) -> None:
        """Let it end without a checkpoint."""
        self._stopped.set()

    def leave(self) -> None:
        """Wait for it, `PATIENCE` long where another rank's part does not come: the process is going to end."""
        self._deadline = time.monotonic() + PATIENCE
        self._join()

    def _join(self, seconds: float | None = None) -> None:
        if not self.is_done:
            self._thread.join(seconds)

    def _run(self, pieces: list[Piece], ready: "torch.cuda.Event | None", device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            if self._buffers is not None:
                pieces = self._buffers.copy(pieces, ready)
                self._copied.set()
            elif ready is not None:
                ready.synchronize()
            groups, files = in_files(pieces), {}
            for number, group in enumerate(groups):
                name = file_name(self._rank, number, len(groups))
                files[name] = write_file(self._directory / name, group, self._go_on)
            Note(files=files).write(self._directory / note_name(self._rank))
            if self._finish is not None:
                self._finish(self._all_files())
        except BaseException as error:  # told by whoever waits for the checkpoint
            self.error = error
        finally:
            self._copied.set()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise Given

    def _all_files(self) -> dict[str, str]:
        """The files of all ranks, when all are written; their notes are gone then."""
        notes = [self._directory / note_name(rank) for rank in range(self._world)]
        while not all(note.is_file() for note in notes):
            self._go_on()
            if time.monotonic() > self._deadline:
                raise UserError(f"{self._directory}: not all ranks have written their part")
            time.sleep(PAUSE)
        files: dict[str, str] = {}
        for note in notes:
            files |= Note.read(note).files
        for note in notes:
            note.unlink()
        return files


def has_room(number: int) -> bool:
    """Whether the host has memory for so many bytes more; where nobody can tell, it is taken to have."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return number * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < ROOM * free
    return True
