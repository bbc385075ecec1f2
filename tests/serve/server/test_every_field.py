"""Every field inside a request that the clients' types know is honoured, changes nothing, or is refused; so is every kind of part.

The fields of the requests themselves are walked in `test_fields.py` and `test_newer_apis.py`.
"""

import json
from collections.abc import Iterator
from typing import Any, get_args

import anthropic.types as of_messages
import httpx
import openai.types.chat as of_chats
import openai.types.responses as of_responses
import pytest
from anthropic.types import assistant_message_param, tool_result_block_param, user_message_param
from openai.types.chat import chat_completion_message_function_tool_call_param as chat_call
from openai.types.responses import response_create_params, response_input_item_param
from openai.types.shared_params import FunctionDefinition as ChatFunction
from openai.types.shared_params import ResponseFormatJSONObject, ResponseFormatJSONSchema, response_format_json_schema
from pydantic import BaseModel
from typing_extensions import get_type_hints, is_typeddict

from keural.serve.server import chat, messages, responses
from keural.serve.server.fields import StreamOptions
from keural.serve.server.tools import definitions, history
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import Writing, service_of, serving

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, Writing(tokenizer, "a", context_length=1500), trained_on_tools=True)) as opened:
        yield opened


HONOURED: list[tuple[Any, type[BaseModel], str, str]] = [
    # a type of a client, ours, fields that are honoured, fields that are accepted because they change nothing
    (of_chats.ChatCompletionSystemMessageParam, chat.Said, "role content", ""),
    (of_chats.ChatCompletionDeveloperMessageParam, chat.Said, "role content", ""),
    (of_chats.ChatCompletionUserMessageParam, chat.Said, "role content", ""),
    (of_chats.ChatCompletionAssistantMessageParam, chat.Answered, "role content tool_calls", ""),
    (of_chats.ChatCompletionToolMessageParam, chat.Returned, "role content tool_call_id", ""),
    (of_chats.ChatCompletionContentPartTextParam, chat.TextPart, "type text", "prompt_cache_breakpoint"),
    (of_chats.ChatCompletionMessageFunctionToolCallParam, history.ChatCall, "id type function", ""),
    (chat_call.Function, history.WrittenFunction, "name arguments", ""),
    (of_chats.ChatCompletionFunctionToolParam, definitions.ChatTool, "type function", ""),
    (ChatFunction, definitions.FunctionDefinition, "name description parameters strict", ""),
    (of_chats.ChatCompletionNamedToolChoiceParam, definitions.ChatNamed, "type function", ""),
    (of_chats.ChatCompletionAllowedToolChoiceParam, definitions.ChatAllowed, "type allowed_tools", ""),
    (of_chats.ChatCompletionAllowedToolsParam, definitions.AllowedTools, "mode tools", ""),
    (of_chats.ChatCompletionStreamOptionsParam, StreamOptions, "include_usage", "include_obfuscation"),
    (ResponseFormatJSONObject, chat.AnyObject, "type", ""),
    (ResponseFormatJSONSchema, chat.OfASchema, "type json_schema", ""),
    (response_format_json_schema.JSONSchema, chat.NamedSchema, "name description schema strict", ""),
    (of_responses.EasyInputMessageParam, responses.InputMessage, "type role content", "phase"),
    (of_responses.ResponseOutputMessageParam, responses.InputMessage, "type role content", "id status phase"),
    (of_responses.ResponseInputTextParam, responses.InputText, "type text", "prompt_cache_breakpoint"),
    (of_responses.ResponseOutputTextParam, responses.InputText, "type text", "logprobs"),
    (of_responses.ResponseFunctionToolCallParam, history.ResponsesCall, "type call_id name arguments", "id status"),
    (response_input_item_param.FunctionCallOutput, responses.CallOutput, "type call_id output", "id status"),
    (of_responses.FunctionToolParam, definitions.ResponsesTool, "type name description parameters strict", ""),
    (of_responses.ToolChoiceFunctionParam, definitions.ResponsesNamed, "type name", ""),
    (of_responses.ToolChoiceAllowedParam, definitions.ResponsesAllowed, "type mode tools", ""),
    (of_responses.ResponseTextConfigParam, responses.TextConfig, "format", ""),
    (of_responses.ResponseFormatTextJSONSchemaConfigParam, responses.SchemaFormat, "type name schema description strict", ""),
    (response_create_params.StreamOptions, responses.StreamOptions, "", "include_obfuscation"),
    (user_message_param.UserMessageParam, messages.Asked, "role content", ""),
    (assistant_message_param.AssistantMessageParam, messages.Spoken, "role content", ""),
    (of_messages.TextBlockParam, messages.TextBlock, "type text", "cache_control"),
    (of_messages.ToolUseBlockParam, history.ToolUseBlock, "type id name input", "cache_control"),
    (of_messages.ToolResultBlockParam, messages.ToolResultBlock, "type tool_use_id content is_error", "cache_control"),
    (of_messages.ToolParam, definitions.MessagesTool, "type name description input_schema strict", "cache_control"),
    (of_messages.ToolChoiceAnyParam, definitions.MessagesToolChoice, "type disable_parallel_tool_use", ""),
    (of_messages.ToolChoiceAutoParam, definitions.MessagesToolChoice, "type disable_parallel_tool_use", ""),
    (of_messages.ToolChoiceToolParam, definitions.MessagesToolChoice, "type name disable_parallel_tool_use", ""),
    (of_messages.ToolChoiceNoneParam, definitions.MessagesToolChoice, "type", ""),
    (of_messages.OutputConfigParam, messages.OutputConfig, "format", ""),
    (of_messages.JSONOutputFormatParam, messages.SchemaFormat, "type schema", ""),
]


@pytest.mark.parametrize(("theirs", "ours", "honoured", "accepted"), HONOURED)
def test_every_field_has_its_place(theirs: Any, ours: type[BaseModel], honoured: str, accepted: str) -> None:
    """What is neither honoured nor harmless has to be absent or say what is done anyway, or is unknown, and refused for it."""
    known = {field.alias or name: field for name, field in ours.model_fields.items()}
    harmless = {name for name, field in known.items() if (field.description or "").startswith("Accepted")}
    fixed = {name for name, field in known.items() if "enum" in (_schema(ours, name) or {}) and field.annotation is Any}

    assert ours.model_config["extra"] == "forbid"
    assert {*get_type_hints(theirs)} & (known.keys() - harmless - fixed) == {*honoured.split()}
    assert {*get_type_hints(theirs)} & harmless == {*accepted.split()}


def _schema(model: type[BaseModel], name: str) -> Any:
    return model.model_json_schema()["properties"][name]


def of_chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO} | fields


def of_response(**fields: Any) -> dict[str, Any]:
    return {"input": "x"} | fields


def of_message(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 2} | fields


def said(content: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": [content]}]


SUPPORTED = {"text", "message", "function_call", "function_call_output", "function", "allowed_tools", "input_text", "output_text",
             "tool_use", "tool_result", "auto", "any", "tool", "none", "json_object", "json_schema"}  # fmt: skip
KINDS: list[tuple[str, Any, Any]] = [
    ("/v1/chat/completions", of_chats.ChatCompletionContentPartParam, lambda part: of_chat(messages=said(part))),
    ("/v1/chat/completions", of_chats.ChatCompletionToolUnionParam, lambda tool: of_chat(tools=[tool])),
    ("/v1/chat/completions", of_chats.ChatCompletionToolChoiceOptionParam, lambda choice: of_chat(tool_choice=choice)),
    ("/v1/responses", of_responses.ResponseInputItemParam, lambda item: of_response(input=[item])),
    ("/v1/responses", of_responses.ResponseInputContentParam, lambda part: of_response(input=said(part))),
    ("/v1/responses", of_responses.ToolParam, lambda tool: of_response(tools=[tool])),
    ("/v1/responses", response_create_params.ToolChoice, lambda choice: of_response(tool_choice=choice)),
    ("/v1/messages", of_messages.ContentBlockParam, lambda block: of_message(messages=said(block))),
    ("/v1/messages", of_messages.ContentBlockParam, lambda block: of_message(messages=[*said(block, "assistant"), *HELLO])),
    ("/v1/messages", tool_result_block_param.Content, lambda block: of_message(messages=returned(block))),
    ("/v1/messages", of_messages.ToolUnionParam, lambda tool: of_message(tools=[tool])),
]


def returned(block: Any) -> list[Any]:
    """A conversation whose result holds a block."""
    call, result = {"type": "tool_use", "id": "a", "name": "f", "input": {}}, {"type": "tool_result", "tool_use_id": "a"}
    return [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result | {"content": [block]}]}]


def kinds(union: Any) -> set[str]:
    """What the `type` of a union's members can be."""
    if is_typeddict(union):
        return _texts(get_type_hints(union).get("type"))
    return {name for member in get_args(union) for name in kinds(member)}


def _texts(annotation: Any) -> set[str]:
    if isinstance(annotation, str):
        return {annotation}
    return {text for inner in get_args(annotation) for text in _texts(inner)}


@pytest.mark.parametrize(("path", "union", "asked"), KINDS)
def test_every_kind_of_part_is_known_or_refused(client: httpx.Client, path: str, union: Any, asked: Any) -> None:
    found = kinds(union)
    supported = SUPPORTED | ({"custom"} if path == "/v1/messages" else set())
    assert found & supported
    for kind in found - supported:
        response = client.post(path, json=asked({"type": kind}))
        assert response.status_code == 400, (kind, response.text)
        assert "type" in json.dumps(response.json()), (kind, response.text)
