"""An engine as a process of ours: started, watched, started again when it dies, and ended with us.

In: how it is started. Out: whether it runs, and the last it said. It gets a key that nobody else knows, a session of its own, so
that Ctrl-C reaches us alone and its answers may end, and on Linux a signal when we die, however that happens.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keural.serve.upstream.contract import Launch

LAST_LINES = 20
LONGEST_LINE = 2000
END_SECONDS = 15.0
"""For its end after a signal, before it is killed."""
GUARD = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Lets the kernel end what is started here when the thread that started it does."""

Log = Callable[[Mapping[str, Any]], None]


class Child:
    """A process; its methods belong to one loop, that of the thread which lives as long as the child shall."""

    def __init__(self, launch: Launch, log: Log) -> None:
        self._launch, self._log = launch, log
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._config: Path | None = None
        self.restarts = 0
        """Times that it was started again."""
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        """What it wrote last."""

    async def start(self) -> None:
        """Start it. Raises OSError."""
        self.last.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-E", "-c", GUARD, str(os.getpid()), *self._launch.command, *self._write_config(),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._launch.variables}, start_new_session=True,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._read(self._process))

    def _write_config(self) -> list[str]:
        """The arguments that name a file which only we can read."""
        self.settled()
        if self._launch.config is None:
            return []
        option, content = self._launch.config
        descriptor, name = tempfile.mkstemp(prefix="keural-engine-", suffix=".yaml")
        self._config = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        return [option, name]

    def settled(self) -> None:
        """It has read what it was given: remove the file."""
        if self._config is not None:
            self._config.unlink(missing_ok=True)
            self._config = None

    @property
    def exit(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.returncode

    async def wait(self) -> int:
        """Wait for its end; gives the exit code."""
        assert self._process is not None
        return await self._process.wait()

    async def said(self) -> list[str]:
        """The last lines of one that has ended."""
        if self._reading is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._reading), 1.0)
        return list(self.last)

    async def stop(self) -> None:
        """End it and what it has started."""
        self.settled()
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            self._log({"event": "engine", "message": f"did not end within {END_SECONDS:.0f} s and is killed"})
        self._signal(signal.SIGKILL)
        await self._process.wait()
        if self._reading is not None:
            self._reading.cancel()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what it writes, a line an entry of the log."""
        assert process.stdout is not None
        rest = b""
        while piece := await process.stdout.read(65_536):
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-LONGEST_LINE:]
            for line in lines:
                self._note(line)
        self._note(rest)

    def _note(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()[:LONGEST_LINE]
        if text:
            self.last.append(text)
            self._log({"event": "engine", "message": text})


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def end_of(code: int) -> str:
    """How a process ended, in words."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
