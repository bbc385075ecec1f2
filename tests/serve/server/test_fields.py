"""Every field of a request is honoured, or refused with its name; some are accepted because they change nothing."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats
from pydantic import BaseModel, ValidationError

from keural.serve.server.chat import ChatRequest
from keural.serve.server.completions import CompletionRequest
from keural.serve.server.messages import MessagesRequest
from keural.serve.server.responses import ResponsesRequest
from keural.serve.server.tokens import DetokenizeRequest
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import Writing, service_of, serving

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

LISTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, {"messages": [1, 2]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [1, 2]}]}),
    (ChatRequest, {"messages": HELLO, "stop": [1, 2]}),
    (CompletionRequest, {"prompt": [-1, -2]}),
    (CompletionRequest, {"prompt": [[-1, -2], [-3]]}),
    (ResponsesRequest, {"input": [1, 2]}),
    (ResponsesRequest, {"input": "x", "include": ["a", "b"]}),
    (MessagesRequest, {"max_tokens": 1, "messages": [1, 2]}),
    (DetokenizeRequest, {"tokens": [-1, -2]}),
]
"""Lists with two wrong items."""


HONOURED: dict[str, Any] = {
    "messages": HELLO, "model": "tiny", "prompt": "a", "logit_bias": {"300": 1}, "logprobs": True, "max_completion_tokens": 2,
    "max_tokens": 2, "n": 2, "seed": 1, "stop": ["x"], "stream_options": {"include_usage": True}, "temperature": 0.5,
    "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a+"},
    "top_logprobs": 1, "top_p": 0.5, "stream": True, "repetition_penalty": 1.2, "tools": [TOOL], "tool_choice": "required",
    "parallel_tool_calls": False,
}  # fmt: skip
"""What the other tests show to be honoured, each with a value."""
ACCEPTED: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "x", "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, Any]] = {
    "frequency_penalty": (0, 0.5),
    "presence_penalty": (0.0, -1),
    "service_tier": ("auto", "flex"),
    "store": (False, True),
    "modalities": (["text"], ["text", "audio"]),
    "audio": (None, {"voice": "x", "format": "mp3"}),
    "functions": ([], [{"name": "f"}]),
    "function_call": ("none", {"name": "f"}),
    "prediction": (None, {"type": "content", "content": "x"}),
    "moderation": (None, {"model": "x"}),
    "reasoning_effort": ("none", "high"),
    "verbosity": ("medium", "low"),
    "web_search_options": (None, {}),
    "echo": (False, True),
    "best_of": (1, 2),
    "suffix": (None, "x"),
}
"""With the value that says what is done anyway, and one that cannot be honoured."""
CHAT = sorted(of_chats.CompletionCreateParamsStreaming.__annotations__)
COMPLETION = sorted({*of_completions.CompletionCreateParamsBase.__annotations__, "stream"})
NEEDED: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True}, "stream_options": {"stream": True}, "tools": {"tool_choice": "none"},
    "tool_choice": {"tools": [TOOL], "max_tokens": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer) -> Any:
    with serving(service_of(tokenizer, Writing(tokenizer, "the cat"))) as opened:
        yield opened


def post(client: httpx.Client, fields: dict[str, Any], kind: str = "chat") -> httpx.Response:
    if kind == "chat":
        return client.post("/v1/chat/completions", json={"messages": HELLO} | fields)
    return client.post("/v1/completions", json={"prompt": "a"} | fields)


def refused(response: httpx.Response) -> dict[str, Any]:
    """The error of a request that was refused as it should be."""
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("kind", "name"), [*(("chat", name) for name in CHAT), *(("text", name) for name in COMPLETION)])
def test_no_field_of_the_api_is_ignored(client: httpx.Client, kind: str, name: str) -> None:
    value = 1 if (kind, name) == ("text", "logprobs") else HONOURED.get(name, ACCEPTED.get(name))
    if name in NEUTRAL:
        value, impossible = NEUTRAL[name]
        error = refused(post(client, {name: impossible}, kind))
        assert error["param"] == name
        assert name in error["message"]
        assert error["code"] == "unsupported_parameter"
    else:
        assert value is not None, "a field of the API that no table names"

    assert post(client, NEEDED.get(name, {}) | {name: value}, kind).status_code == 200


def test_the_tables_of_this_file_are_all_fields() -> None:
    known = {*HONOURED, *ACCEPTED, *NEUTRAL}

    assert known == {*ChatRequest.model_fields, *CompletionRequest.model_fields}


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text()
    table = page.partition("## Fields")[2].partition("\n## ")[0]

    assert {*re.findall(r"`([a-z_]+)`", table)} >= {*HONOURED, *ACCEPTED, *NEUTRAL}


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_field_that_nobody_knows_is_refused(client: httpx.Client, kind: str) -> None:
    error = refused(post(client, {"top_k": 5}, kind))

    assert (error["param"], error["code"]) == ("top_k", "unknown_parameter")


def test_null_is_the_same_as_leaving_out_what_nobody_knows(client: httpx.Client) -> None:
    said = {"role": "user", "content": [{"type": "text", "text": "x", "later": None}], "weight": None}

    assert post(client, {"messages": [said], "top_k": None}).status_code == 200
    assert refused(post(client, {"messages": [said], "top_k": None, "top_a": 1}))["param"] == "top_a"


IMPOSSIBLE = [
    ("temperature", -1), ("temperature", "hot"), ("temperature", True), ("temperature", 1e9), ("top_p", 1.5), ("top_p", -0.1),
    ("max_tokens", 0), ("max_tokens", 2.5), ("max_completion_tokens", "7"), ("n", 0), ("n", 9), ("n", 10**9), ("seed", -1),
    ("seed", 2**63), ("stop", ""), ("stop", ["x", ""]), ("stop", ["x"] * 17), ("stop", "x" * 257), ("stop", 5),
    ("logit_bias", {"300": 101}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"402": 1}),
    ("logit_bias", {"5": 100, "05": -100}),
    ("logit_bias", {str(token): 1 for token in range(1025)}), ("logit_bias", [1]), ("stream", "yes"), ("top_logprobs", 21),
    ("top_logprobs", -1), ("logprobs", 5), ("repetition_penalty", 0), ("repetition_penalty", 1e9), ("messages", []),
    ("messages", None), ("messages", "hello"), ("messages", [{"role": "user"}]), ("messages", [{"content": "x"}]),
    ("messages", [{"role": "narrator", "content": "x"}]), ("messages", [{"role": "tool", "content": "x", "tool_call_id": "1"}]),
    ("messages", [{"role": "user", "content": None}]), ("messages", [{"role": "user", "content": []}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    ("messages", [{"role": "user", "content": "x", "name": "me"}]), ("messages", [{"role": "user", "content": "x", "weight": 1}]),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}]), ("stream_options", {"other": 1}),
    ("stream_options", {"include_usage": True}), ("model", 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_its_name(client: httpx.Client, name: str, value: Any) -> None:
    error = refused(post(client, {name: value}))

    assert error["param"].partition(".")[0].partition("[")[0] == name
    assert name in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1100


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [402], [[1], [402]], ["a", 1], [1, "a"], [[1], "a"], {}, None, ["a"] * 9])
def test_an_impossible_prompt_is_refused(client: httpx.Client, prompt: Any) -> None:
    assert refused(post(client, {"prompt": prompt}, "text"))["param"].startswith("prompt")


def test_the_place_inside_a_message_is_named(client: httpx.Client) -> None:
    content = [{"type": "text", "text": "x"}, {"type": "text", "text": 5}]

    error = refused(post(client, {"messages": [*HELLO, {"role": "user", "content": content}]}))

    assert error["param"] == "messages[1].content[1].text"


def test_our_own_answer_may_be_sent_back(client: httpx.Client) -> None:
    said = post(client, {}).json()["choices"][0]["message"]
    extra = {"annotations": [], "audio": None, "tool_calls": None, "function_call": None}

    assert post(client, {"messages": [*HELLO, said | extra, *HELLO]}).status_code == 200


def test_a_lone_surrogate_is_refused(client: httpx.Client) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'

    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    assert "surrogate" in refused(response)["message"]


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32", "cp949"])
def test_a_body_in_another_encoding_is_refused_whatever_it_says(client: httpx.Client, coding: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": float("nan")}}}
    messages = [{"role": "user", "content": "안녕"}]
    body = json.dumps({"messages": messages, "response_format": form}, ensure_ascii=False).encode(coding)

    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    assert refused(response)["code"] == "invalid_json"


@pytest.mark.parametrize(
    "twice",
    ['"max_tokens": 1, "max_tokens": 2', '"metadata": {"a": 1, "a": 1}', r'"\ud800": 1, "\ud800": 2'],
    ids=["a field", "inside", "half a pair"],
)
def test_a_field_that_is_given_twice_is_refused(client: httpx.Client, twice: str) -> None:
    body = '{"messages": [{"role": "user", "content": "x"}], %s}' % twice  # noqa: UP031

    response = client.post("/v1/chat/completions", content=body.encode(), headers={"content-type": "application/json"})

    assert refused(response)["code"] == "invalid_json"
    assert "twice" in refused(response)["message"]


def test_another_model_is_not_here(client: httpx.Client) -> None:
    response = post(client, {"model": "gpt-4"})

    assert response.status_code == 404
    assert response.json()["error"] | {"message": ""} == {
        "message": "", "type": "not_found_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "fields"), [("chat", {"messages": [{"role": "user", "content": "a " * 500}]}), ("text", {"prompt": [5] * 400})]
)
def test_what_is_too_long_is_refused_with_both_numbers(client: httpx.Client, kind: str, fields: Any, stream: bool) -> None:
    error = refused(post(client, fields | {"stream": stream}, kind))

    assert error["code"] == "context_length_exceeded"
    numbers = [int(number) for number in re.findall(r"\d+", error["message"])]
    assert numbers[1] == 400
    assert numbers[0] >= 400


@pytest.mark.parametrize(("kind", "body"), LISTS)
def test_a_list_is_looked_at_up_to_its_first_wrong_item(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)

    assert refused.value.error_count() == 1
