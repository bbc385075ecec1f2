"""`/v1/responses`: the same conversations in OpenAI's newer API, without a memory: every request brings its whole conversation.

In: an input and settings. Out: one response, or the events of one.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.chat import FORMS, NO_MEDIA, AnyObject, PlainText, joined, prompt_of
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import (
    MOST_LOGPROBS,
    PREFIX,
    Accepted,
    Count,
    Fields,
    Settings,
    by_field,
    only,
    text_or,
)
from keural.serve.server.generation import form_of, requests_of, sampling_of, settings_of
from keural.serve.server.replies import Reply
from keural.serve.server.responses_writer import ResponsesWriter
from keural.serve.server.service import Service
from keural.serve.server.tools.definitions import (
    MOST_TOOLS,
    ResponsesTool,
    ResponsesToolChoice,
    form_beside_calls,
    responses_choice,
    tool_use,
)
from keural.serve.server.tools.history import CallId, ResponsesCall, Result, Turn, messages_of
from keural.tokenizer import Message

NO_BUILT_IN_TOOLS = "the server runs no tools itself"
NO_MEMORY = "nothing is kept: send the whole conversation as `input`"
NO_REASONING = "the model does not reason before it answers"
LOGPROBS = "message.output_text.logprobs"


class InputText(Fields):
    """A part of a message; those of an earlier answer may be sent back as they came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: only([], why=NO_MEDIA)  # type: ignore[valid-type]
    logprobs: Accepted
    prompt_cache_breakpoint: Accepted


Parts = Annotated[list[InputText], Field(min_length=1)]
Content = Annotated[Annotated[str, Tag(f"{PREFIX}text")] | Annotated[Parts, Tag(f"{PREFIX}parts")], text_or("parts")]


class InputMessage(Fields):
    """A message of a conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Accepted
    status: Accepted
    phase: Accepted


class CallOutput(Fields):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content
    id: Accepted
    status: Accepted


Item = Annotated[
    Annotated[InputMessage, Tag(f"{PREFIX}message")]
    | Annotated[ResponsesCall, Tag(f"{PREFIX}function_call")]
    | Annotated[CallOutput, Tag(f"{PREFIX}function_call_output")],
    by_field("type", ("function_call", "function_call_output"), "message"),
]
Input = Annotated[
    Annotated[str, Tag(f"{PREFIX}text")]
    | Annotated[list[Item], Field(min_length=1), Tag(f"{PREFIX}parts")],
    text_or("parts"),
]  # fmt: skip


class SchemaFormat(Fields):
    """An answer that follows a JSON schema, whether it is called strict or not."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Fields):
    """What an answer must be."""

    format: (
        Annotated[
            Annotated[PlainText, Tag(f"{PREFIX}text")]
            | Annotated[AnyObject, Tag(f"{PREFIX}json_object")]
            | Annotated[SchemaFormat, Tag(f"{PREFIX}json_schema")],
            by_field("type", FORMS, "text"),
        ]
        | None
    ) = None
    verbosity: only("medium", why="say in a message how long the answer should be")  # type: ignore[valid-type]


class StreamOptions(Fields):
    """How a stream is sent."""

    include_obfuscation: Accepted


class Reasoning(Fields):
    """Only none; what a response says of it may be sent back."""

    effort: only("none", why=NO_REASONING)  # type: ignore[valid-type]
    summary: only(why=NO_REASONING)  # type: ignore[valid-type]
    generate_summary: only(why=NO_REASONING)  # type: ignore[valid-type]


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
    reasoning: Reasoning | None = None
    service_tier: only("auto", "default", why="there is one tier")  # type: ignore[valid-type]
    tools: list[ResponsesTool] | None = Field(None, description=f"Functions that may be called, at most {MOST_TOOLS}.")
    tool_choice: ResponsesToolChoice | None = Field(None, description="Whether a tool must be called, and which.")
    parallel_tool_calls: bool | None = Field(None, description="Whether there may be several calls in an answer.")
    max_tool_calls: only(why=NO_BUILT_IN_TOOLS)  # type: ignore[valid-type]
    access_programs: only(why=NO_BUILT_IN_TOOLS)  # type: ignore[valid-type]
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
    tools = [tool.tool for tool in fields.tools or ()]
    use = tool_use(service, tools, responses_choice(fields.tool_choice, fields.parallel_tool_calls))
    prompt = await prompt_of(service, _messages(fields), use.tools)
    service.check_room(prompt, "input")
    given = settings_of(fields)
    form = await form_of(service, given, _schema(fields.text), "text")
    form, use = await form_beside_calls(service, use, form)
    sampling = sampling_of(service, given, fields.max_output_tokens)
    top = (fields.top_logprobs or 0) if with_logprobs else None
    requests = requests_of(service, given, [prompt], sampling, top, headers, form)
    writer = ResponsesWriter(service, _echo(fields, sampling), with_logprobs, use.places)
    return Reply(service, requests, 1, (), writer, bool(fields.stream), use.places)


def _messages(fields: ResponsesRequest) -> list[Message]:
    """The messages as the renderer takes them; calls right after what an assistant says are of the same turn. Raises `ApiError`."""
    items: list[Turn | Result] = [Turn("system", fields.instructions)] if fields.instructions else []
    if isinstance(fields.input, str):
        return messages_of([*items, Turn("user", fields.input)], "input")
    for item in fields.input:
        if isinstance(item, CallOutput):
            items.append(Result(item.call_id, joined(item.output)))
        elif isinstance(item, ResponsesCall):
            last = items[-1] if items else None
            if not isinstance(last, Turn) or last.role != "assistant":
                items.append(last := Turn("assistant", ""))
            items[-1] = last._replace(calls=(*last.calls, item.call))
        else:
            items.append(Turn("system" if item.role == "developer" else item.role, joined(item.content)))
    return messages_of(items, "input")


def _echo(fields: ResponsesRequest, sampling: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request."""
    tool_choice = fields.tool_choice or "auto"
    nothing = {"description": None, "parameters": None, "strict": None}
    return {
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": None,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "prompt_cache_key": fields.prompt_cache_key if isinstance(fields.prompt_cache_key, str) else None,
        "safety_identifier": fields.safety_identifier if isinstance(fields.safety_identifier, str) else None,
        "text": {"format": _echoed(fields.text)},
        "temperature": sampling.temperature,
        "tool_choice": tool_choice if isinstance(tool_choice, str) else tool_choice.model_dump(),
        "tools": [nothing | tool.model_dump(exclude_none=True) for tool in fields.tools or ()],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": sampling.top_p,
    }


def _echoed(text: TextConfig | None) -> dict[str, Any]:
    """The form of an answer as it was asked for."""
    form = text.format if text is not None else None
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _schema(text: TextConfig | None) -> Mapping[str, Any] | None:
    form = text.format if text is not None else None
    if form is None or isinstance(form, PlainText):
        return None
    return form.schema_ if isinstance(form, SchemaFormat) else {"type": "object"}
