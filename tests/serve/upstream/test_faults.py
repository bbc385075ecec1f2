"""Servers that fail: what a client hears, who answers instead, and that the next request is answered."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from keural.errors import UserError
from keural.serve.upstream import client, watch
from keural.serve.upstream.models import FrontModel
from keural.serve.upstream.opening import CONTRACTS, addresses, read_key, remote
from keural.tokenizer import KeuralTokenizer
from tests.helpers.fake_engines import Engine, fake
from tests.helpers.fronting import CONTEXT, HELLO, TEXT, Front, Fronted, an_engine
from tests.helpers.serving import events, service_of, serving, wait_until


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0.05)
    monkeypatch.setattr(watch, "WHILE_DOWN", 0.05)
    monkeypatch.setattr(client, "LARGEST_EVENT", 150_000)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def answered(fronted: Fronted) -> bool:
    response = fronted.post()
    return response.status_code == 200 and response.json()["choices"][0]["message"]["content"] == TEXT


def garbled(event: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An event of either contract with other values where it says what came."""
    if "choices" in event:
        return event | {"choices": [choice | changes for choice in event["choices"]]}
    return event | {("output_ids" if key == "token_ids" else key): value for key, value in changes.items()}


ENDED = {"completion_tokens": 1, "finish_reason": {"type": "stop", "matched": 9}}
BROKEN = {
    "no JSON": lambda event: b"data: {not json}\n\n",
    "deep JSON": lambda event: b"data: " + b"[" * 100_000 + b"\n\n",
    "no object": lambda event: [1, 2],
    "no tokens": lambda event: garbled(event, token_ids="12"),
    "no ids": lambda event: garbled(event, token_ids=[True]),
    "a token below 0": lambda event: garbled(event, token_ids=[-1]),
    "a token beyond the vocabulary": lambda event: garbled(event, token_ids=[402]),
    "an end at a token that is none": lambda event: garbled(event, token_ids=[9], finish_reason="stop", meta_info=ENDED),
    "nothing": lambda event: {},
    "an empty line for ever": lambda event: b"data: " + b" " * 200_000,
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("stream", [False, True])
def test_what_no_contract_knows_is_an_error_and_goes_no_further(fronted: Fronted, what: str, stream: bool) -> None:
    fronted.engine.spoil = BROKEN[what]

    assert error_of(fronted.post(stream=stream)) == (500, "model_error")

    fronted.engine.spoil = lambda event: event
    assert answered(fronted)


def test_more_tokens_than_were_asked_for_are_not_believed(fronted: Fronted) -> None:
    many = {"completion_tokens": 7, "finish_reason": None}
    fronted.engine.spoil = lambda event: garbled(event, token_ids=[9] * 7, meta_info=many)
    assert error_of(fronted.post(max_tokens=3)) == (500, "model_error")


@pytest.mark.parametrize("kind", ["vllm"], indirect=True)
def test_log_probabilities_of_another_token_are_not_believed(fronted: Fronted) -> None:
    fronted.engine.spoil = lambda event: garbled(event, logprobs={"content": [{"token_id": 1, "logprob": -1.0}]})
    assert error_of(fronted.post(logprobs=True)) == (500, "model_error")
    fronted.engine.spoil = lambda event: garbled(event, logprobs=None)
    assert error_of(fronted.post(logprobs=True)) == (500, "model_error")


@pytest.mark.parametrize("kind", ["vllm"], indirect=True)
def test_fewer_log_probabilities_than_were_asked_for_are_not_made_up(fronted: Fronted) -> None:
    fronted.engine.most_listed = 2
    assert error_of(fronted.post(logprobs=True, top_logprobs=2)) == (500, "model_error")


@pytest.mark.parametrize("status", [429, 500, 503, 302, 404, 401])
def test_a_server_that_takes_nothing_is_said_to_be_unavailable(fronted: Fronted, status: int) -> None:
    fronted.engine.status = status

    response = fronted.post()

    assert error_of(response) == (503, "unavailable")
    assert response.headers["retry-after"] == "5"
    assert "as the test wants it" not in response.text, "what a server says of itself is nothing for clients"
    fronted.engine.status = 200
    wait_until(lambda: fronted.client.get("/health").status_code == 200)
    assert answered(fronted)


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_answer_that_breaks_off_ends_with_an_error_event(fronted: Fronted, chunk: int) -> None:
    fronted.engine.break_at, fronted.engine.chunk, fronted.engine.pause = 6, chunk, lambda place: 0.03

    response = fronted.post(stream=True)

    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert json.loads(last)["error"]["code"] == "model_error"
    assert sum(len(json.loads(part)["choices"]) for part in chunks) > 1
    assert error_of(fronted.post()) == (500, "model_error"), "not to be tried again: it had begun"
    assert len(fronted.engine.requests) == 2
    fronted.engine.break_at, fronted.engine.pause = None, lambda place: 0.0
    assert answered(fronted)


def test_a_server_that_gives_an_answer_up_is_no_end_of_it(fronted: Fronted) -> None:
    def give_up(event: dict[str, Any]) -> dict[str, Any]:
        if "choices" in event:
            return garbled(event, finish_reason="abort")
        return event | {"meta_info": event["meta_info"] | {"finish_reason": {"type": "abort", "message": "x", "status_code": 500}}}

    fronted.engine.spoil = give_up
    assert error_of(fronted.post()) == (503, "unavailable")


def test_a_server_that_says_nothing_after_the_end_does_not_hold_an_answer(fronted: Fronted) -> None:
    end = len(fronted.engine.ids) - 1
    fronted.engine.spoil = lambda event: event
    fronted.engine.pause = lambda place: 30.0 if place > end else 0.0
    assert answered(fronted)


# Several servers


@pytest.fixture
def two(kind: str, front: Front, tokenizer: KeuralTokenizer) -> Iterator[Fronted]:
    with front(kind, an_engine(tokenizer), an_engine(tokenizer)) as fronted:
        yield fronted


def asked(fronted: Fronted) -> list[int]:
    return [len(engine.requests) for engine in fronted.engines]


def test_another_server_answers_where_one_breaks_before_the_first_token(two: Fronted) -> None:
    two.engines[0].break_at = two.engines[0].status = 0
    two.engines[0].status = 200
    for _ in range(4):
        assert answered(two)
        wait_until(lambda: all(server.trouble is None for server in two.upstreams.servers))

    assert asked(two)[1] >= 4
    assert asked(two)[0] >= 1, "it was tried"
    assert two.upstreams.servers[0].failed == asked(two)[0]


def test_no_other_server_goes_on_with_an_answer_that_broke_off(two: Fronted) -> None:
    for engine in two.engines:
        engine.break_at, engine.pause = 6, lambda place: 0.02

    assert error_of(two.post()) == (500, "model_error")
    assert sum(asked(two)) == 1


def test_a_sick_server_gets_nothing_until_it_is_well(two: Fronted) -> None:
    two.engines[0].healthy = False
    wait_until(lambda: two.upstreams.servers[0].trouble is not None)
    for number in range(4):
        assert two.post(messages=[{"role": "user", "content": f"{number} " * 40}]).status_code == 200
    assert asked(two) == [0, 4]
    assert two.client.get("/health").status_code == 200, "one of them answers"
    assert 'keural:upstream_up{model_name="tiny",upstream="0"} 0.0' in two.client.get("/metrics").text

    two.engines[1].healthy = False
    wait_until(lambda: two.client.get("/health").status_code == 503)
    assert error_of(two.post()) == (503, "unavailable")
    told = two.client.get("/health").text
    assert "upstream 0 says that it does not work; upstream 1 says" in told
    assert "127.0.0.1" not in told, "addresses of servers are nobody's business who has no key"
    two.engines[0].healthy = two.engines[1].healthy = True
    wait_until(lambda: two.client.get("/health").status_code == 200)
    assert answered(two)


def test_conversations_stay_where_they_were_read_and_others_go_where_least_is_done(two: Fronted) -> None:
    openings = [f"{number} the cat sees a small red house " * 8 for number in range(5)]
    for turn in range(3):
        for opening in openings:
            more = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}] * turn
            assert two.post(messages=[{"role": "user", "content": opening}, *more], max_tokens=2).status_code == 200

    for engine in two.engines:
        beginnings = {tuple(body.get("token_ids", body.get("input_ids"))[:40]) for body in engine.requests}
        assert len(engine.requests) == 3 * len(beginnings) > 0, "every turn of a conversation went to the same server"


def test_requests_at_once_are_shared_out(two: Fronted) -> None:
    for engine in two.engines:
        engine.pause = lambda place: 0.02
    assert two.post(messages=[{"role": "user", "content": "the cat sees a small red house " * 8}], n=8).status_code == 200
    assert min(asked(two)) >= 2, "a beginning is worth waiting for a few others, not for all"


# At the start


def opened(kind: str, tokenizer: KeuralTokenizer, urls: list[str], key: str | None = None) -> Any:
    return remote(CONTRACTS[kind], urls, key, FrontModel(Path(), tokenizer, CONTEXT, False), "tiny", 8, lambda entry: None)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"name": "other"}, "serves 'other', not 'tiny'"),
    "a larger vocabulary": ({"vocab_size": 403}, "knows more than this model's 402 ids"),
    "a smaller vocabulary": ({"vocab_size": 401}, "does not know the last of this model's 402 ids"),
    "another key": ({"key": "right"}, "--upstream-key-file"),
    "no context": ({"max_model_len": 1}, "how long its context is"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_server_of_another_model_is_refused_at_the_start(kind: str, tokenizer: KeuralTokenizer, what: str) -> None:
    changes, message = WRONG[what]
    engine = an_engine(tokenizer)
    for name, value in changes.items():
        setattr(engine, name, value)
    with fake(kind, engine) as url, pytest.raises(UserError, match=message), opened(kind, tokenizer, [url], "wrong"):
        pass


def test_vllm_without_its_token_addresses_is_refused_with_the_flag_that_it_needs(tokenizer: KeuralTokenizer) -> None:
    with (
        fake("vllm", an_engine(tokenizer, scale_out=False)) as url,
        pytest.raises(UserError, match="--enable-scale-out"),
        opened("vllm", tokenizer, [url]),
    ):
        pass


def test_the_other_kind_of_server_is_refused(tokenizer: KeuralTokenizer) -> None:
    with fake("vllm", an_engine(tokenizer)) as url, pytest.raises(UserError, match="--engine"), opened("sglang", tokenizer, [url]):
        pass


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens, and nobody else can meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_servers_that_cannot_be_reached(
    kind: str, tokenizer: KeuralTokenizer, nobody: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="cannot be reached"), opened(kind, tokenizer, [nobody]):
        pass
    with (
        fake(kind, an_engine(tokenizer, key="right")) as url,
        opened(kind, tokenizer, [nobody, url], "right") as upstreams,
        serving(service_of(tokenizer, upstreams)) as client,
    ):
        assert f"({nobody} cannot be reached; it is used as soon as it answers)" in capfd.readouterr().err
        assert client.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200


def test_the_shortest_context_is_everybodys(front: Front, tokenizer: KeuralTokenizer) -> None:
    with front("vllm", an_engine(tokenizer, max_model_len=90), an_engine(tokenizer)) as fronted:
        assert fronted.client.get("/v1/models").json()["data"][0]["max_model_len"] == 90
    with front("vllm", an_engine(tokenizer, max_model_len=CONTEXT + 1000)) as fronted:
        assert fronted.service.context_length == CONTEXT, "no more than the model was made for"


@pytest.mark.parametrize(
    "given", ["localhost:8000", "ftp://x", "http://", "http://a:1,http://a:1/", ",", "http://u:p@h", "http://h?a=b"]
)
def test_what_is_no_address_of_a_server_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="--upstream"):
        addresses([given])


def test_addresses_with_commas_and_slashes() -> None:
    assert addresses(["http://a:1/,http://b:2/x", "https://c"]) == ["http://a:1", "http://b:2/x", "https://c"]


@pytest.mark.parametrize("content", ["", "# only words", "one\ntwo\n", "with blanks", "schlüssel"])
def test_a_file_without_one_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="must hold one key"):
        read_key(file)
    file.write_text("# for all\nabc123\n", encoding="utf-8")
    assert read_key(file) == "abc123"


def test_nothing_that_was_written_and_no_key_is_in_the_log(front: Front, tokenizer: KeuralTokenizer) -> None:
    engine = an_engine(tokenizer, key="secret-key")
    with front("vllm", engine, key="secret-key") as fronted:
        engine.status = 500
        fronted.post(messages=[{"role": "user", "content": "confidential"}])
        engine.status = 400
        fronted.post(messages=[{"role": "user", "content": "confidential"}])
        entries = json.dumps(fronted.log)
    assert '"failed"' in entries
    assert "confidential" not in entries
    assert "secret-key" not in entries
    assert "as the test" not in entries


def test_an_engine_that_is_asked_by_nobody_has_seen_only_the_probes(tokenizer: KeuralTokenizer) -> None:
    engine: Engine = an_engine(tokenizer)
    with fake("vllm", engine) as url, opened("vllm", tokenizer, [url]):
        assert engine.requests == []
