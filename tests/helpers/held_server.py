"""A server with a network whose steps can be held up, and what is sent to it byte by byte.

In: a tokenizer. Out: servers that are stopped in the middle of whatever they do, and answers as bytes.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import PATIENCE, Writing, quick, service_of, wait_until

HELLO = [{"role": "user", "content": "hello"}]
LONG = "the cat " * 40
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Held:
    """Lets steps of a network through while it is open."""

    def __init__(self) -> None:
        self.open, self.steps = threading.Event(), 0
        self.shuts_at: int | None = None
        """The step before which it closes by itself, so that an answer is under way as long as a test wants."""
        self.open.set()

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == self.shuts_at:
            self.open.clear()
        time.sleep(0.002)
        assert self.open.wait(2 * PATIENCE)

    def wait_shut(self) -> None:
        """Wait until it has closed by itself."""
        wait_until(lambda: not self.open.is_set())


class LaterClock:
    """The time of this machine, and as much more as a test lets pass."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


class Running:
    """A server with a network whose steps can be held up."""

    def __init__(self, tokenizer: KeuralTokenizer, text: str = LONG, **settings: Any) -> None:
        self.held = Held()
        self.slots = Writing(tokenizer, text, before_step=self.held)
        self.log: list[Any] = []
        self.service: Service = service_of(tokenizer, self.slots, **({"limits": quick(), "log": self.log.append} | settings))

    @property
    def running(self) -> int:
        """Answers that have not ended."""
        return self.service.answers.open


Start = Callable[..., tuple[Running, httpx.Client]]


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3} | fields)


def raw(client: httpx.Client, *parts: bytes, pause: float = 0.0, seconds: float = PATIENCE) -> bytes:
    """Send bytes, and everything that comes back until the server closes, or nothing where it waits for more."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                found += part
        return found


@contextlib.contextmanager
def in_background(calls: list[Callable[[], Any]]) -> Iterator[list[Any]]:
    """Runs calls in threads; what they gave is there after the block."""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda call=call: found.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for thread in threads:
            thread.join(2 * PATIENCE)


def error_of(answer: bytes) -> tuple[int, str]:
    """Status and code of an error that came back as bytes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def connect(client: httpx.Client, seconds: float = PATIENCE) -> socket.socket:
    """A connection to the server."""
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=seconds)


def check_whole(running: Running, client: httpx.Client) -> None:
    """Nothing is lost: no answer is under way, no slot is held, and every slot answers."""
    wait_until(lambda: running.running == 0)
    assert running.service.answers.scheduler.running == running.service.answers.scheduler.waiting == 0
    assert ask(client, n=running.slots.count).status_code == 200
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
