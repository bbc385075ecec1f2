"""What the benchmarks of `keural serve` share: a client that costs little, servers in processes of their own, and how tables begin.

In: a port and requests. Out: what came, counted and timed.
"""

import asyncio
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
TICKS = os.sysconf("SC_CLK_TCK")
DATA, DONE = b"data: ", b"data: [DONE]"
EMPTY = (b'"content":""', b'"text":""', b'"content":null')
"""What stands in events that carry no text of an answer."""


@dataclass
class Reply:
    """What came of a request; seconds count from before the connection was made."""

    status: int = 0
    """0: the server closed the connection without an answer."""
    events: int = 0
    """Server-sent events, without the last mark."""
    done: bool = False
    """Whether the stream came to its mark."""
    first: float | None = None
    """Seconds to the first event with text."""
    seconds: float = 0.0
    last: bytes = b""
    """The last event, or the body of an answer that is no stream."""
    arrivals: list[float] = field(default_factory=list)
    """When each event came, by `time.perf_counter`."""

    def json(self) -> Any:
        """The body, or the last event."""
        return json.loads(self.last.removeprefix(DATA))


async def ask(
    port: int, path: str, body: dict[str, Any] | bytes | None = None, *, headers: str = "", leave_after: int | None = None
) -> Reply:
    """Post a body (None: get), on a connection of its own, and read what comes; leave after so many events if that is said."""
    reply, begun = Reply(), time.perf_counter()
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(head.encode() + b"\r\n" + data)
        status = await reader.readline()
        reply.status = int(status.split()[1]) if status else 0
        streamed = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            streamed |= b"text/event-stream" in line
        if streamed:
            await _read_events(reader, reply, begun, leave_after)
        else:
            reply.last = await reader.read()
    except ConnectionError:
        pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    reply.seconds = time.perf_counter() - begun
    return reply


async def _read_events(reader: asyncio.StreamReader, reply: Reply, begun: float, leave_after: int | None) -> None:
    async for line in reader:
        if not line.startswith(DATA):
            continue
        if line.startswith(DONE):
            reply.done = True
            continue
        now = time.perf_counter()
        if reply.first is None and not any(mark in line for mark in EMPTY):
            reply.first = now - begun
        reply.events, reply.last = reply.events + 1, line
        reply.arrivals.append(now)
        if leave_after is not None and reply.events >= leave_after:
            return


class Server:
    """A process that answers on a port."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_mb(self) -> float:
        """Memory that it has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def get(self, path: str) -> bytes:
        """The body at an address."""
        with urlopen(f"http://{HOST}:{self.port}{path}", timeout=30) as answer:
            found: bytes = answer.read()
        return found

    def metrics(self, prefix: str = "keural:") -> dict[str, float]:
        """Its counters by name, without the prefix, summed over labels."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith(prefix):
                name = line.removeprefix(prefix).partition("{")[0].partition(" ")[0]
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        return found


@contextlib.contextmanager
def started(command: Sequence[str], port: int, log: Path, seconds: float = 300) -> Iterator[Server]:
    """A server's process from when it answers `/health`; it is told to end when the block ends. Either may take so many seconds."""
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env=environment())
    server = Server(process, port)
    try:
        end = time.monotonic() + seconds
        while not _answers(server):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"did not start: {shlex.join(command)}\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """That of a process that is timed: its threads wait as its libraries mean them to."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def end_gently() -> None:
    """Let a signal to end this process end its servers first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _answers(server: Server) -> bool:
    try:
        return bool(server.get("/health"))
    except (URLError, ConnectionError, TimeoutError):  # a large model takes its time to be read
        return False


def heading(title: str, packages: Sequence[str] = ()) -> str:
    """The head of a page of results: what was run, of what, on what."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    command = " ".join(Path(part).name if part.startswith("/") else part for part in sys.argv[1:])
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)]
    return (
        f"# {title} — {platform.machine()}, {time.strftime('%Y-%m-%d')}\n\n"
        f"    python benchmarks/{Path(sys.argv[0]).name} {command}\n\n"
        f"Commit {commit.stdout.strip() or 'unknown'}; {_processor()}, {len(os.sched_getaffinity(0))} CPUs, load average "
        f"{os.getloadavg()[0]:.1f} at the start; {', '.join(versions)}.\n"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def part_of(values: Sequence[float], part: float) -> float:
    """The value that `part` of all values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
