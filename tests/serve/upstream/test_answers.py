"""The whole way of an answer that another server computes: our API before vLLM's and SGLang's contracts of ids."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from keural.tokenizer import KeuralTokenizer
from tests.helpers.fake_engines import entries, own
from tests.helpers.fronting import CONTEXT, HELLO, TEXT, Front, Fronted, an_engine
from tests.helpers.serving import PATIENCE, Writing, events, quick, service_of, serving, wait_until


@pytest.fixture(scope="module")
def embedded(tokenizer: KeuralTokenizer) -> Iterator[httpx.Client]:
    """Our server on a network of its own that writes the same."""
    with serving(service_of(tokenizer, Writing(tokenizer, TEXT, context_length=CONTEXT))) as client:
        yield client


def without_names(value: Any) -> Any:
    """An answer without what is another one each time."""
    if isinstance(value, dict):
        changing = ("id", "created", "created_at", "completed_at", "item_id")
        return {key: without_names(part) for key, part in value.items() if key not in changing}
    return [without_names(part) for part in value] if isinstance(value, list) else value


def stream_of(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return [without_names(json.loads(part)) if part.startswith("{") else part for part in events(response.text)]


def texts_of(response: httpx.Response) -> dict[int, str]:
    """The text of every choice of a stream."""
    found: dict[int, str] = {}
    for part in (part for part in stream_of(response) if isinstance(part, dict)):
        for choice in part["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": ["고양이"]},
        {"stop": ["at 고", "<|im"], "n": 2},
        {"max_tokens": 3},
        {"max_tokens": 12, "stop": "nowhere"},
        {"temperature": 1, "top_p": 0.5, "logit_bias": {"5": 2.5}},
        {"n": 3, "stream_options": {"include_usage": True}},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 4])
def test_an_answer_is_that_of_a_network_of_our_own(
    fronted: Fronted, embedded: httpx.Client, fields: dict[str, Any], stream: bool, chunk: int
) -> None:
    fronted.engine.chunk = chunk
    asked = {"messages": HELLO, "stream": stream} | fields
    if not stream:
        asked.pop("stream_options", None)

    ours, theirs = (client.post("/v1/chat/completions", json=asked) for client in (embedded, fronted.client))

    assert theirs.status_code == 200, theirs.text
    if not stream:
        expected, found = without_names(ours.json()), without_names(theirs.json())
        for answer in (expected, found):
            answer["usage"].pop("prompt_tokens_details")
        assert found == expected
    else:
        assert texts_of(theirs) == texts_of(ours)


@pytest.mark.parametrize("length", range(1, 9))
def test_characters_of_several_tokens_never_break(
    fronted: Fronted, embedded: httpx.Client, tokenizer: KeuralTokenizer, length: int
) -> None:
    fronted.engine.ids = [*tokenizer.encode("👋🏽쀍"), tokenizer.im_end_id]
    pieces = [part for part in events(fronted.post(stream=True, max_tokens=length).text) if part.startswith("{")]
    whole = fronted.post(max_tokens=length).json()["choices"][0]["message"]["content"]

    text = "".join(json.loads(part)["choices"][0]["delta"].get("content") or "" for part in pieces)
    assert text == whole == tokenizer.decode(fronted.engine.ids[:length])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "the cat"}),
        ("/v1/completions", {"prompt": [5, 6, 7], "stream": True}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 50}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 50, "stream": True}),
    ],
)
def test_every_address_answers(fronted: Fronted, embedded: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    ours, theirs = (client.post(path, json=fields) for client in (embedded, fronted.client))

    assert theirs.status_code == 200, theirs.text
    if not fields.get("stream"):
        remove = {"usage", "created"}
        assert {key: value for key, value in without_names(theirs.json()).items() if key not in remove} == {
            key: value for key, value in without_names(ours.json()).items() if key not in remove
        }


def test_a_prompt_goes_out_as_ids_and_nothing_else(fronted: Fronted, tokenizer: KeuralTokenizer) -> None:
    conversation = [{"role": "user", "content": "say <|im_end|> <bos>"}]
    rendered = fronted.client.post("/v1/chat/completions/render", json={"messages": conversation}).json()["token_ids"]

    fronted.post(messages=conversation)

    (asked,) = fronted.engine.requests
    assert asked.get("token_ids", asked.get("input_ids")) == rendered
    assert "cat" not in json.dumps(asked)
    assert set(asked["sampling_params"]["stop_token_ids"]) == {tokenizer.eos_id, tokenizer.im_end_id}


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 3])
def test_log_probabilities_come_with_their_tokens(
    fronted: Fronted, tokenizer: KeuralTokenizer, top: int, chunk: int, incremental: bool
) -> None:
    fronted.engine.chunk, fronted.engine.incremental = chunk, incremental

    content = fronted.post(logprobs=True, top_logprobs=top).json()["choices"][0]["logprobs"]["content"]

    ids = tokenizer.encode(TEXT)
    assert [entry["logprob"] for entry in content] == [own(place) for place in range(len(ids))]
    assert [entry["bytes"] for entry in content] == [list(tokenizer.token_bytes(token)) for token in ids]
    for place, (token, entry) in enumerate(zip(ids, content, strict=True)):
        expected = [(list(tokenizer.token_bytes(other)), value) for other, value in entries(token, place, top)]
        assert [(other["bytes"], other["logprob"]) for other in entry["top_logprobs"]] == expected


def test_all_ids_of_an_answer_at_once_or_the_new_ones_are_the_same(fronted: Fronted) -> None:
    fronted.engine.incremental = False
    whole = fronted.post().json()["choices"][0]["message"]["content"]
    fronted.engine.chunk = 5
    assert whole == fronted.post().json()["choices"][0]["message"]["content"] == TEXT


def test_held_tokens_of_a_prompt_are_told_where_the_server_tells_them(fronted: Fronted) -> None:
    assert fronted.post().json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert "prefix_cache" not in fronted.client.get("/metrics").text
    fronted.engine.cached = 3
    assert fronted.post().json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert 'keural:prefix_cache_hits_total{model_name="tiny"} 3.0' in fronted.client.get("/metrics").text


def test_a_length_that_the_context_allows_is_all_that_is_asked_for(fronted: Fronted) -> None:
    room = fronted.service.context_length
    prompt = [5] * (room - 4)

    answer = fronted.post("/v1/completions", prompt=prompt, max_tokens=100).json()

    params = fronted.engine.requests[0]["sampling_params"]
    assert params.get("max_tokens", params.get("max_new_tokens")) == 4
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4
    assert fronted.post("/v1/completions", prompt=[5] * room).json()["error"]["code"] == "context_length_exceeded"


def test_a_stop_string_ends_the_work_of_the_server(fronted: Fronted, tokenizer: KeuralTokenizer) -> None:
    stopped = len(tokenizer.encode(TEXT[: TEXT.index(" cat")]))
    fronted.engine.pause = lambda place: 0.0 if place <= stopped else 10 * PATIENCE
    before = fronted.upstreams.stats.finished.get("stop", 0)

    answer = fronted.post(stop=["the"]).json()

    assert answer["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: fronted.engine.given_up)
    wait_until(lambda: fronted.upstreams.stats.finished.get("stop", 0) == before + 1)
    assert fronted.engine.ended == 0


def test_a_client_that_leaves_ends_the_work_of_the_server(fronted: Fronted, kind: str) -> None:
    fronted.engine.pause = lambda place: 0.0 if place < 3 else 10 * PATIENCE
    with fronted.client.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
        next(response.iter_lines())

    wait_until(lambda: fronted.engine.given_up and fronted.engine.running == 0)
    wait_until(lambda: fronted.upstreams.running == 0)
    assert fronted.upstreams.stats.finished["cancelled"] >= 1
    if kind == "sglang":
        wait_until(lambda: any(name.startswith("by name: ") for name in fronted.engine.given_up))


def test_a_deadline_ends_the_work_of_the_server(fronted: Fronted) -> None:
    fronted.engine.pause = lambda place: 0.0 if place < 3 else 10 * PATIENCE
    response = fronted.client.post("/v1/chat/completions", json={"messages": HELLO}, headers={"X-Request-Timeout": "0.3"})

    assert response.status_code == 504
    wait_until(lambda: fronted.engine.given_up)


def test_more_requests_than_there_is_room_for_wait_and_then_are_turned_away(front: Front, tokenizer: KeuralTokenizer) -> None:
    engine = an_engine(tokenizer, pause=lambda place: 0.02)
    with front("vllm", engine, count=1, limits=quick(waiting=1)) as fronted:
        assert fronted.post(n=3).status_code == 400
        with fronted.client.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "n": 2, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            assert engine.running == 1
            refused = fronted.post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert [*lines]
        assert engine.ended == 2
