"""What answers requests, as the server sees it: the scheduler of an embedded network, or servers elsewhere.

In: requests, from any thread. Out: tickets, and events for them, handed on by a thread of the runner's own.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from keural.serve.batching.requests import End, Event, QueueFull, Request

PACE_SPAN = 32
"""Ended requests from which it follows when a client is told to come again."""
Cancelled = Literal["cancelled", "stop"]
"""Why nobody wants more of an answer: who asked has left, or it came to a stop string, which is an end like any other."""


class Ticket:
    """A request under way. Compared by identity."""

    def __init__(self, request: Request, number: int, now: float) -> None:
        self.request, self.number, self.submitted = request, number, now
        self.deadline = math.inf if request.seconds is None else now + request.seconds
        self.cancelled = False
        self.cancelled_as: Cancelled = "cancelled"
        """How it counts, once it is cancelled."""
        self.started: float | None = None
        """When it left the queue."""
        self.first_token: float | None = None
        self.cached_tokens = 0
        """Of the prompt, those that were read for an earlier request already."""
        self.answer: list[int] = []
        self.end: End | None = None

    def cancel(self, end: Cancelled) -> None:
        """Note that no more is wanted; the first reason counts."""
        if not self.cancelled:
            self.cancelled_as, self.cancelled = end, True


@dataclass
class Stats:
    """Counters since the start. Times are in seconds."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    sampler_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    """Requests by how they ended."""
    last_step: float | None = None
    """When the network last finished a step, by `time.monotonic`."""

    def count_end(self, end: End) -> None:
        """A request has ended so."""
        self.finished[end] = self.finished.get(end, 0) + 1


class Pace:
    """How quickly requests end, while there are any, and so whether more are taken."""

    def __init__(self) -> None:
        self._ended: deque[float] = deque(maxlen=PACE_SPAN)

    def admit(self, asked: int, waiting: int, active: int, places: int) -> None:
        """Take `asked` requests where `places` suffice, for those being answered and for those that wait. Raises `QueueFull`."""
        if waiting + active + asked > places:
            raise QueueFull(waiting, self.retry_after)
        if not waiting + active:
            self._ended.clear()  # there was nothing to do: what was before says nothing of how long the next ones take

    def end(self) -> None:
        """A request has ended."""
        self._ended.append(time.monotonic())

    @property
    def retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free; at least 1."""
        ended = [*self._ended]
        return 1.0 if len(ended) < 2 else max(1.0, (ended[-1] - ended[0]) / (len(ended) - 1))


Deliver = Callable[[Sequence[tuple[Ticket, Event]]], None]
"""Takes events, in the runner's thread: it must be quick, and must not call the runner."""


class Unhonoured(NamedTuple):
    """A setting that a runner cannot keep exactly."""

    param: str
    why: str
    """A line for whoever asked: what, and what to do."""


class Runner(Protocol):
    """Answers requests, at most so many at once; others wait in the order of their arrival."""

    stats: Stats

    def start(self) -> None:
        """Begin to answer."""

    def unhonoured(self, request: Request) -> Unhonoured | None:
        """What of a request cannot be kept; None where all can."""

    def check_free(self) -> None:
        """Raise `QueueFull` where not even one request more would be taken now, before anybody has read what it asks for."""

    def submit(self, requests: Sequence[Request]) -> Sequence[Ticket]:
        """Queue requests, all of them or none.

        Raises:
            UserError: when a prompt is empty or leaves no room for an answer, or none can be answered now.
            QueueFull: when too many wait already.
        """

    def cancel(self, ticket: Ticket, end: Cancelled = "cancelled") -> None:
        """End a request soon, if it has not ended; it counts as `end`."""

    def close(self, seconds: float = 0.0) -> int:
        """Take no more requests, let those under way go on for so long, and stop; returns how many were cut off."""

    @property
    def broken(self) -> str | None:
        """Why no request can be answered now; None while they can."""

    @property
    def running(self) -> int:
        """Requests that are being answered."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
