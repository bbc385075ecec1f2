"""Between the thread of the network and the loop of the server: requests go one way, tokens the other.

In: requests. Out: answers, which a coroutine takes as they come. Nobody waits for a slow reader: what came meanwhile lies in its
answer, at most one context of tokens, and is taken at once.
"""

import asyncio
import contextlib
import ctypes
import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from keural.serve.batching.requests import Chosen, End, Event, Request
from keural.serve.batching.runner import Deliver, Runner, Ticket

log = logging.getLogger("keural.serve")


class Answer:
    """One answer under way."""

    def __init__(self) -> None:
        self._tokens: list[Chosen] = []
        self._is_new = False
        self._waiter: asyncio.Future[None] | None = None
        self.ended: Event | None = None

    def put(self, event: Event) -> None:
        """Add what the network did."""
        self._tokens += event.tokens
        if event.end is not None:
            self.ended = event
        self._is_new = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> tuple[list[Chosen], Event | None]:
        """Wait for news; gives the tokens that came, and the last event if the answer has ended."""
        if not self._is_new:
            await self._news()
        self._is_new = False
        tokens, self._tokens = self._tokens, []
        return tokens, self.ended

    async def wait(self, seconds: float) -> None:
        """Wait for news, so long at most; they are left where they are."""
        if not self._is_new:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news(), seconds)

    async def _news(self) -> None:
        """Wait until there are some; one coroutine waits at a time."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    @property
    def end(self) -> End | None:
        """Why it ended; None while it goes on."""
        return self.ended.end if self.ended else None


class Answers:
    """The answers of a runner whose events come to the running loop."""

    def __init__(self, make: Callable[[Deliver], Runner], observe: Callable[[Ticket, Event], None]) -> None:
        """`make` gives the runner, which hands events to what it is given; `observe` hears of every event, in the loop."""
        self.scheduler = make(self._deliver)
        self._observe = observe
        self._open: dict[Ticket, Answer] = {}
        self._mail: deque[Sequence[tuple[Ticket, Event]]] = deque()
        self._ring: Callable[[], None] = lambda: None
        self.last_news = time.monotonic()
        """When the network last did something, or was first asked again."""

    def start(self) -> None:
        """Start the network's thread; events come to the loop that runs now."""
        self._ring = bell(asyncio.get_running_loop(), self._hand_out)
        self.scheduler.start()

    @property
    def open(self) -> int:
        """Answers that have not ended."""
        return len(self._open)

    @contextlib.asynccontextmanager
    async def ask(self, requests: Sequence[Request]) -> AsyncIterator[list[tuple[Ticket, Answer]]]:
        """The answers to requests; those that have not ended when the block ends are cancelled.

        Raises as `Scheduler.submit` does.
        """
        tickets = self.scheduler.submit(requests)
        asked = [(ticket, Answer()) for ticket in tickets]
        if not self._open:
            self.last_news = time.monotonic()
        self._open |= asked  # no event is in the loop yet: this function has not given way since
        try:
            yield asked
        finally:
            for ticket, answer in asked:
                if answer.ended is None:
                    self.scheduler.cancel(ticket)

    def position(self, ticket: Ticket) -> int | None:
        """Its place among those that wait, 1 for the next one; None for one that does not wait (any more)."""
        if ticket.started is not None or ticket not in self._open:
            return None
        before = itertools.takewhile(lambda other: other is not ticket, self._open)
        return 1 + sum(other.started is None and not other.cancelled for other in before)

    async def close(self, seconds: float) -> None:
        """Let answers go on for so long, cut the others off, and stop the network's thread."""
        await asyncio.to_thread(self.scheduler.close, seconds)
        self._hand_out()

    def _deliver(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        """Called by the network's thread, which goes on with its next step at once; once for all answers of a step."""
        self._mail.append(events)
        if len(self._mail) <= 1:  # otherwise the loop was called and has not come yet
            self._ring()

    def _hand_out(self) -> None:
        """Empty the mail, whatever happens to an event: as long as something lies there nobody rings."""
        self.last_news = time.monotonic()
        while self._mail:
            for ticket, event in self._mail.popleft():
                try:
                    self._observe(ticket, event)
                except Exception:  # an error of ours: the log says where, and the answer goes on
                    log.exception("an event was not counted")
                self._open[ticket].put(event)
                if event.end is not None:
                    del self._open[ticket]


def bell(loop: asyncio.AbstractEventLoop, heard: Callable[[], None]) -> Callable[[], None]:
    """What another thread calls for the loop to call `heard` soon, perhaps once for several times.

    `loop.call_soon_threadsafe` writes to a socket, and Python gives up its lock for that: the loop wakes, takes the lock, and
    writes to every client before the thread goes on. Here the lock is kept, where the system's library can be called so.
    """
    listening, ringing = socket.socketpair()
    listening.setblocking(False)
    ringing.setblocking(False)

    def hear() -> None:
        with contextlib.suppress(BlockingIOError):
            listening.recv(64)
        heard()

    try:
        write = ctypes.PyDLL(None).write
        loop.add_reader(listening, hear)
    except (AttributeError, NotImplementedError, OSError, TypeError):  # not a Unix
        return lambda: _tell(loop, heard)
    write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]

    def ring() -> None:
        if write(ringing.fileno(), b"!", 1) != 1:  # full, so that the loop is called already; or the system has no memory for it
            _tell(loop, heard)

    return ring


def _tell(loop: asyncio.AbstractEventLoop, heard: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
        loop.call_soon_threadsafe(heard)
