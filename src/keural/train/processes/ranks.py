"""The ranks of a run: one process or many.

In: torchrun's environment. Out: the process group, and this process among all.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from keural.errors import UserError
from keural.terminal import say
from keural.train.processes.modes import processes_started

T = TypeVar("T")


TIMEOUT = datetime.timedelta(hours=6)
"""Rank 0 tokenises corpora and hashes checkpoints while the others wait for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def log_once(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_main:
            say(text)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, the same on each; it replaces the tensor's values."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each of some flags whether it is set on any rank; asked for at once."""
        return [bool(number > 0) for number in self.sum(torch.tensor([float(flag) for flag in flags], device=self.device)).tolist()]

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and give its (picklable) result, or its `UserError` (one it tells itself), to every rank."""
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1], told=True)
        found: T = outcome[0]
        return found


def pick_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def session() -> Iterator[Ranks]:
    """The ranks of this run, from torchrun's environment; inside another session, that one's. The process group ends with the
    block.
    """
    world, device = processes_started(), pick_device()
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), world, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
