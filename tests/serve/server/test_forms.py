"""Answers of a given form: JSON of a schema, text of an expression, always valid, whatever the network would rather write."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from keural.serve.constrain import Grammars
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import Writing, events, service_of, serving

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"이름": {"enum": ["고양이", "cat"]}, "old": {"type": "boolean"}},
    "required": ["이름", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer) -> Iterator[httpx.Client]:
    """Of a network that would like to write something else."""
    with serving(service_of(tokenizer, Writing(tokenizer, "no JSON at all, never"))) as opened:
        yield opened


def answer(client: httpx.Client, **fields: Any) -> str:
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 1, "top_p": 1, "seed": 1} | fields)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    content: str = choice["message"]["content"]
    return content


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_followed(client: httpx.Client, seed: int) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}

    value = json.loads(answer(client, response_format=asked, seed=seed))

    assert value.keys() == {"이름", "old"}
    assert value["이름"] in ("고양이", "cat")
    assert isinstance(value["old"], bool)
    assert json.loads(answer(client, structured_outputs={"json": SCHEMA}, seed=seed)) == value


def test_an_expression_is_followed(client: httpx.Client) -> None:
    assert re.fullmatch("[가-나]{3}-[0-9]{2}😀", answer(client, structured_outputs={"regex": "[가-나]{3}-[0-9]{2}😀"}))


def test_a_choice_is_made(client: httpx.Client) -> None:
    choices = ["a.b", "예 (yes)", "[x]|{2}"]

    assert {answer(client, structured_outputs={"choice": choices}, seed=seed) for seed in range(6)} <= {*choices}


def test_several_answers_and_a_stream_have_their_own_places(client: httpx.Client) -> None:
    asked = {"messages": HELLO, "n": 3, "stream": True, "temperature": 1, "top_p": 1, "structured_outputs": {"json": SCHEMA}}
    parts = [json.loads(part) for part in events(client.post("/v1/chat/completions", json=asked).text)[:-1]]

    for index in range(3):
        texts = [choice["delta"].get("content", "") for part in parts for choice in part["choices"] if choice["index"] == index]
        assert json.loads("".join(texts)).keys() == {"이름", "old"}


def test_a_completion_has_a_form_too(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}})

    assert response.json()["choices"][0]["text"] in ("yes", "no")


LENIENT = {"type": "string", "not": {"minLength": 1}, "x-guidance": {"lenient": True}}
"""A schema that cannot be followed, with the word by which the library below would leave out what it cannot follow."""


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/x"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"response_format": "json"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 70_000]}}}},
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LENIENT}}},
        {"structured_outputs": {"json": LENIENT}},
        {"structured_outputs": {"regex": "(a"}},
        {"structured_outputs": {"regex": "[^\\s\\S]"}},
        {"structured_outputs": {"regex": "(a{1000}){1000}"}},
        {"structured_outputs": {"regex": "a" * 5000}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"grammar": "x"}},
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = client.post("/v1/chat/completions", json={"messages": HELLO} | fields)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "form_too_complex" or error["param"].startswith(("response_format", "structured_outputs"))
    assert "\n" not in error["message"]
    assert answer(client, structured_outputs={"choice": ["yes"]}) == "yes"


def test_what_the_grammar_says_holds_for_every_token(tokenizer: KeuralTokenizer) -> None:
    """Text is followed token by token, and what is not in the form is not allowed at its first wrong token."""
    form = Grammars(tokenizer).json(SCHEMA)
    for token in tokenizer.encode('{"이름": "고양이", "old": true}'):
        assert form.allowed()[token]
        form.take(token)
    assert form.allowed().nonzero()[0].tolist() == [tokenizer.im_end_id]
    again = form.fresh()
    assert again.failure is None
    assert not Grammars(tokenizer).json(SCHEMA).allowed()[tokenizer.encode("[")[0]]
