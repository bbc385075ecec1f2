"""What is refused of tools: in definitions, in choices, in a conversation's calls and results."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from keural.serve.server.tools.definitions import MOST_TOOLS
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import JSON, Writing, service_of, serving

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, Writing(tokenizer, "a", context_length=1500), trained_on_tools=True)) as opened:
        yield opened


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLER = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "5"}


def named(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def of(*schemas: Any) -> list[Any]:
    return [named(f"f{number}", parameters=schema) for number, schema in enumerate(schemas)]


def called(arguments: str) -> list[Any]:
    """A conversation with a call of these arguments."""
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    return [*HELLO, CALLER | {"tool_calls": [call]}, RESULT]


def allowed(*names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named(name) for name in names]}}


def deep(levels: int) -> Any:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL] * 2}, "tools"),
        ({"tools": [named(f"f{number}") for number in range(MOST_TOOLS + 1)]}, "tools"),
        ({"tools": of({"enum": ["x" * 70_000]})}, "tools"),
        ({"tools": of({"title": "x" * 40_000}, {"title": "x" * 40_000})}, "tools"),
        ({"tools": of(deep(15))}, None),
        ({"tools": of({"type": "string"})}, "tools[0]"),
        ({"tools": of({"type": "object", "properties": {"a": {"type": "nope"}}})}, "tools[0]"),
        ({"tools": of({}, {"properties": {"a": {"$ref": "http://127.0.0.1/x"}}})}, "tools[1]"),
        ({"tools": of({"required": ["a"], "properties": {"a": {"enum": []}}})}, "tools[0]"),
        ({"tools": of({"properties": {"a": {"minimum": float("nan")}}})}, None),
        ({"tools": of([])}, "tools[0].function.parameters"),
        ({"tools": [named("f g")]}, "tools[0].function.name"),
        ({"tools": [named("f\n")]}, "tools[0].function.name"),
        ({"tools": [named("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [named("")]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [named("f", extra=1)]}, "tools[0].function.extra"),
        ({"tools": "f"}, "tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": named("g")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed()}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed("f", "g")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "auto", "structured_outputs": {"regex": "a"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "auto", "structured_outputs": {"choice": ["a"]}}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [*HELLO, CALLER]}, "messages"),
        ({"messages": [*HELLO, CALLER, *HELLO]}, "messages"),
        ({"messages": [*HELLO, RESULT]}, "messages"),
        ({"messages": [*HELLO, CALLER, RESULT, RESULT]}, "messages"),
        ({"messages": [*HELLO, CALLER, RESULT | {"tool_call_id": "b"}]}, "messages"),
        ({"messages": [*HELLO, CALLER | {"tool_calls": [CALL, CALL]}, RESULT]}, "messages"),
        ({"messages": called("[1]")}, "messages"),
        ({"messages": called('{"a": NaN}')}, "messages"),
        ({"messages": called('{"a": 1')}, "messages"),
        ({"messages": called('{"a":' * 40 + "1" + "}" * 40)}, "messages"),
        ({"messages": [*HELLO, CALLER | {"tool_calls": []}]}, "messages[1]"),
        ({"messages": [*HELLO, {"role": "assistant"}]}, "messages[1]"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "function", "name": "f", "content": "5"}]}, "messages[0].role"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    body = json.dumps({"messages": HELLO} | fields)
    response = client.post("/v1/chat/completions", content=body, headers=JSON)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param or (error["param"] or "").startswith(f"{param}"), error
    assert "\n" not in error["message"]


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"properties": {"x": {"type": "string", "pattern": "("}}}, {"properties": 5}])
def test_why_a_schema_is_refused_does_not_speak_of_our_grammar(client: httpx.Client, schema: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]

    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "tools": tools, "tool_choice": "required"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools[0]")
    assert " | " not in answer.json()["error"]["message"]
    assert "arguments" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "x"}, {"type": "tool_result", "tool_use_id": "a", "content": "5"}],
        [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}],
        [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
    ],
)
def test_blocks_out_of_order_are_refused(client: httpx.Client, content: list[Any]) -> None:
    said = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    response = client.post("/v1/messages", json={"max_tokens": 5, "messages": [*HELLO, said, {"role": "user", "content": content}]})

    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("`messages[2].content")


@pytest.mark.parametrize("part", [b'"\\ud800"', b'"\xed\xa0\x80"', b"NaN", b"1e999", b"-Infinity"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"])
def test_what_is_no_json_value_is_refused_wherever_it_stands(client: httpx.Client, path: str, part: bytes) -> None:
    """Also deep in a schema, which no type of ours describes."""
    tools = (
        b'[{"type": "function", "name": "f", "input_schema": {"x": '
        + part
        + b'}, "function": {"name": "f", "parameters": {"a": '
        + part
        + b"}}}]"
    )
    response = client.post(path, content=b'{"tools": ' + tools + b"}", headers=JSON)

    assert response.status_code == 400, response.text
    assert "JSON" in json.dumps(response.json())


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{n}": {"type": "string"} for n in range(1500)}},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}] * 2}, "b": {"allOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"},
        {"properties": {"a": {"type": "string", "pattern": "^(((a{100}){100}){100}){100}$"}}, "required": ["a"]},
        {"properties": {"a": {"type": "array", "minItems": 10**7, "items": {"$ref": "#"}}}, "required": ["a"]},
    ],
)
def test_a_schema_that_is_a_bomb_ends(client: httpx.Client, schema: dict[str, Any]) -> None:
    """It is refused, or followed to the length of the answer; the server answers the next request."""
    response = client.post(
        "/v1/chat/completions", json={"messages": HELLO, "tools": of(schema), "tool_choice": "required", "max_tokens": 8}
    )

    assert response.status_code in (200, 400), response.text
    assert client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2}).status_code == 200
