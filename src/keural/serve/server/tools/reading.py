"""One answer on its way to a writer: what it says with the tokens of that, and its calls.

In: pieces of an answer's text. Out: events, the same ones however the text was cut into pieces.
"""

import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keural.serve.batching.requests import Chosen
from keural.serve.calls import Arguments, CallBegun, CallEnded, CallReader, Places, Said
from keural.serve.server.errors import ApiError
from keural.serve.server.pieces import Piece

MOST_DIGITS = 300
"""Of a whole number that is taken as it is."""


@dataclass(frozen=True)
class Spoken:
    """More of what is said, with tokens that it begins with."""

    text: str
    tokens: Sequence[Chosen] = ()


Event = Spoken | CallBegun | Arguments | CallEnded


@dataclass
class MadeCall:
    """A call in an answer."""

    name: str
    arguments: str = ""
    whole: bool = False
    """Whether its arguments have come to their end."""


@dataclass
class Reading:
    """Reads one answer; `places` where there may be calls in it."""

    places: Places
    said: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    """Of what is said."""
    calls: list[MadeCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = CallReader(self.places or "anywhere")
        self._waiting: list[tuple[int, Chosen]] = []

    def take(self, piece: Piece, last: bool) -> list[Event]:
        """What a piece of the text brings, and after the `last` what was held back."""
        return self.push(piece) + (self.finish() if last else [])

    def push(self, piece: Piece) -> list[Event]:
        """What a piece of the text brings."""
        if self.places:
            self._waiting += zip(piece.starts, piece.tokens, strict=True)
            return [self._note(event) for event in self._reader.push(piece.text)]
        self.said += piece.text
        self.tokens += piece.tokens
        return [Spoken(piece.text, piece.tokens)] if piece else []

    def finish(self) -> list[Event]:
        """What was held back, at the end of the answer."""
        events = [self._note(event) for event in self._reader.flush()] if self.places else []
        if self._waiting and not self.calls:
            left = [token for _, token in self._waiting]
            self._waiting.clear()
            self.tokens += left
            events.append(Spoken("", left))
        return events

    def _note(self, event: Said | CallBegun | Arguments | CallEnded) -> Event:
        if isinstance(event, CallBegun):
            self.calls.append(MadeCall(event.name))
            self._waiting.clear()
        elif isinstance(event, Arguments):
            self.calls[-1].arguments += event.text
        elif isinstance(event, CallEnded):
            self.calls[-1].whole = True
        else:
            self.said += event.text
            tokens = [token for start, token in self._waiting if start < len(self.said)]
            self._waiting = [(start, token) for start, token in self._waiting if start >= len(self.said)]
            self.tokens += tokens
            return Spoken(event.text, tokens)
        return event


def reading_of(text: str, tokens: Sequence[Chosen], starts: Sequence[int], places: Places) -> Reading:
    """A whole answer, read."""
    reading = Reading(places)
    reading.take(Piece(text, list(tokens), list(starts)), last=True)
    return reading


def as_object(arguments: str) -> dict[str, Any]:
    """Arguments of a whole call as an object. A number beyond what a double holds, which JSON allows, becomes the largest one.

    Raises `ApiError` for what is nested too deeply, and for what is no JSON, which an engine that runs elsewhere may give.
    """
    try:
        found: dict[str, Any] = json.loads(arguments, parse_float=_number, parse_int=_number)
    except (RecursionError, ValueError) as error:
        why = "are nested too deeply" if isinstance(error, RecursionError) else "are no JSON"
        raise ApiError(500, f"the arguments of a call {why}", code="model_error") from error
    return found


def _number(text: str) -> int | float:
    if text.lstrip("-").isdecimal() and len(text) <= MOST_DIGITS:
        return int(text)
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def new_id(prefix: str) -> str:
    """A name that nothing else has."""
    return f"{prefix}_{uuid.uuid4().hex}"
