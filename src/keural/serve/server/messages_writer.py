"""How `/v1/messages` writes its answers: blocks, of text or calls of tools.

In: what comes of them. Out: one message, or the events of one.
"""

from collections.abc import Sequence
from typing import Any

from keural.serve.calls import Arguments, CallBegun, CallEnded, Places
from keural.serve.server.errors import ApiError, of_messages
from keural.serve.server.replies import Choice, Part, TextEvent, Usage, event
from keural.serve.server.service import Service
from keural.serve.server.tools.reading import Event, Reading, as_object, new_id, reading_of

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
EMPTY_TEXT = {"type": "text", "text": ""}


class MessagesWriter:
    """Writes messages; `places` where there may be calls of tools in them."""

    def __init__(self, service: Service, places: Places) -> None:
        self._head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": service.name}
        self._places, self._reading = places, Reading(places)
        self._blocks, self._open = 0, False
        """Blocks that have begun, and whether the last of them goes on."""
        self._texts: dict[int, TextEvent] = {}
        """By the number of blocks that have begun."""

    def begin(self, usage: Usage) -> list[bytes]:
        """The message, still empty; where there can be no calls, its one block."""
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage._replace(answer=0)),
        }
        return [_event("message_start", message=message), *([] if self._places else self._begin_block(EMPTY_TEXT))]

    def part(self, part: Part) -> list[bytes]:
        """More of its blocks."""
        return [written for found in self._reading.take(part.piece, part.finish is not None) for written in self._written(found)]

    def end(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """Why it ended."""
        nothing = [] if self._blocks else self._begin_block(EMPTY_TEXT)
        delta = _ending(choices[0], self._reading)
        return [
            *nothing,
            *self._end_block(),
            _event("message_delta", delta=delta, usage={"output_tokens": usage.answer}),
            _event("message_stop"),
        ]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error as an event."""
        return [event(of_messages(error), "error")]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The message. A call that was cut is left out: as an object it would look whole, and follow no schema."""
        choice = choices[0]
        reading = reading_of(choice.text, choice.tokens, choice.starts, self._places)
        content: list[dict[str, Any]] = [_tool_use(made.name, as_object(made.arguments)) for made in reading.calls if made.whole]
        if reading.said or not reading.calls:
            content.insert(0, {"type": "text", "text": reading.said})
        return {**self._head, "content": content, **_ending(choice, reading), "usage": _usage(usage)}

    def _written(self, found: Event) -> list[bytes]:
        """The events of the API for one of an answer."""
        if isinstance(found, CallBegun):
            return [*self._end_block(), *self._begin_block(_tool_use(found.name, {}))]
        if isinstance(found, Arguments):
            return [self._delta({"type": "input_json_delta", "partial_json": found.text})]
        if isinstance(found, CallEnded):
            return self._end_block()
        if not found.text:
            return []
        begun = [] if self._open else self._begin_block(EMPTY_TEXT)
        if self._blocks not in self._texts:
            self._texts[self._blocks] = TextEvent(lambda text: self._delta({"type": "text_delta", "text": text}))
        return [*begun, self._texts[self._blocks](found.text)]

    def _begin_block(self, block: dict[str, Any]) -> list[bytes]:
        self._blocks, self._open = self._blocks + 1, True
        return [_event("content_block_start", index=self._blocks - 1, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _end_block(self) -> list[bytes]:
        """The end of the block that goes on, where one does."""
        if not self._open:
            return []
        self._open = False
        return [_event("content_block_stop", index=self._blocks - 1)]


def _tool_use(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": arguments}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _ending(choice: Choice, reading: Reading) -> dict[str, Any]:
    stopped_by = choice.pieces.stopped_by
    if stopped_by is not None:
        reason = "stop_sequence"
    elif choice.finish == "stop" and reading.calls:
        reason = "tool_use"
    else:
        reason = STOP_REASONS[choice.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": stopped_by}


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens as this API counts them: those that were read before stand apart."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.answer,
    }
