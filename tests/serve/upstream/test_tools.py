"""Calls of tools that another server computes: their form goes out as that server takes one, and answers come back as calls."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from keural.tokenizer import KeuralTokenizer
from tests.helpers.fronting import Front, Fronted, an_engine
from tests.helpers.tools import AGE, CALLS, TOOLS, WEATHER, Api, ask_chat, ask_messages, ask_responses

APIS = [ask_chat, ask_responses, ask_messages]
CONTEXT = 1500
CALLED = [("weather", '{"city": "서울 </tool_call>"}'), ("age", '{"who": "me", "old": true}')]


class Server(NamedTuple):
    """A kind of server, and what it follows forms with."""

    kind: str
    library: str


@pytest.fixture(scope="module", params=[Server("vllm", ""), Server("sglang", "xgrammar"), Server("sglang", "llguidance")], ids=str)
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.param
    return found


@pytest.fixture(scope="module")
def calling(server: Server, front: Front, tokenizer: KeuralTokenizer) -> Iterator[Fronted]:
    """Our server before one that writes two calls, of a model that was trained on them."""
    engine = an_engine(tokenizer, CALLS, tokenizer=True, grammar_backend=server.library, max_model_len=CONTEXT)
    with front(server.kind, engine, context=CONTEXT, trained_on_tools=True) as fronted:
        yield fronted


def sent(fronted: Fronted) -> dict[str, Any]:
    """The settings of the last request."""
    found: dict[str, Any] = fronted.engine.requests[-1]["sampling_params"]
    return found


def form_sent(fronted: Fronted, server: Server) -> str:
    """The form of the last answer, as a text."""
    params = sent(fronted)
    if server.kind == "vllm":
        (form,) = params["structured_outputs"].values()
        assert params["structured_outputs"] == {"grammar": form}
        return str(form)
    name = "structural_tag" if server.library == "xgrammar" else "ebnf"
    assert params.keys() & {"json_schema", "regex", "ebnf", "structural_tag"} == {name}
    return str(params[name])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", APIS)
def test_calls_that_must_come_are_calls_of_the_answer(calling: Fronted, server: Server, ask: Api, stream: bool) -> None:
    found = ask(calling.client, stream, tools=TOOLS, choice="required")

    assert (found.text, found.finish) == ("", "calls")
    assert [(name, json.loads(arguments)) for name, arguments in found.calls] == [(name, json.loads(said)) for name, said in CALLED]
    assert all(tool["name"] in form_sent(calling, server) for tool in TOOLS)


@pytest.mark.parametrize("ask", APIS)
def test_a_named_tool_is_the_only_one_of_the_form(calling: Fronted, server: Server, ask: Api) -> None:
    ask(calling.client, False, tools=TOOLS, choice="age")

    form = form_sent(calling, server)
    assert AGE["name"] in form
    assert WEATHER["name"] not in form
    assert ("repeat" in form or "{0,15}" in form) is False, "one call of it"


@pytest.mark.parametrize(("choice", "begins"), [("auto", True), ("none", False)])
def test_a_model_that_decides_and_one_that_may_not_are_held_to_it(
    calling: Fronted, server: Server, choice: str, begins: bool
) -> None:
    ask_chat(calling.client, False, tools=TOOLS, choice=choice)

    assert (WEATHER["name"] in form_sent(calling, server)) == begins


def test_a_form_of_what_is_said_goes_out_where_no_call_may_come(calling: Fronted, server: Server) -> None:
    ask_chat(calling.client, False, tools=TOOLS, choice="none", response_format={"type": "json_object"})

    params = sent(calling)
    form = params["structured_outputs"]["json"] if server.kind == "vllm" else json.loads(params["json_schema"])
    assert form == {"type": "object"}


def test_a_model_that_may_call_or_answer_in_json_is_held_to_both(calling: Fronted, server: Server) -> None:
    schema = {"type": "object", "properties": {"mood": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    assert len(ask_chat(calling.client, False, tools=TOOLS, response_format=form).calls) == 2

    assert all(word in form_sent(calling, server) for word in ("mood", WEATHER["name"]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer": False}, "--skip-tokenizer-init"),
        ({"tokenizer": True, "grammar_backend": "outlines"}, "--grammar-backend"),
        ({"tokenizer": True, "grammar_backend": None}, "--grammar-backend"),
        ({"tokenizer": True, "grammar_backend": ["xgrammar"]}, "--grammar-backend"),
    ],
)
def test_a_server_that_cannot_hold_to_calls_is_not_asked(
    front: Front, tokenizer: KeuralTokenizer, changes: dict[str, Any], why: str
) -> None:
    engine = an_engine(tokenizer, max_model_len=CONTEXT, **changes)
    with front("sglang", engine, context=CONTEXT) as fronted:
        response = ask_chat.send(fronted.client, tools=TOOLS, choice="required")

        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert why in response.json()["error"]["message"]
        assert engine.requests == []


def test_calls_go_to_the_server_that_can_hold_to_them(front: Front, tokenizer: KeuralTokenizer) -> None:
    plain = an_engine(tokenizer, CALLS, max_model_len=CONTEXT)
    able = an_engine(tokenizer, CALLS, tokenizer=True, max_model_len=CONTEXT)
    with front("sglang", plain, able, context=CONTEXT) as fronted:
        for _ in range(3):
            assert ask_chat(fronted.client, False, tools=TOOLS, choice="required").finish == "calls"
    assert (len(plain.requests), len(able.requests)) == (0, 3)


def test_arguments_that_are_no_json_are_an_error_of_the_model(front: Front, tokenizer: KeuralTokenizer) -> None:
    engine = an_engine(tokenizer, CALLS.replace("true}", "tru}"), max_model_len=CONTEXT)
    with front("vllm", engine, context=CONTEXT) as fronted:
        response = ask_messages.send(fronted.client, tools=TOOLS, choice="required")

        assert (response.status_code, response.json()["error"]["type"]) == (500, "api_error")
        assert "no JSON" in response.json()["error"]["message"]
        assert fronted.client.get("/health").status_code == 200
