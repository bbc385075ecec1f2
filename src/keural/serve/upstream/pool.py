"""Which of several servers gets a request: one that has read its beginning already, unless others have much less to do.

In: prompt ids, servers with the requests that they have. Out: a server. The servers are not asked for it: what they were given is
remembered.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

BLOCK = 32
"""Ids that beginnings are compared by."""
MOST_BLOCKS = 128
"""Of a prompt; what follows is not looked at."""
REMEMBERED = 65_536
"""Beginnings."""
SLACK = 4
"""Requests more than the least loaded server has for which a beginning is worth waiting."""


class Loaded(Protocol):
    """Something with requests."""

    running: int
    asked: int
    """Those that it has had: of servers with the same to do the one that was asked less is taken."""


ServerType = TypeVar("ServerType", bound=Loaded)


class Affinity:
    """Remembers which server read which beginnings of prompts last."""

    def __init__(self) -> None:
        self._readers: OrderedDict[int, object] = OrderedDict()

    def choose(self, prompt_ids: Sequence[int], servers: Sequence[ServerType]) -> ServerType:
        """One of `servers`, of which there is at least one; it is remembered as the reader of this prompt."""
        beginnings = _beginnings(prompt_ids)
        least = min(servers, key=lambda server: (server.running, server.asked))
        chosen = least
        for beginning in reversed(beginnings):
            reader = next((server for server in servers if server is self._readers.get(beginning)), None)
            if reader is not None:
                chosen = reader if reader.running - least.running < SLACK else least
                break
        for beginning in beginnings:
            self._readers[beginning] = chosen
            self._readers.move_to_end(beginning)
        while len(self._readers) > REMEMBERED:
            self._readers.popitem(last=False)
        return chosen


def _beginnings(prompt_ids: Sequence[int]) -> list[int]:
    """A number for each beginning of whole blocks, shortest first."""
    found, last = [], 0
    for start in range(0, min(len(prompt_ids), BLOCK * MOST_BLOCKS) - BLOCK + 1, BLOCK):
        last = hash((last, *prompt_ids[start : start + BLOCK]))
        found.append(last)
    return found
