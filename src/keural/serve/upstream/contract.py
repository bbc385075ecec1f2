"""What a server of ids is asked, and what it says: the parts that vLLM and SGLang have in common.

In: a request, or what a server sent. Out: the body of a request, or tokens. Everything that a server sends is looked at before it
is believed: what is not as its contract defines it ends the answer with an error, and goes no further.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

from keural.serve.batching.requests import Chosen, Request
from keural.serve.batching.runner import Unhonoured
from keural.serve.engines.sampling import GREEDY_BELOW

Json = Mapping[str, Any]


class Failed(Exception):
    """A server did not do what it was asked: one line, which goes on from its name. Another server may."""

    def __init__(self, why: str, said: str = "") -> None:
        """`said` are words of its own, for whoever runs it."""
        super().__init__(why)
        self.said = said


class Later(Failed):
    """A server could not do it now: its connection broke, or it says so."""


class Gone(Later):
    """A server cannot be reached at all."""


class Refused(Failed):
    """A server found a request impossible; another one would, too."""


class Garbage(Failed):
    """A server sent what its contract does not know."""


@dataclass(frozen=True)
class Facts:
    """What a server that was looked at can do."""

    context_length: int
    """Tokens of a prompt and its answer together."""
    seeds: bool = True
    """Whether a seed makes an answer repeatable."""
    forms: bool = True
    """Whether it follows forms."""
    calls: Literal["grammar", "structural_tag"] | None = "grammar"
    """How the form of calls is said to it; None where it cannot be."""
    plain_logprobs: bool = True
    """Whether log-probabilities are those before the temperature."""


@dataclass(frozen=True)
class Part:
    """A part of an answer."""

    tokens: Sequence[Chosen] = ()
    end: Literal["stop", "length"] | None = None
    cached: int | None = None
    """Tokens of the prompt that the server held already, where it says so."""


class Reader(Protocol):
    """Reads the events of one answer."""

    def __call__(self, event: Json) -> Part:
        """What an event says. Raises `Failed`."""


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its environment, beside our own."""
    config: tuple[str, str] | None = None
    """An option and a file's content that is given with it: what nobody should see among the processes."""


Get = Callable[[str], Any]
"""Coroutine function: the JSON at a path. Raises `Failed`."""


@dataclass(frozen=True)
class Contract:
    """How one kind of server is spoken to."""

    name: str
    package: str
    """For pip."""
    path: str
    """Where ids are continued."""
    unhonoured: Callable[[Request, Facts], Unhonoured | None]
    """What of a request a server with these facts cannot keep exactly."""
    body: Callable[[Request, str, str, int, Facts], Json]
    """The body of a request: itself, its id, the model's name, the most tokens of its answer, and the server's facts."""
    reader: Callable[[Request], Reader]
    facts: Callable[[Get, str], Any]
    """Coroutine function: the facts of the server that serves the model of that name. Raises `Failed` where it does not."""
    probe: Callable[[str, int], Json]
    """The body of a request for one token, with an id (in a bias of 0) that the server must know."""
    abort: Callable[[str], tuple[str, Json]] | None
    """Where and how a request is given up by its id; None where closing its connection does that."""
    launch: Callable[[Path, str, int, str, Sequence[str]], Launch]
    """For an export, the model's name, a port, a key, and more arguments. Raises `UserError` where it is not installed."""


def is_greedy(request: Request) -> bool:
    """Whether the most probable token is taken: a nucleus of 0 holds that one alone."""
    return request.sampling.temperature < GREEDY_BELOW or request.sampling.top_p == 0


def form_of(request: Request) -> Json | None:
    """The form that an answer must have: `json`, `regex`, `choice`, or `grammar` and `structural_tag`, with values.

    None for any form, empty where it cannot be said.
    """
    if request.constraint is None:
        return None
    asked: Json = getattr(request.constraint, "asked", {})
    return asked


def token_id(value: Any) -> int:
    """A value as a token id. Raises `Garbage`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Garbage("gave a token that is no id")
    return value


def logprob(value: Any) -> float:
    """A value as a log-probability. Raises `Garbage`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Garbage("gave a log-probability that is no number")
    return float(value)


def best(entries: Sequence[tuple[int, float]], count: int) -> tuple[tuple[int, float], ...]:
    """The most probable entries, best first; equally probable ones stay in their order."""
    return tuple(sorted(entries, key=lambda entry: -entry[1])[:count])


def the_list(value: Any, what: str) -> list[Any]:
    """A value as a list. Raises `Garbage`."""
    if not isinstance(value, list):
        raise Garbage(f"gave {what} that are no list")
    return value


def the_object(value: Any, what: str) -> dict[str, Any]:
    """A value as an object. Raises `Garbage`."""
    if not isinstance(value, dict):
        raise Garbage(f"gave {what} of another kind")
    return value


def length_of(value: Any, least: int) -> int:
    """A value as the length of a context. Raises `Garbage`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Garbage("does not say how long its context is")
    return value


def count_of(value: Any) -> int | None:
    """A value as a number of tokens, where it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def cut_at_stop(tokens: Sequence[Chosen], request: Request, end: Any) -> Part:
    """Tokens up to the first that ends the answer, without it; `end` is how the server says that it ended.

    Raises `Failed` for another end than those that an answer has here.
    """
    for place, token in enumerate(tokens):
        if token.id in request.stop_ids:
            return Part(tuple(tokens[:place]), "stop")
    if end == "stop":
        raise Garbage("ended at a token that is no end of this model")
    if end not in (None, "length"):
        raise Failed("gave the answer up", str(end)[:100])
    return Part(tuple(tokens), "length" if end == "length" else None)


def raise_error(error: Any) -> NoReturn:
    """Raise what a server says is wrong: `Refused` for a request that is impossible, else `Failed`."""
    values = error if isinstance(error, dict) else {}
    said = str(values.get("message") or error)[:400]
    status = values.get("code")
    if isinstance(status, int) and 400 <= status < 500 and status not in NOT_THE_REQUEST:
        raise Refused(f"refused the request: {said}", said)
    raise Failed("failed", said)


NOT_THE_REQUEST = (401, 403, 404, 405, 408, 425, 429)
"""Statuses below 500 that do not speak of what was asked."""
