"""`/v1/responses`: the same conversations in OpenAI's newer API, without a memory: every request brings its whole conversation.

In: an input and settings. Out: one response, or the events of one.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from keural.serve.server.chat import NO_MEDIA, NO_TOOLS, AnyObject, PlainText, named_logprobs, prompt_of_messages
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import (
    MOST_LOGPROBS,
    PREFIX,
    Accepted,
    Count,
    Fields,
    Settings,
    only,
)
from keural.serve.server.generation import form_of, requests_of, sampling_of, settings_of
from keural.serve.server.replies import Choice, Part, Reply, Usage, event
from keural.serve.server.service import Service
from keural.tokenizer import Message

NO_MEMORY = "nothing is kept: send the whole conversation as `input`"
LOGPROBS = "message.output_text.logprobs"


class InputText(Fields):
    """A part of a message; those of an earlier answer may be sent back as they came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: only([], why=NO_MEDIA)  # type: ignore[valid-type]
    logprobs: Accepted
    prompt_cache_breakpoint: Accepted


def _form(value: Any) -> str:
    return f"{PREFIX}parts" if isinstance(value, list) else f"{PREFIX}text"


Parts = Annotated[list[InputText], Field(min_length=1)]
Content = Annotated[Annotated[str, Tag(f"{PREFIX}text")] | Annotated[Parts, Tag(f"{PREFIX}parts")], Discriminator(_form)]


class InputMessage(Fields):
    """A message of a conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Accepted
    status: Accepted
    phase: Accepted


Input = Annotated[
    Annotated[str, Tag(f"{PREFIX}text")]
    | Annotated[list[InputMessage], Field(min_length=1), Tag(f"{PREFIX}parts")],
    Discriminator(_form),
]  # fmt: skip


class SchemaFormat(Fields):
    """An answer that follows a JSON schema, whether it is called strict or not."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{PREFIX}{kind if kind in ('json_object', 'json_schema') else 'text'}"


class TextConfig(Fields):
    """What an answer must be."""

    format: (
        Annotated[
            Annotated[PlainText, Tag(f"{PREFIX}text")]
            | Annotated[AnyObject, Tag(f"{PREFIX}json_object")]
            | Annotated[SchemaFormat, Tag(f"{PREFIX}json_schema")],
            Discriminator(_kind),
        ]
        | None
    ) = None
    verbosity: only("medium", why="say in a message how long the answer should be")  # type: ignore[valid-type]


class StreamOptions(Fields):
    """How a stream is sent."""

    include_obfuscation: Accepted


class ResponsesRequest(Settings):
    """The fields of a request."""

    model: str | None = None
    input: Input
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Count | None = None
    text: TextConfig | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Accepted
    safety_identifier: Accepted
    prompt_cache_key: Accepted
    prompt_cache_options: Accepted
    prompt_cache_retention: Accepted
    store: only(False, why="nothing is kept")  # type: ignore[valid-type]
    background: only(False, why="nothing is kept")  # type: ignore[valid-type]
    background_options: only(why="nothing is kept")  # type: ignore[valid-type]
    previous_response_id: only(why=NO_MEMORY)  # type: ignore[valid-type]
    conversation: only(why=NO_MEMORY)  # type: ignore[valid-type]
    prompt: only(why=NO_MEMORY)  # type: ignore[valid-type]
    context_management: only(why=NO_MEMORY)  # type: ignore[valid-type]
    truncation: only("disabled", why="nothing is left out of a conversation")  # type: ignore[valid-type]
    reasoning: only({"effort": "none"}, why="the model does not reason before it answers")  # type: ignore[valid-type]
    service_tier: only("auto", "default", why="there is one tier")  # type: ignore[valid-type]
    tools: only([], why=NO_TOOLS)  # type: ignore[valid-type]
    tool_choice: only("none", "auto", why=NO_TOOLS)  # type: ignore[valid-type]
    parallel_tool_calls: only(True, False, why=NO_TOOLS)  # type: ignore[valid-type]
    max_tool_calls: only(why=NO_TOOLS)  # type: ignore[valid-type]
    access_programs: only(why=NO_TOOLS)  # type: ignore[valid-type]
    image: only(why=NO_MEDIA)  # type: ignore[valid-type]
    moderation: only(why="nothing is moderated")  # type: ignore[valid-type]


async def answer_responses(service: Service, fields: ResponsesRequest, headers: Mapping[str, str]) -> Reply:
    """The reply to a request. Raises `ApiError` for one that cannot be answered as it is asked."""
    service.check_model(fields.model)
    with_logprobs = LOGPROBS in (fields.include or ())
    if fields.top_logprobs and not with_logprobs:
        raise ApiError(400, f'`top_logprobs` is only for `include: ["{LOGPROBS}"]`', "top_logprobs", "invalid_value")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "`stream_options` is only for `stream: true`", "stream_options", "invalid_value")
    prompt = await prompt_of_messages(service, _messages(fields))
    service.check_room(prompt, "input")
    given = settings_of(fields)
    form = await form_of(service, given, _schema(fields.text), "text")
    sampling = sampling_of(service, given, fields.max_output_tokens)
    top = (fields.top_logprobs or 0) if with_logprobs else None
    requests = requests_of(service, given, [prompt], sampling, top, headers, form)
    echo = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    writer = ResponsesWriter(service, fields, echo, with_logprobs)
    return Reply(service, requests, 1, (), writer, bool(fields.stream))


def _messages(fields: ResponsesRequest) -> list[Message]:
    head = [Message("system", fields.instructions)] if fields.instructions else []
    if isinstance(fields.input, str):
        return [*head, Message("user", fields.input)]
    return head + [Message("system" if said.role == "developer" else said.role, _text(said.content)) for said in fields.input]


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _schema(text: TextConfig | None) -> Mapping[str, Any] | None:
    form = text.format if text is not None else None
    if form is None or isinstance(form, PlainText):
        return None
    return form.schema_ if isinstance(form, SchemaFormat) else {"type": "object"}


class ResponsesWriter:
    """Writes responses."""

    def __init__(self, service: Service, fields: ResponsesRequest, echo: Mapping[str, Any], with_logprobs: bool) -> None:
        self._tokenizer, self._with_logprobs = service.tokenizer, with_logprobs
        self._item = f"msg_{uuid.uuid4().hex}"
        self._number = 0
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
            "error": None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "metadata": fields.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "background": False,
            "service_tier": "default",
            "text": {"format": _echoed(fields.text)},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": fields.top_logprobs or 0,
            "truncation": "disabled",
            "user": None,
            **echo,
        }

    def begin(self, _: Usage) -> list[bytes]:
        """The response, still empty, and its one message."""
        empty = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        item = {"id": self._item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        return [
            self._event("response.created", response=empty),
            self._event("response.in_progress", response=empty),
            self._event("response.output_item.added", output_index=0, item=item),
            self._in_message("response.content_part.added", part=self._content("", ())),
        ]

    def part(self, part: Part) -> list[bytes]:
        """More of its text."""
        if not part.piece:
            return []
        logprobs = named_logprobs(self._tokenizer, part.piece.tokens) if self._with_logprobs else []
        return [self._in_message("response.output_text.delta", delta=part.piece.text, logprobs=logprobs)]

    def end(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The whole text, message and response."""
        whole = self.whole(choices, usage)
        item = whole["output"][0]
        content = item["content"][0]
        return [
            self._in_message("response.output_text.done", text=content["text"], logprobs=content["logprobs"]),
            self._in_message("response.content_part.done", part=content),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error as an event."""
        return [self._event("error", code=error.code, message=error.message, param=error.param)]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The response."""
        choice = choices[0]
        status = "completed" if choice.finish == "stop" else "incomplete"
        content = [self._content(choice.text, choice.tokens)]
        item = {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}
        details = None if status == "completed" else {"reason": "max_output_tokens"}
        return {**self._head, "status": status, "incomplete_details": details, "output": [item], "usage": _usage(usage)}

    def _content(self, text: str, tokens: Sequence[Any]) -> dict[str, Any]:
        logprobs = named_logprobs(self._tokenizer, tokens) if self._with_logprobs else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _in_message(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        found = event({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        return found


def _echoed(text: TextConfig | None) -> dict[str, Any]:
    """The form of an answer as it was asked for."""
    form = text.format if text is not None else None
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.answer,
    }
