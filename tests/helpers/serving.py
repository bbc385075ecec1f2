"""A server on a free port of this machine, and a network that writes what a test wants."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import uvicorn.server
from torch import Tensor

from keural.serve.batching.slots import Row, Slots
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.running import Server
from keural.serve.server.service import Service
from keural.serve.server.settings import Limits
from keural.serve.server.start import bind
from keural.serve.upstream.runner import Upstreams
from keural.tokenizer import KeuralTokenizer

PATIENCE = 120.0
"""Seconds to wait for what must come: a test says that it comes, not how soon, and the machine may be busy."""
SURE = 30.0
"""Logit of the token that is meant; the others have 0."""
JSON = {"content-type": "application/json"}


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(min(seconds, 0.01))


# uvicorn looks ten times a second whether it is to end, and waits as long again before it does; here hundreds of servers are ended.
uvicorn.server.asyncio = SimpleNamespace(**vars(asyncio) | {"sleep": _sleep})  # type: ignore[assignment, attr-defined]


class Writing:
    """Slots of a network that writes one text, whatever it was asked: after each part of it the next token, then the end."""

    def __init__(
        self,
        tokenizer: KeuralTokenizer,
        text: str | Sequence[int],
        count: int = 2,
        context_length: int = 400,
        before_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.count, self.context_length, self.batch_tokens, self.alone_tokens = count, context_length, 64, 64
        self.on_processors = False
        self.ids = [*(tokenizer.encode(text) if isinstance(text, str) else text), tokenizer.im_end_id]
        self.held: list[list[int]] = [[] for _ in range(count)]
        self.before_step, self.vocab_size = before_step, tokenizer.vocab_size
        self.prompts: list[list[int]] = []
        """Whatever was read up to where an answer began."""

    def step(self, rows: Sequence[Row]) -> Tensor:
        """See `Slots.step`."""
        self.before_step()
        for row in rows:
            self.held[row.slot] += row.ids
        wanted = [self.held[row.slot] for row in rows if row.wants_logits]
        logits = torch.zeros(len(wanted), self.vocab_size)
        for place, held in enumerate(wanted):
            done = max(length for length in range(len(self.ids)) if held[len(held) - length :] == self.ids[:length])
            logits[place, self.ids[done]] = SURE
            if done == 0:
                self.prompts.append(list(held))
        return logits

    def cut(self, slot: int, length: int) -> int:
        """See `Slots.cut`."""
        del self.held[slot][length:]
        return len(self.held[slot])

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Slots.copy`."""
        self.held[target] = self.held[source][:length]
        return len(self.held[target])


def service_of(tokenizer: KeuralTokenizer, slots: Slots | Upstreams, **settings: Any) -> Service:
    """A service with greedy settings; keywords change it."""
    given: dict[str, Any] = {"name": "tiny", "defaults": SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=200)}
    return Service(tokenizer, slots, **(given | settings))


@contextlib.contextmanager
def serving(service: Service) -> Iterator[httpx.Client]:
    """The service on a free port; gives a client of it."""
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # the system takes no megabytes for a client who reads nothing
    server = Server(service, listener)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=PATIENCE) as client:
            yield client
    finally:
        service.draining = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def quick(**limits: Any) -> Limits:
    """Limits of which only those in time that are given, and the end, are ever reached."""
    never = dict.fromkeys(("header_seconds", "body_seconds", "send_seconds", "idle_seconds"), 10 * PATIENCE)
    return Limits(**({"drain": 0.2} | never | limits))


def events(text: str) -> list[str]:
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
