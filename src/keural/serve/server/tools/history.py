"""Calls and results in a conversation: whose they are, and how the model reads them.

In: turns and results in the order of a request. Out: messages for the renderer. A rendered result does not say which call it
answers, so the results of a turn stand in the order of its calls, as in training, whatever order they came in.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from keural.parsing import Malformed, parse_json
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import Accepted, Fields, only
from keural.serve.server.tools.definitions import ONE_CALLER, Name
from keural.tokenizer import Message, ToolCall, with_calls

LONGEST_ID = 256
DEPTH = 32
FAILED = "Error: "
"""What the result of a call that failed begins with, in APIs that say so beside the text."""

CallId = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]


class Call(NamedTuple):
    """A call that an assistant has made; arguments that are JSON text stay as they are written."""

    id: str
    name: str
    arguments: str | Mapping[str, Any]


class Turn(NamedTuple):
    """What somebody says, an assistant perhaps with calls after it."""

    role: str
    text: str
    calls: tuple[Call, ...] = ()


class Result(NamedTuple):
    """What came of a call."""

    call_id: str
    text: str


def messages_of(items: Sequence[Turn | Result], param: str) -> list[Message]:
    """The messages of a conversation. Raises `ApiError` for a call without result, or the reverse, in field `param`."""
    messages: list[Message] = []
    waiting: dict[str, str | None] = {}
    for item in items:
        if isinstance(item, Turn):
            _check_answered(waiting, param)
            messages.append(Message(item.role, with_calls(item.text, [_written(call, param) for call in item.calls])))
            waiting = {call.id: None for call in item.calls}
            if len(waiting) < len(item.calls):
                raise ApiError(400, f"`{param}`: two calls of one turn have the same id", param, "invalid_value")
            continue
        if waiting.get(item.call_id, "") is not None:
            why = "no call of the turn before has it" if item.call_id not in waiting else "the call has a result already"
            raise ApiError(400, f"`{param}`: a result has the id {item.call_id!r:.80}, but {why}", param, "invalid_value")
        waiting[item.call_id] = item.text
        if all(text is not None for text in waiting.values()):
            messages += [Message("tool", text or "") for text in waiting.values()]
            waiting = dict.fromkeys(waiting, "")
    _check_answered(waiting, param)
    return messages


def _check_answered(waiting: Mapping[str, str | None], param: str) -> None:
    if open_call := next((call_id for call_id, text in waiting.items() if text is None), None):
        raise ApiError(400, f"`{param}`: the call {open_call!r:.80} has no result", param, "invalid_value")


def _written(call: Call, param: str) -> ToolCall:
    """A call as training has it. Raises `ApiError` unless its arguments are an object."""
    if not isinstance(call.arguments, str):
        return ToolCall(call.name, call.arguments)
    arguments = call.arguments.strip()
    try:
        value = parse_json(arguments or "{}", depth=DEPTH)
        json.dumps(value, allow_nan=False)  # what Python reads and JSON does not know
    except (Malformed, ValueError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"`{param}`: the arguments of the call {call.id!r:.80} are no JSON object", param, "invalid_value")
    return ToolCall(call.name, arguments)


class WrittenFunction(Fields):
    """A function with the JSON text of its arguments."""

    name: Name
    arguments: str


class ChatCall(Fields):
    """A call in a turn of the assistant, in `/v1/chat/completions`."""

    id: CallId
    type: Literal["function"]
    function: WrittenFunction

    @property
    def call(self) -> Call:
        """In no API's shape."""
        return Call(self.id, self.function.name, self.function.arguments)


class ResponsesCall(Fields):
    """A call among the items of an input, in `/v1/responses`."""

    type: Literal["function_call"]
    call_id: CallId
    name: Name
    arguments: str
    id: Accepted
    status: Accepted

    @property
    def call(self) -> Call:
        """In no API's shape."""
        return Call(self.call_id, self.name, self.arguments)


class ToolUseBlock(Fields):
    """A call in a turn of the assistant, in `/v1/messages`."""

    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: dict[str, Any]
    cache_control: Accepted
    caller: only({"type": "direct"}, why=ONE_CALLER)  # type: ignore[valid-type]

    @property
    def call(self) -> Call:
        """In no API's shape."""
        return Call(self.id, self.name, self.input)
