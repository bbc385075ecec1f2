"""The compliance cases of Open Responses, with what they look at: the shape of a response and of every event."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from keural.tokenizer import KeuralTokenizer, ToolCall, with_calls
from tests.helpers.serving import Writing, service_of, serving

NULL = type(None)
RESPONSE: dict[str, Any] = {
    "id": str, "object": str, "created_at": int, "completed_at": (int, NULL), "status": str, "incomplete_details": (dict, NULL),
    "model": str, "previous_response_id": (str, NULL), "instructions": (str, NULL), "output": list, "error": (dict, NULL),
    "tools": list, "tool_choice": (str, dict), "truncation": str, "parallel_tool_calls": bool, "text": dict,
    "top_p": (int, float), "presence_penalty": (int, float), "frequency_penalty": (int, float), "top_logprobs": int,
    "temperature": (int, float), "reasoning": (dict, NULL), "usage": (dict, NULL), "max_output_tokens": (int, NULL),
    "max_tool_calls": (int, NULL), "store": bool, "background": bool, "service_tier": str, "metadata": dict,
    "safety_identifier": (str, NULL), "prompt_cache_key": (str, NULL),
}  # fmt: skip
"""What the specification's resource must have."""
ITEMS: dict[str, dict[str, Any]] = {
    "message": {"id": str, "status": str, "role": str, "content": list},
    "function_call": {"id": str, "call_id": str, "name": str, "arguments": str, "status": str},
}
IN_ITEM = {"item_id": str, "output_index": int}
IN_PART = IN_ITEM | {"content_index": int}
EVENTS: dict[str, dict[str, Any]] = {
    "response.created": {"response": dict},
    "response.in_progress": {"response": dict},
    "response.completed": {"response": dict},
    "response.output_item.added": {"output_index": int, "item": dict},
    "response.output_item.done": {"output_index": int, "item": dict},
    "response.content_part.added": IN_PART | {"part": dict},
    "response.content_part.done": IN_PART | {"part": dict},
    "response.output_text.delta": IN_PART | {"delta": str, "logprobs": list},
    "response.output_text.done": IN_PART | {"text": str, "logprobs": list},
    "response.function_call_arguments.delta": IN_ITEM | {"delta": str},
    "response.function_call_arguments.done": IN_ITEM | {"arguments": str},
}
LOCATION = {"type": "string", "description": "The city"}
PARAMETERS = {"type": "object", "properties": {"location": LOCATION}, "required": ["location"]}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": PARAMETERS,
}


def has(value: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, kind in wanted.items():
        assert name in value, name
        assert isinstance(value[name], kind), (name, value[name])


def check_response(found: dict[str, Any]) -> None:
    has(found, RESPONSE)
    for item in found["output"]:
        has(item, ITEMS[item["type"]])
        for part in item.get("content", ()):
            has(part, {"type": str, "text": str, "annotations": list, "logprobs": list})
    for tool in found["tools"]:
        assert {"type", "name", "description", "parameters", "strict"} <= tool.keys()
    if found["usage"] is not None:
        has(found["usage"], {"input_tokens": int, "output_tokens": int, "total_tokens": int})
        has(found["usage"], {"input_tokens_details": dict, "output_tokens_details": dict})


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, Writing(tokenizer, "안녕하세요, hello there!"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def caller(tokenizer: KeuralTokenizer) -> Iterator[httpx.Client]:
    text = with_calls("", [ToolCall("get_weather", {"location": "San Francisco, CA"})])
    with serving(service_of(tokenizer, Writing(tokenizer, text, context_length=1000), trained_on_tools=True)) as opened:
        yield opened


def ask(client: httpx.Client, *turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """The response to an input of messages, seen to be one."""
    items = [{"type": "message", "role": role, "content": content} for role, content in turns]
    response = client.post("/v1/responses", json={"model": "tiny", "input": items, **more})
    assert response.status_code == 200, response.text
    if not more.get("stream"):
        found: dict[str, Any] = response.json()
    else:
        found = _last(response.text)["response"]
    check_response(found)
    assert found["output"]
    assert found["status"] == "completed"
    return found


def read(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of them as the specification has it."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        has(event, EVENTS[event["type"]] | {"sequence_number": int})
        if "response" in event:
            check_response(event["response"])
        if "item" in event:
            has(event["item"], ITEMS[event["item"]["type"]])
        found.append(event)
    return found


def _last(text: str) -> dict[str, Any]:
    return read(text)[-1]


def test_basic_response(client: httpx.Client) -> None:
    ask(client, ("user", "Say hello in exactly 3 words."))


def test_streaming_response(client: httpx.Client) -> None:
    ask(client, ("user", "Count from 1 to 5."), stream=True)


def test_system_prompt(client: httpx.Client) -> None:
    ask(client, ("system", "You are a pirate. Always respond in pirate speak."), ("user", "Say hello."))


def test_tool_calling(caller: httpx.Client) -> None:
    found = ask(caller, ("user", "What's the weather like in San Francisco?"), tools=[WEATHER])

    assert [item["type"] for item in found["output"]] == ["function_call"]


def test_tool_calling_streaming(caller: httpx.Client) -> None:
    asked = {"input": "What's the weather like in San Francisco?", "tools": [WEATHER], "stream": True}
    events = read(caller.post("/v1/responses", json=asked).text)

    kinds = [event["type"] for event in events]
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= {*kinds}
    for kind in ("response.output_item.added", "response.output_item.done"):
        assert [event["item"]["type"] for event in events if event["type"] == kind] == ["function_call"]
    assert json.loads(events[-1]["response"]["output"][0]["arguments"]) == {"location": "San Francisco, CA"}


def test_multi_turn(client: httpx.Client) -> None:
    ask(client, ("user", "My name is Alice."), ("assistant", "Hello Alice! How can I help you?"), ("user", "What is my name?"))


def test_image_input_is_refused(client: httpx.Client) -> None:
    """The one case that a model of text cannot pass."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    content = [{"type": "input_text", "text": "What do you see?"}, image]
    response = client.post("/v1/responses", json={"input": [{"type": "message", "role": "user", "content": content}]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[0].content[1].type"
