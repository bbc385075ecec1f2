"""`/v1/chat/completions`: a conversation in, the assistant's next turn out.

In: messages and settings. Out: one object, or chunks of it. The prompt is made of ids: whatever a message spells stays text.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from keural.serve.batching.requests import Request
from keural.serve.server.chat_writer import ChatWriter
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import MOST_LOGPROBS, PREFIX, Accepted, Count, Fields, Generation, by_field, only, text_or
from keural.serve.server.generation import form_of, requests_of, sampling_of
from keural.serve.server.replies import Reply
from keural.serve.server.service import Service
from keural.serve.server.tools.definitions import (
    MOST_TOOLS,
    ChatTool,
    ChatToolChoice,
    Tool,
    ToolUse,
    chat_choice,
    form_beside_calls,
    tool_use,
)
from keural.serve.server.tools.history import CallId, ChatCall, Result, Turn, messages_of
from keural.tokenizer import Message, render_prompt

OLD_TOOLS = "functions are given as `tools` and called by `tool_calls`"
NO_MEDIA = "this model reads and writes text alone"


class TextPart(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Accepted


Parts = Annotated[list[TextPart], Field(min_length=1)]
Content = Annotated[
    Annotated[str, Tag(f"{PREFIX}text")] | Annotated[Parts, Tag(f"{PREFIX}parts")],
    text_or("parts"),
]


class Said(Fields):
    """A message of somebody else than the assistant."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: only(why="the model knows roles, not names")  # type: ignore[valid-type]


class Answered(Fields):
    """A turn of the assistant; what our own answers have beside the text may be sent back as it came."""

    role: Literal["assistant"]
    content: Content | None = Field(None, description="Only with `tool_calls` may it be left out.")
    name: only(why="the model knows roles, not names")  # type: ignore[valid-type]
    refusal: only(why="a refusal is said in `content`")  # type: ignore[valid-type]
    annotations: only([], why=NO_MEDIA)  # type: ignore[valid-type]
    audio: only(why=NO_MEDIA)  # type: ignore[valid-type]
    tool_calls: Annotated[list[ChatCall], Field(max_length=MOST_TOOLS)] | None = None
    function_call: only(why=OLD_TOOLS)  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _says_something(self) -> "Answered":
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("nothing_said", "give `content`, or `tool_calls`")
        return self


class Returned(Fields):
    """What came of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: CallId


ChatTurn = Annotated[
    Annotated[Said, Tag(f"{PREFIX}said")]
    | Annotated[Answered, Tag(f"{PREFIX}assistant")]
    | Annotated[Returned, Tag(f"{PREFIX}tool")],
    by_field("role", ("assistant", "tool"), "said"),
]


class Conversation(Fields):
    """What a prompt is made of."""

    messages: Annotated[list[ChatTurn], Field(min_length=1)]
    tools: list[ChatTool] | None = Field(None, description=f"Functions that may be called, at most {MOST_TOOLS}.")

    @property
    def offered(self) -> list[Tool]:
        """The tools in no API's shape."""
        return [tool.function.tool for tool in self.tools or ()]

    def read(self) -> list[Message]:
        """The messages as the renderer takes them. Raises `ApiError`."""
        return messages_of([_turn(turn) for turn in self.messages], "messages")


def _turn(turn: Said | Answered | Returned) -> Turn | Result:
    text = joined(turn.content)
    if isinstance(turn, Returned):
        return Result(turn.tool_call_id, text)
    if isinstance(turn, Answered):
        return Turn("assistant", text, tuple(call.call for call in turn.tool_calls or ()))
    return Turn("system" if turn.role == "developer" else turn.role, text)


class PlainText(Fields):
    """An answer of any form."""

    type: Literal["text"]


class AnyObject(Fields):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class NamedSchema(Fields):
    """A JSON schema with its name; answers follow it whether it is called strict or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class OfASchema(Fields):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


FORMS = ("json_object", "json_schema")
Format = Annotated[
    Annotated[PlainText, Tag(f"{PREFIX}text")]
    | Annotated[AnyObject, Tag(f"{PREFIX}json_object")]
    | Annotated[OfASchema, Tag(f"{PREFIX}json_schema")],
    by_field("type", FORMS, "text"),
]


def schema_of(form: PlainText | AnyObject | OfASchema | None) -> Mapping[str, Any] | None:
    """The schema that answers follow; None for any text."""
    if form is None or isinstance(form, PlainText):
        return None
    return (isinstance(form, OfASchema) and form.json_schema.schema_) or {"type": "object"}


class ChatRequest(Generation, Conversation):
    """The fields of a request."""

    max_completion_tokens: Count | None = Field(None, description="The same as `max_tokens`, and stronger.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(None, description="Only with `logprobs: true`.")
    metadata: Accepted
    safety_identifier: Accepted
    prompt_cache_key: Accepted
    prompt_cache_options: Accepted
    prompt_cache_retention: Accepted
    service_tier: only("auto", "default", why="there is one tier")  # type: ignore[valid-type]
    store: only(False, why="nothing is kept")  # type: ignore[valid-type]
    modalities: only(["text"], why=NO_MEDIA)  # type: ignore[valid-type]
    audio: only(why=NO_MEDIA)  # type: ignore[valid-type]
    response_format: Format | None = Field(None, description="What the answer must be.")
    tool_choice: ChatToolChoice | None = Field(None, description="Whether a tool must be called, and which.")
    parallel_tool_calls: bool | None = Field(None, description="Whether there may be several calls in an answer.")
    functions: only([], why=OLD_TOOLS)  # type: ignore[valid-type]
    function_call: only("none", "auto", why=OLD_TOOLS)  # type: ignore[valid-type]
    prediction: only(why="the answer is not predicted")  # type: ignore[valid-type]
    moderation: only(why="nothing is moderated")  # type: ignore[valid-type]
    reasoning_effort: only("none", why="the model does not reason before it answers")  # type: ignore[valid-type]
    verbosity: only("medium", why="say in a message how long the answer should be")  # type: ignore[valid-type]
    web_search_options: only(why="nothing is searched")  # type: ignore[valid-type]


async def prompt_of(service: Service, messages: list[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """The ids of a conversation, with the model's own system message where it begins with none. Raises `ApiError`."""
    if service.system and messages[0].role != "system":
        messages = [Message("system", service.system), *messages]
    return await service.read(render_prompt, service.tokenizer, messages, [tool.definition for tool in tools])


def joined(content: str | list[Any] | None) -> str:
    """The text of a content: its parts a line each, as in training and in the chat template."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content or [])


async def asked_of(service: Service, fields: ChatRequest, headers: Mapping[str, str]) -> tuple[list[Request], ToolUse]:
    """What is asked of the network, and which tools the answers may call. Raises `ApiError` for what cannot be had."""
    service.check_model(fields.model)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ApiError(400, "`top_logprobs` is only for `logprobs: true`", "top_logprobs", "invalid_value")
    use = tool_use(service, fields.offered, chat_choice(fields.tool_choice, fields.parallel_tool_calls))
    sampling = sampling_of(service, fields, fields.max_completion_tokens or fields.max_tokens)
    prompt = await prompt_of(service, fields.read(), use.tools)
    service.check_room(prompt, "messages")
    form = await form_of(service, fields, schema_of(fields.response_format), "response_format")
    form, use = await form_beside_calls(service, use, form)
    top = (fields.top_logprobs or 0) if fields.logprobs else None
    return requests_of(service, fields, [prompt], sampling, top, headers, form), use


async def answer_chat(service: Service, fields: ChatRequest, headers: Mapping[str, str]) -> Reply:
    """The reply to a request. Raises `ApiError` for one that cannot be answered as it is asked."""
    requests, use = await asked_of(service, fields, headers)
    options = fields.stream_options
    with_usage = options is not None and bool(options.include_usage)
    writer = ChatWriter(service, bool(fields.logprobs), with_usage, len(requests), use.places)
    return Reply(service, requests, len(requests), fields.stop or (), writer, bool(fields.stream), use.places)
