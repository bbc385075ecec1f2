"""`/v1/messages` and `/v1/messages/count_tokens`: the same conversations in Anthropic's API.

In: messages and settings. Out: one message, or the events of one. Prompts are made of ids, as everywhere.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from keural.serve.server.chat import NO_TOOLS, prompt_of_messages
from keural.serve.server.errors import ApiError, of_messages
from keural.serve.server.fields import PREFIX, Accepted, Count, Fields, Settings, Stop, only
from keural.serve.server.generation import form_of, requests_of, sampling_of, settings_of
from keural.serve.server.replies import Choice, Part, Reply, Usage, event
from keural.serve.server.service import Service
from keural.tokenizer import Message

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class TextBlock(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str
    cache_control: Accepted
    citations: only([], why="there is nothing to cite")  # type: ignore[valid-type]


def _form(value: Any) -> str:
    return f"{PREFIX}blocks" if isinstance(value, list) else f"{PREFIX}text"


Blocks = Annotated[list[TextBlock], Field(min_length=1)]
Content = Annotated[Annotated[str, Tag(f"{PREFIX}text")] | Annotated[Blocks, Tag(f"{PREFIX}blocks")], Discriminator(_form)]


class Spoken(Fields):
    """A message."""

    role: Literal["user", "assistant"]
    content: Content


class SchemaFormat(Fields):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    """What an answer must be."""

    format: SchemaFormat | None = None
    effort: only(why="the model does not reason before it answers")  # type: ignore[valid-type]


class CountRequest(Fields):
    """The fields that a prompt is made of."""

    model: str | None = None
    messages: Annotated[list[Spoken], Field(min_length=1)]
    system: Content | None = None
    output_config: OutputConfig | None = None
    cache_control: Accepted
    thinking: only({"type": "disabled"}, why="the model does not reason before it answers")  # type: ignore[valid-type]
    tools: only([], why=NO_TOOLS)  # type: ignore[valid-type]
    tool_choice: only({"type": "none"}, {"type": "auto"}, why=NO_TOOLS)  # type: ignore[valid-type]
    speed: only("standard", why="there is one speed")  # type: ignore[valid-type]
    user_profile_id: only(why="the server knows no users")  # type: ignore[valid-type]
    workspace_id: only(why="the server knows no workspaces")  # type: ignore[valid-type]


class MessagesRequest(Settings, CountRequest):
    """The fields of a request."""

    max_tokens: Count
    stop_sequences: Stop = None
    stream: bool | None = None
    metadata: Accepted
    top_k: only(why="there is no limit by number, only `top_p`")  # type: ignore[valid-type]
    service_tier: only("auto", "standard_only", why="there is one tier")  # type: ignore[valid-type]
    container: only(why=NO_TOOLS)  # type: ignore[valid-type]
    diagnostics: only(why="there are none")  # type: ignore[valid-type]
    inference_geo: only(why="the server does not choose where it runs")  # type: ignore[valid-type]


async def answer_messages(service: Service, fields: MessagesRequest, headers: Mapping[str, str]) -> Reply:
    """The reply to a request. Raises `ApiError` for one that cannot be answered as it is asked."""
    prompt = await _prompt(service, fields)
    schema = fields.output_config.format.schema_ if fields.output_config and fields.output_config.format else None
    given = settings_of(fields)
    form = await form_of(service, given, schema, "output_config")
    requests = requests_of(service, given, [prompt], sampling_of(service, given, fields.max_tokens), None, headers, form)
    return Reply(service, requests, 1, fields.stop_sequences or (), MessagesWriter(service), bool(fields.stream))


async def count_tokens(service: Service, fields: CountRequest) -> dict[str, int]:
    """How many tokens a prompt has. Raises `ApiError` where it cannot be one."""
    return {"input_tokens": len(await _prompt(service, fields, whole=False))}


async def _prompt(service: Service, fields: CountRequest, whole: bool = True) -> list[int]:
    service.check_model(fields.model)
    if fields.messages[-1].role != "user":
        raise ApiError(400, "`messages`: the last one must be the user's: answers are not continued", "messages", "invalid_value")
    head = [Message("system", _text(fields.system))] if fields.system else []
    prompt = await prompt_of_messages(service, [*head, *(Message(said.role, _text(said.content)) for said in fields.messages)])
    if whole:
        service.check_room(prompt, "messages")
    return prompt


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


class MessagesWriter:
    """Writes messages."""

    def __init__(self, service: Service) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": service.name}

    def begin(self, usage: Usage) -> list[bytes]:
        """The message, still empty."""
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage._replace(answer=0)),
        }
        return [
            _event("message_start", message=message),
            _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ]

    def part(self, part: Part) -> list[bytes]:
        """More of its text."""
        delta = {"type": "text_delta", "text": part.piece.text}
        return [_event("content_block_delta", index=0, delta=delta)] if part.piece.text else []

    def end(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """Why it ended."""
        return [
            _event("content_block_stop", index=0),
            _event("message_delta", delta=_ending(choices[0]), usage={"output_tokens": usage.answer}),
            _event("message_stop"),
        ]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error as an event."""
        return [event(of_messages(error), "error")]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The message."""
        content = [{"type": "text", "text": choices[0].text}]
        return {**self._head, "content": content, **_ending(choices[0]), "usage": _usage(usage)}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _ending(choice: Choice) -> dict[str, Any]:
    stopped_by = choice.pieces.stopped_by
    reason = "stop_sequence" if stopped_by is not None else STOP_REASONS[choice.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": stopped_by}


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens as this API counts them: those that were read before stand apart."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.answer,
    }
