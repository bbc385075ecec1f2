"""`/v1/messages` and `/v1/messages/count_tokens`: the same conversations in Anthropic's API.

In: messages and settings. Out: one message, or the events of one. Prompts are made of ids, as everywhere.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from keural.serve.server.chat import joined, prompt_of
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import PREFIX, Accepted, Count, Fields, Settings, Stop, by_field, only, text_or
from keural.serve.server.generation import form_of, requests_of, sampling_of, settings_of
from keural.serve.server.messages_writer import MessagesWriter
from keural.serve.server.replies import Reply
from keural.serve.server.service import Service
from keural.serve.server.tools.definitions import (
    MOST_TOOLS,
    MessagesTool,
    MessagesToolChoice,
    ToolUse,
    form_beside_calls,
    messages_choice,
    tool_use,
)
from keural.serve.server.tools.history import FAILED, CallId, Result, ToolUseBlock, Turn, messages_of


class TextBlock(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str
    cache_control: Accepted
    citations: only([], why="there is nothing to cite")  # type: ignore[valid-type]


class ToolResultBlock(Fields):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: "Content | None" = None
    is_error: bool | None = Field(None, description=f"The model reads `{FAILED.strip()}` before the result of a call that failed.")
    cache_control: Accepted


BLOCKS = ("tool_use", "tool_result")
Text = Annotated[str, Tag(f"{PREFIX}text")]
TextTag = Annotated[TextBlock, Tag(f"{PREFIX}text")]
Content = Annotated[Text | Annotated[list[TextBlock], Field(min_length=1), Tag(f"{PREFIX}blocks")], text_or("blocks")]
UserBlock = Annotated[TextTag | Annotated[ToolResultBlock, Tag(f"{PREFIX}tool_result")], by_field("type", BLOCKS, "text")]
AssistantBlock = Annotated[TextTag | Annotated[ToolUseBlock, Tag(f"{PREFIX}tool_use")], by_field("type", BLOCKS, "text")]
UserContent = Annotated[Text | Annotated[list[UserBlock], Field(min_length=1), Tag(f"{PREFIX}blocks")], text_or("blocks")]
AssistantContent = Annotated[Text | Annotated[list[AssistantBlock], Field(min_length=1), Tag(f"{PREFIX}blocks")], text_or("blocks")]


class Asked(Fields):
    """What the user says, after the results of calls, where there are any."""

    role: Literal["user"]
    content: UserContent


class Spoken(Fields):
    """What the assistant says, before its calls, where it makes any."""

    role: Literal["assistant"]
    content: AssistantContent


MessagesTurn = Annotated[
    Annotated[Asked, Tag(f"{PREFIX}user")] | Annotated[Spoken, Tag(f"{PREFIX}assistant")],
    by_field("role", ("assistant",), "user"),
]


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
    messages: Annotated[list[MessagesTurn], Field(min_length=1)]
    system: Content | None = None
    output_config: OutputConfig | None = None
    cache_control: Accepted
    thinking: only({"type": "disabled"}, why="the model does not reason before it answers")  # type: ignore[valid-type]
    tools: list[MessagesTool] | None = Field(None, description=f"Functions that may be called, at most {MOST_TOOLS}.")
    tool_choice: MessagesToolChoice | None = Field(None, description="Whether a tool must be called, and which.")
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
    container: only(why="the server runs no tools itself")  # type: ignore[valid-type]
    diagnostics: only(why="there are none")  # type: ignore[valid-type]
    inference_geo: only(why="the server does not choose where it runs")  # type: ignore[valid-type]
    thread: only(why="nothing is kept: send the whole conversation as `messages`")  # type: ignore[valid-type]


async def answer_messages(service: Service, fields: MessagesRequest, headers: Mapping[str, str]) -> Reply:
    """The reply to a request. Raises `ApiError` for one that cannot be answered as it is asked."""
    use = _use(service, fields)
    prompt = await _prompt(service, fields, use)
    service.check_room(prompt, "messages")
    schema = fields.output_config.format.schema_ if fields.output_config and fields.output_config.format else None
    given = settings_of(fields)
    form, use = await form_beside_calls(service, use, await form_of(service, given, schema, "output_config"))
    requests = requests_of(service, given, [prompt], sampling_of(service, given, fields.max_tokens), None, headers, form)
    writer = MessagesWriter(service, use.places)
    return Reply(service, requests, 1, fields.stop_sequences or (), writer, bool(fields.stream), use.places)


async def count_tokens(service: Service, fields: CountRequest) -> dict[str, int]:
    """How many tokens a prompt has. Raises `ApiError` where it cannot be one."""
    return {"input_tokens": len(await _prompt(service, fields, _use(service, fields)))}


def _use(service: Service, fields: CountRequest) -> ToolUse:
    return tool_use(service, [tool.tool for tool in fields.tools or ()], messages_choice(fields.tool_choice))


async def _prompt(service: Service, fields: CountRequest, use: ToolUse) -> list[int]:
    service.check_model(fields.model)
    if fields.messages[-1].role != "user":
        raise ApiError(400, "`messages`: the last one must be the user's: answers are not continued", "messages", "invalid_value")
    items: list[Turn | Result] = [Turn("system", joined(fields.system))] if fields.system else []
    for place, said in enumerate(fields.messages):
        items += _of_assistant(said, place) if isinstance(said, Spoken) else _of_user(said, place)
    return await prompt_of(service, messages_of(items, "messages"), use.tools)


def _of_assistant(said: Spoken, place: int) -> list[Turn | Result]:
    """A turn of the assistant. Raises `ApiError` for text after a call: the model reads and writes it before."""
    blocks = said.content
    if isinstance(blocks, str):
        return [Turn("assistant", blocks)]
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if any(isinstance(block, ToolUseBlock) for block in blocks[: len(texts)]):
        raise _order(place, "text stands before `tool_use`")
    return [Turn("assistant", joined(texts), tuple(block.call for block in blocks if isinstance(block, ToolUseBlock)))]


def _of_user(said: Asked, place: int) -> list[Turn | Result]:
    """Results of calls, and what the user says. Raises `ApiError` for text before a result."""
    blocks = said.content
    if isinstance(blocks, str):
        return [Turn("user", blocks)]
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    if any(isinstance(block, TextBlock) for block in blocks[: len(results)]):
        raise _order(place, "text stands after `tool_result`")
    texts = blocks[len(results) :]
    returned = [Result(block.tool_use_id, f"{FAILED if block.is_error else ''}{joined(block.content)}") for block in results]
    return [*returned, *([Turn("user", joined(texts))] if texts else [])]


def _order(place: int, rule: str) -> ApiError:
    param = f"messages[{place}].content"
    return ApiError(400, f"`{param}`: {rule}", param, "invalid_value")
