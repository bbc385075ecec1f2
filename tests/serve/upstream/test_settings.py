"""Settings of a request as vLLM and SGLang know them: sent exactly, or refused by name."""

import json
from typing import Any, get_args

import pytest

from keural.errors import UserError
from keural.serve.batching.requests import End
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.metrics import FINISHED
from keural.serve.upstream.opening import check_defaults
from keural.tokenizer import KeuralTokenizer
from tests.helpers.fronting import Front, Fronted, an_engine

UNLIKE = [
    ("vllm", {"temperature": 2.5}, "temperature"),
    ("vllm", {"temperature": 0.005}, "temperature"),
    ("sglang", {"repetition_penalty": 1.1}, "repetition_penalty"),
    ("sglang", {"seed": 7, "temperature": 1}, "seed"),
    ("sglang", {"logprobs": True, "temperature": 0.7}, "logprobs"),
    ("sglang", {"logprobs": True, "logit_bias": {"5": 1}}, "logprobs"),
    ("sglang", {"response_format": {"type": "json_object"}}, "structured_outputs"),
]


@pytest.mark.parametrize(("kind", "fields", "param"), UNLIKE, indirect=["kind"], ids=str)
def test_what_a_server_would_do_otherwise_is_refused_by_name(fronted: Fronted, fields: dict[str, Any], param: str) -> None:
    response = fronted.post(**fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert fronted.engine.requests == []


LIKE = [
    ("vllm", {"temperature": 0.000001}, {"temperature": 0.0}),
    ("vllm", {"temperature": 1, "top_p": 0}, {"temperature": 0.0, "top_p": 1.0}),
    ("vllm", {"temperature": 2, "seed": 2**63 - 1, "repetition_penalty": 1.3}, {"seed": 2**63 - 1, "repetition_penalty": 1.3}),
    ("vllm", {"logit_bias": {"5": -100}}, {"logit_bias": {"5": -100.0}, "ignore_eos": True}),
    ("vllm", {"structured_outputs": {"choice": ["a.b", "c"]}}, {"structured_outputs": {"choice": ["a.b", "c"]}}),
    ("vllm", {"structured_outputs": {"regex": "a+"}}, {"structured_outputs": {"regex": "a+"}}),
    ("vllm", {"response_format": {"type": "json_object"}}, {"structured_outputs": {"json": {"type": "object"}}}),
    ("sglang", {"temperature": 1, "top_p": 0}, {"temperature": 0.0, "top_p": 1.0}),
    ("sglang", {"seed": 7, "temperature": 0}, {"temperature": 0.0}),
    ("sglang", {"logprobs": True, "temperature": 1}, {"temperature": 1.0}),
    ("sglang", {"temperature": 50}, {"temperature": 50.0, "top_k": -1, "repetition_penalty": 1.0}),
]


@pytest.mark.parametrize(("kind", "fields", "sent"), LIKE, indirect=["kind"], ids=str)
def test_what_a_server_can_keep_is_sent_as_it_calls_it(fronted: Fronted, fields: dict[str, Any], sent: dict[str, Any]) -> None:
    response = fronted.post(**fields)

    assert response.status_code == 200, response.text
    params = fronted.engine.requests[0]["sampling_params"]
    assert {key: params.get(key) for key in sent} == sent


def test_answers_of_n_have_seeds_that_follow(front: Front, tokenizer: KeuralTokenizer) -> None:
    with front("sglang", an_engine(tokenizer, deterministic=True)) as fronted:
        assert fronted.post(n=3, seed=2**63 - 2, temperature=1).status_code == 200
        fronted.post(n=2, temperature=1)

        seeds = [body["sampling_params"]["sampling_seed"] for body in fronted.engine.requests]
        assert sorted(seeds[:3]) == [0, 2**63 - 2, 2**63 - 1]
        assert seeds[3] != seeds[4], "without a seed SGLang would give every answer the same one"


def test_sglang_with_a_tokenizer_follows_forms(front: Front, tokenizer: KeuralTokenizer) -> None:
    with front("sglang", an_engine(tokenizer, tokenizer=True)) as fronted:
        assert fronted.post(response_format={"type": "json_object"}).status_code == 200
        assert fronted.post(structured_outputs={"choice": ["a.b", "c"]}).status_code == 200
        first, second = (body["sampling_params"] for body in fronted.engine.requests)
        assert json.loads(first["json_schema"]) == {"type": "object"}
        assert second["regex"] == r"a\.b|c"


def test_a_form_that_the_server_does_not_know_is_the_clients_mistake(front: Front, tokenizer: KeuralTokenizer) -> None:
    with front("vllm", an_engine(tokenizer)) as fronted:
        fronted.service.grammars.regex = lambda pattern: fronted.service.grammars.json({"type": "object"})  # type: ignore[method-assign]
        response = fronted.post(structured_outputs={"regex": "(?=a)"}, stream=True)

        assert (response.status_code, response.json()["error"]["code"]) == (400, "refused_by_engine")
        assert "no such form" in response.json()["error"]["message"]


def test_a_models_own_settings_that_cannot_be_kept_are_refused_at_the_start(front: Front, tokenizer: KeuralTokenizer) -> None:
    with front("sglang", an_engine(tokenizer)) as fronted, pytest.raises(UserError, match="--repetition-penalty 1"):
        check_defaults(fronted.upstreams, SamplingParams())
    with front("vllm", an_engine(tokenizer)) as fronted:
        check_defaults(fronted.upstreams, SamplingParams())


def test_every_way_in_which_an_answer_ends_is_counted() -> None:
    assert set(FINISHED) == {word for part in get_args(End) for word in (get_args(part) or (part,))}


def test_what_is_not_known_of_servers_elsewhere_is_not_shown_as_zero(fronted: Fronted) -> None:
    fronted.post()
    text = fronted.client.get("/metrics").text

    for name in ("kv_cache_usage_perc", "steps_total", "sampler_seconds", "expert_tokens"):
        assert name not in text
    for name in ("num_requests_running", "num_requests_waiting", "generation_tokens_total", "time_to_first_token_seconds_count"):
        assert f"keural:{name}{{" in text
    assert 'keural:upstream_up{model_name="tiny",upstream="0"} 1.0' in text
