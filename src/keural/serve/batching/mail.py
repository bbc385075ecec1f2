"""What the network's thread hands on: the tokens of answers, several together where they come quicker than anybody reads.

In: tokens and ends, as they come. Out: events. To hand one on, the server's thread is woken, writes to a client and wakes that
one, too: beside a small model this costs as much of two processors as a tenth of a token.
"""

import time

from keural.serve.batching.requests import Chosen, End, Event
from keural.serve.batching.runner import Deliver, Ticket

TOGETHER = 1 / 25
"""Seconds that a token may wait for others to be sent with it: text that grows as often as a film changes its picture flows. First
tokens and ends wait for nothing.
"""


class Mail:
    """Tokens and ends that `deliver` has not been given."""

    def __init__(self, deliver: Deliver, together: float) -> None:
        """`together`: seconds that a token may wait."""
        self._deliver, self._together = deliver, together
        self._tokens: dict[Ticket, list[Chosen]] = {}
        self._ended: list[tuple[Ticket, Event]] = []
        self._due = 0.0
        """When what is there must be on its way."""
        self._asked = time.perf_counter()

    def add(self, ticket: Ticket, token: Chosen) -> None:
        """A token of an answer."""
        self._tokens.setdefault(ticket, []).append(token)

    def end(self, ticket: Ticket, end: End, error: str | None = None) -> None:
        """The end of an answer, with what has come of it."""
        self._ended.append((ticket, Event(self._tokens.pop(ticket, ()), end, error)))
        self.hurry()

    def hurry(self) -> None:
        """Let nothing that is there wait any more."""
        self._due = 0.0

    def is_due(self) -> bool:
        """Whether what is there would be late after one more step; asked once a step. It is likely to take as long as the last."""
        now = time.perf_counter()
        step, self._asked = now - self._asked, now
        return now + step > self._due

    def hand_on(self) -> None:
        """Deliver all of it."""
        if not self._tokens and not self._ended:
            return
        events = [*self._ended, *((ticket, Event(tokens)) for ticket, tokens in self._tokens.items())]
        self._tokens, self._ended = {}, []
        self._due = time.perf_counter() + self._together
        self._deliver(events)
