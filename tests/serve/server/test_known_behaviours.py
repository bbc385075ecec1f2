"""What other servers' suites look at and their users complain of: equality under load and reuse, stops, plain refusals."""

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from keural.serve.batching.transformers_slots import TransformersSlots
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine
from keural.serve.server.completions import text_ids
from keural.serve.server.service import Service
from keural.serve.text import stream_answer
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import JSON, Writing, service_of, serving, wait_until

TEXT = "안녕하세요 👋🏽 the cat"
HELLO: Any = [{"role": "user", "content": "hello"}]
PROMPTS = [
    "the cat sees a small red house",
    "고양이는 작은 빨간 집",
    "x",
    "two blue birds in the garden " * 3,
    "안녕하세요 감사합니다",
    "",
]
SETTINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 7}, {"temperature": 0.7, "top_p": 0.8, "seed": 8}]
ASKED = [{"prompt": prompt, "max_tokens": 12, **settings} for prompt in PROMPTS for settings in SETTINGS]


def network(tokenizer: KeuralTokenizer, model_dir: Path, slots: int, batch_tokens: int = 64) -> Service:
    """A small random network with so many slots."""
    made = TransformersSlots(TransformersEngine(model_dir).model, slots)
    made.batch_tokens = made.alone_tokens = batch_tokens
    return Service(tokenizer, made, "tiny")


def texts(client: httpx.Client, at_once: int) -> list[str]:
    """The answers to everything that is asked, so many at once."""
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda asked: client.post("/v1/completions", json=asked).json()["choices"][0]["text"], ASKED)
        return list(answers)


@pytest.fixture(scope="module")
def alone(tokenizer: KeuralTokenizer, model_dir: Path) -> list[str]:
    """The answers of the engine that knows one stream and no server."""
    engine, found = TransformersEngine(model_dir), []
    for asked in ASKED:
        given = {name: value for name, value in asked.items() if name not in ("prompt", "max_tokens")}
        sampling = SamplingParams(max_new_tokens=asked["max_tokens"], **given)
        found.append(stream_answer(engine, text_ids(tokenizer, asked["prompt"]), sampling, lambda _: None).text)
    return found


class TestAnAnswerDependsOnItsRequestAlone:
    def test_not_on_what_else_is_answered(self, tokenizer: KeuralTokenizer, model_dir: Path, alone: list[str]) -> None:
        with serving(network(tokenizer, model_dir, 4)) as client:
            assert texts(client, 8) == alone

    def test_not_on_how_its_prompt_was_read(self, tokenizer: KeuralTokenizer, model_dir: Path, alone: list[str]) -> None:
        with serving(network(tokenizer, model_dir, 2, batch_tokens=3)) as client:
            assert texts(client, 2) == alone

    def test_not_on_what_was_read_before(self, tokenizer: KeuralTokenizer, model_dir: Path, alone: list[str]) -> None:
        with serving(network(tokenizer, model_dir, 1)) as client:
            assert [texts(client, 1) for _ in range(2)] == [alone] * 2
            usage = client.post("/v1/completions", json=ASKED[0]).json()["usage"]

        assert usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.fixture(scope="module")
def slots(tokenizer: KeuralTokenizer) -> Writing:
    return Writing(tokenizer, TEXT)


@pytest.fixture(scope="module")
def plain(tokenizer: KeuralTokenizer, slots: Writing) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, slots)) as opened:
        yield opened


@pytest.mark.parametrize("stop", [["the"], ["👋🏽", "zzz"], "cat"])
def test_stop_strings_through_the_library(client: OpenAI, stop: Any) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stop=stop, stream=True)
    found = [part.choices[0] for part in stream]

    first = stop if isinstance(stop, str) else stop[0]
    assert "".join(choice.delta.content or "" for choice in found) == TEXT[: TEXT.index(first)]
    assert [choice.finish_reason for choice in found if choice.finish_reason] == ["stop"]


def test_a_stream_that_the_library_closes_frees_its_slot(tokenizer: KeuralTokenizer) -> None:
    service = service_of(tokenizer, Writing(tokenizer, "the cat " * 40))
    with serving(service) as opened:
        library = OpenAI(base_url=f"{opened.base_url}/v1", api_key="none", max_retries=0)
        with library.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
            next(iter(stream))
        wait_until(lambda: service.answers.open == 0)


def test_too_long_a_prompt_is_the_librarys_own_error_before_any_chunk(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "long " * 2000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=long, stream=True)

    assert caught.value.code == "context_length_exceeded"


def test_an_answer_may_be_asked_for_longer_than_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10**6)

    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"x"', b"true", b"[{}]", b"{}", b""])
def test_a_body_that_is_no_object_is_refused_everywhere(plain: httpx.Client, body: bytes) -> None:
    paths = plain.get("/openapi.json").json()["paths"]
    for path in (path for path, methods in paths.items() if "post" in methods):
        response = plain.post(path, content=body, headers=JSON)
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_null_is_the_same_as_leaving_a_field_out(plain: httpx.Client, path: str) -> None:
    schema = plain.get("/openapi.json").json()
    name = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    model = schema["components"]["schemas"][name]
    needed: dict[str, Any] = {"messages": HELLO, "input": "x", "max_tokens": 5}
    body = {name: needed[name] for name in model["required"]}

    response = plain.post(path, json=dict.fromkeys(model["properties"]) | body)

    assert response.status_code == 200, response.text


def test_an_error_of_the_network_does_not_quote_itself(tokenizer: KeuralTokenizer) -> None:
    def fail() -> None:
        raise RuntimeError("/secret/path 0x7f00 hello")

    with serving(service_of(tokenizer, Writing(tokenizer, "x", before_step=fail))) as broken:
        response = broken.post("/v1/chat/completions", json={"messages": HELLO})

    assert response.status_code == 500
    assert "secret" not in response.text
    assert "0x" not in response.text


def test_every_figure_is_finite(plain: httpx.Client) -> None:
    plain.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})
    plain.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 8, "stream": True})

    lines = [line for line in plain.get("/metrics").text.splitlines() if not line.startswith("#")]
    values = [float(line.rpartition(" ")[2]) for line in lines]
    assert all(math.isfinite(value) and value >= 0 for value in values)
    assert {name for line in lines if (name := re.match(r"keural:(\w+)_seconds_count", line))}


def test_a_tool_that_is_not_asked_for_is_not_called(tokenizer: KeuralTokenizer) -> None:
    """Without `tools` the tags of a call are words like others."""
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    with serving(service_of(tokenizer, Writing(tokenizer, text), trained_on_tools=True)) as opened:
        choice = opened.post("/v1/chat/completions", json={"messages": HELLO, "tool_choice": None, "tools": None}).json()[
            "choices"
        ][0]

    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]
