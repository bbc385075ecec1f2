"""Requests on servers elsewhere: a queue in the order of arrival, and for each request the server that suits it best.

In: requests, from any thread. Out: events. One thread with a loop of its own speaks to all servers, so that nothing that they do
holds up the server that clients speak to. A request goes to another server only while it has no token; after that its answer ends
with an error, for what another server would say goes on from another text.
"""

import asyncio
import contextlib
import functools
import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from keural.errors import UserError
from keural.serve.batching.requests import End, Event, Request
from keural.serve.batching.runner import Cancelled, Deliver, Pace, Stats, Ticket, Unhonoured
from keural.serve.engines.decoding import check_prompt
from keural.serve.upstream.child import Log
from keural.serve.upstream.client import Server
from keural.serve.upstream.contract import Failed, Garbage, Gone, Later, Part, Refused
from keural.serve.upstream.pool import Affinity

AFTERWARDS = 2.0
"""Seconds for what follows the end of an answer: the tokens that were held."""
Result = TypeVar("Result")

log = logging.getLogger("keural.serve")


class Upstreams:
    """Servers of one model; a `Runner`. It has its thread from the start on; `stop` ends it."""

    def __init__(
        self, servers: Sequence[Server], model: str, vocab_size: int, count: int, context_length: int, log: Log = lambda _: None
    ) -> None:
        """`log` takes entries: never what somebody has written, nor what a server says of it."""
        self.log = log
        self.servers, self.model, self.vocab_size = servers, model, vocab_size
        self.count, self.context_length = count, context_length
        self.stats = Stats()
        self.counted_prompt_tokens = 0
        """Tokens of prompts of which a server has said how many it held already."""
        self.lost: str | None = None
        """Why there will be no answer any more."""
        self.changed = asyncio.Event()
        """Set when a server has come back; those who wait for one look again."""
        self.loop = asyncio.new_event_loop()
        self._affinity = Affinity()
        self._waiting: deque[Ticket] = deque()
        self._active: dict[Ticket, asyncio.Task[None]] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._numbers = 0
        self._pace = Pace()
        self._events: list[tuple[Ticket, Event]] = []
        self._beside: set[asyncio.Task[None]] = set()
        self._deliver: Deliver = lambda events: None
        self._max_waiting = 0
        self._thread = threading.Thread(target=self.loop.run_forever, name="keural-upstream", daemon=True)
        self._thread.start()

    # From any thread

    def do(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Let the loop of the servers do something."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def delivering(self, deliver: Deliver, max_waiting: int) -> "Upstreams":
        """The same, with a place where events go and a longest queue."""
        self._deliver, self._max_waiting = deliver, max_waiting
        return self

    def start(self) -> None:
        """See `Runner.start`: the thread runs already."""

    def unhonoured(self, request: Request) -> Unhonoured | None:
        """See `Runner.unhonoured`: a setting is kept where one of the servers keeps it."""
        found = [server.contract.unhonoured(request, server.facts) for server in self.servers if server.facts is not None]
        return None if None in found else next(iter(found), None)

    def check_free(self) -> None:
        """See `Runner.check_free`."""
        self._check_free(1)

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """See `Runner.submit`."""
        for request in requests:
            check_prompt(request.prompt_ids, self.context_length)
        with self._lock:
            if self._closing or self.broken is not None:
                raise UserError("the server is shutting down" if self._closing else str(self.broken))
            self._check_free(len(requests))
            now = time.monotonic()
            tickets = [Ticket(request, self._numbers + place, now) for place, request in enumerate(requests)]
            self._numbers += len(tickets)
            self._waiting += tickets
        self.loop.call_soon_threadsafe(self._admit)
        return tickets

    def cancel(self, ticket: Ticket, end: Cancelled = "cancelled") -> None:
        """See `Runner.cancel`."""
        ticket.cancel(end)
        with contextlib.suppress(RuntimeError):  # the loop is closed: everything has ended
            self.loop.call_soon_threadsafe(self._cancel, ticket)

    def close(self, seconds: float = 0.0) -> int:
        """See `Runner.close`."""
        with self._lock:
            self._closing = True
        end = time.monotonic() + seconds
        while (self._active or self._waiting) and time.monotonic() < end:
            time.sleep(0.01)
        left: int = self.do(self._end_all()).result()
        return left

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Do the last work in the loop, and end the thread."""
        try:
            self.do(last).result()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    @property
    def broken(self) -> str | None:
        """See `Runner.broken`; unlike a network of our own a server may come back."""
        if self.lost is not None or any(server.trouble is None for server in self.servers):
            return self.lost
        # whoever asks for the health of a server needs no key, and is told no addresses
        names = [f"upstream {place}" if server.child is None else server.contract.name for place, server in enumerate(self.servers)]
        return "; ".join(f"{name} {server.trouble}" for name, server in zip(names, self.servers, strict=True))

    @property
    def running(self) -> int:
        """See `Runner.running`."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """See `Runner.waiting`."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """See `Runner.alive`."""
        return self._thread.is_alive() and self.broken is None

    def _check_free(self, asked: int) -> None:
        self._pace.admit(asked, len(self._waiting), len(self._active), self._max_waiting + self.count)

    # In the loop of the servers

    def _admit(self) -> None:
        """Let those who wait begin, in their order, while there is room."""
        with self._lock:
            while self._waiting and len(self._active) < self.count:
                ticket = self._waiting.popleft()
                self._active[ticket] = task = self.loop.create_task(self._run(ticket))
                task.add_done_callback(functools.partial(self._done, ticket))

    def _done(self, ticket: Ticket, task: "asyncio.Task[None]") -> None:
        """A request has ended, or was cut off before it could begin."""
        with self._lock:
            del self._active[ticket]
        if ticket.end is None:
            self._end(ticket, ticket.cancelled_as)
        self._admit()

    def _cancel(self, ticket: Ticket) -> None:
        task = self._active.get(ticket)
        if task is not None:
            task.cancel()
            return
        with self._lock:
            waited = ticket in self._waiting
            if waited:
                self._waiting.remove(ticket)
        if waited:
            self._end(ticket, ticket.cancelled_as)

    async def _end_all(self) -> int:
        """Cut everything off; returns how many there were."""
        left = [*self._active, *self._waiting]
        tasks = [*self._active.values()]
        for ticket in left:
            ticket.cancel("cancelled")
            self._cancel(ticket)
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(left)

    async def _run(self, ticket: Ticket) -> None:
        """One request from the queue to its end."""
        ticket.started = time.monotonic()
        self.stats.prompt_tokens += len(ticket.request.prompt_ids)
        left = None if ticket.deadline == math.inf else max(0.0, ticket.deadline - ticket.started)
        try:
            async with asyncio.timeout(left):
                self._end(ticket, await self._find_an_answer(ticket))
        except TimeoutError:
            self._end(ticket, "deadline")
        except asyncio.CancelledError:
            self._end(ticket, ticket.cancelled_as)
        except Refused as error:
            self._end(ticket, "refused", f"the engine {error}")
        except Failed as error:
            self._end(ticket, "error" if ticket.answer or isinstance(error, Garbage) else "unavailable", f"the engine {error}")
        except Exception:
            log.exception("a request to an engine failed")
            self._end(ticket, "error", "the server failed while it spoke to the engine")

    async def _find_an_answer(self, ticket: Ticket) -> End:
        """Let one server after the other try, while there is no token; gives how the answer ended.

        Raises `Failed` where all have tried, or the answer broke off.
        """
        tried: list[Server] = []
        last = Failed("has nobody who can do this now")
        while True:
            able = [server for server in self.servers if server.trouble is None and self._suits(server, ticket.request)]
            fresh = [server for server in able if server not in tried]
            if fresh:
                server = self._affinity.choose(ticket.request.prompt_ids, fresh)
                tried.append(server)
                try:
                    return await self._ask(server, ticket)
                except Refused:
                    raise
                except Failed as error:
                    self.log({"event": "upstream", "url": server.url, "failed": str(error)})
                    last = error
                    if ticket.answer:
                        raise
                    if isinstance(error, Later):
                        await server.settle()
            elif not able and self.lost is None and any(server.child is not None for server in self.servers):
                tried.clear()
                await self._news()
            else:
                raise last if self.lost is None else Failed(self.lost)

    async def _news(self) -> None:
        """Wait until an engine of our own has come back, or never will."""
        self.changed.clear()
        await self.changed.wait()

    @staticmethod
    def _suits(server: Server, request: Request) -> bool:
        return server.facts is not None and server.contract.unhonoured(request, server.facts) is None

    async def _ask(self, server: Server, ticket: Ticket) -> End:
        """Let a server answer; gives how it ended. Raises `Failed`."""
        request, request_id = ticket.request, uuid.uuid4().hex
        most = min(request.sampling.max_new_tokens, self.context_length - len(request.prompt_ids))
        end: Literal["stop", "length"] | None = None
        cached: int | None = None
        server.running += 1
        server.asked += 1
        try:
            async with asyncio.timeout(None) as patience:
                async with contextlib.aclosing(server.answer(request, request_id, self.model, most)) as parts:
                    async for part in parts:
                        if end is None:
                            self._take(ticket, part, most)
                            end = part.end
                        cached = cached if part.cached is None else part.cached
                        if part.end is not None:
                            patience.reschedule(self.loop.time() + AFTERWARDS)
        except TimeoutError:
            if end is None:
                raise
        except Failed as error:
            if end is None:
                server.failed += 1
                if isinstance(error, Gone):
                    server.lose(str(error))
                server.wake.set()
                raise
        finally:
            server.running -= 1
            if end is None:
                self._soon(server.give_up(request_id))
        if cached is not None:
            self._note_cached(ticket, cached)
        if end == "length":
            return "length" if len(ticket.answer) >= request.sampling.max_new_tokens else "context"
        return "stop"

    def _take(self, ticket: Ticket, part: Part, most: int) -> None:
        """Hand tokens on. Raises `Garbage` for what cannot be."""
        if not part.tokens:
            return
        known = [token.id for token in part.tokens] + [other for token in part.tokens for other, _ in token.top]
        if max(known) >= self.vocab_size:
            raise Garbage("gave a token that this model does not have")
        if len(ticket.answer) + len(part.tokens) > most:
            raise Garbage("gave more tokens than were asked for")
        now = time.monotonic()
        if ticket.first_token is None:
            ticket.first_token = now
        ticket.answer += [token.id for token in part.tokens]
        self.stats.answer_tokens += len(part.tokens)
        self.stats.last_step = now
        self._emit(ticket, Event(tuple(part.tokens)))

    def _note_cached(self, ticket: Ticket, cached: int) -> None:
        """So many tokens of the prompt the server held already."""
        length = len(ticket.request.prompt_ids)
        ticket.cached_tokens = min(cached, length)
        self.counted_prompt_tokens += length
        self.stats.cached_prompt_tokens += ticket.cached_tokens

    def _end(self, ticket: Ticket, end: End, error: str | None = None) -> None:
        """The one place where a request ends."""
        ticket.end = end
        self._pace.end()
        self.stats.count_end(end)
        self._emit(ticket, Event(end=end, error=error))

    def _emit(self, ticket: Ticket, event: Event) -> None:
        """Hand events on, those of one turn of the loop together."""
        if not self._events:
            self.loop.call_soon(self._hand_on)
        self._events.append((ticket, event))

    def _hand_on(self) -> None:
        events, self._events = self._events, []
        self._deliver(events)

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the rest."""
        task = self.loop.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
