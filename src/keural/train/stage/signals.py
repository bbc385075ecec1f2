"""What is around a stage: signals that stop it after a step, and algorithms that give the same bits again."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import torch


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP (a closed terminal) instead of dying of them; only the main thread can listen.

    A second signal has its usual effect, except among several ranks: torchrun sends every worker another one at once. SIGHUP
    stays ignored where it is, as under nohup.
    """

    def __init__(self, world: int = 1) -> None:
        self.requested = False
        self._once = world == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._once:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms inside the block: enforced on a CPU; on an accelerator chosen where they exist, with a warning
    elsewhere.
    """
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    memory.fill_uninitialized_memory = False  # only costs time: nothing here reads memory it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = filled
