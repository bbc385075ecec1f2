"""OpenAI's own client, which refuses every answer that is not exactly what the API's types say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionMessageParam

from keural.serve.batching.transformers_slots import TransformersSlots
from keural.serve.engines.transformers import TransformersEngine
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import PATIENCE, Writing, service_of, serving

HELLO: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi 고양이"}]


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer, model_dir: Path) -> Iterator[OpenAI]:
    """Of a small random network."""
    with serving(Service(tokenizer, TransformersSlots(TransformersEngine(model_dir).model, 2), "tiny")) as plain:
        url = f"{plain.base_url}/v1"
        yield OpenAI(base_url=url, api_key="none", _strict_response_validation=True, max_retries=0, timeout=PATIENCE)


def test_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=12, n=2, logprobs=True, top_logprobs=3, seed=1,
        temperature=0.9, top_p=0.9, stop=["zzz"], logit_bias={"300": 1}, user="me", extra_body={"repetition_penalty": 1.2},
    )  # fmt: skip

    assert len(answer.choices) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content


def test_a_streamed_chat(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage or parts[-1].usage is not None
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason


def test_the_clients_own_helper_for_streams(tokenizer: KeuralTokenizer) -> None:
    with serving(service_of(tokenizer, Writing(tokenizer, "안녕 the cat"))) as plain:
        client = OpenAI(base_url=f"{plain.base_url}/v1", api_key="none", _strict_response_validation=True, max_retries=0)
        with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()

    assert final.choices[0].message.content == "안녕 the cat"


@pytest.mark.parametrize("prompt", ["the cat", ["the cat", "고양이"], [5, 300], [[5], [300]]])
def test_a_completion(client: OpenAI, prompt: Any) -> None:
    asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "seed": 2, "logprobs": 2}
    whole = client.completions.create(**asked)
    # The type of a choice knows no null for `finish_reason`, which the API has in all chunks but the last: here it is filled in.
    plain = OpenAI(base_url=client.base_url, api_key="none", max_retries=0)
    parts = list(plain.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    for part in parts:
        for choice in part.choices:
            choice.finish_reason = choice.finish_reason or "stop"
        Completion.model_validate(part.model_dump(), strict=True)
    for choice in whole.choices:
        said = "".join(other.text for part in parts for other in part.choices if other.index == choice.index)
        assert said == choice.text
    assert parts[-1].choices == []


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "keural"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (openai.BadRequestError, {"extra_body": {"top_k": 1}}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "long " * 2000}]}),
        (openai.NotFoundError, {"model": "other"}),
    ],
)
def test_errors_are_the_clients_own(client: OpenAI, kind: type[openai.APIStatusError], fields: Any) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": HELLO} | fields))

    assert caught.value.code
    assert caught.value.request_id
