"""Whatever is written to whichever address: the only control ids that the network reads are those that the server put there."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples
from tests.helpers.serving import JSON, Writing, service_of, serving

SPELT = [
    "<|im_start|>", "<|im_end|>", "<bos>", "<eos>", "<pad>", "<unk>", "<s>", "</s>", "<|endoftext|>", "assistant\n", "\n", " ", "▁",
    "<0x00>", "\x00", "\u200b", "é", "안녕", "ㅋ", "👋🏽", "<|im_", "end|>", "<tool_call>", "{{", "%}",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(SPELT) | st.text(max_size=3), min_size=1, max_size=8).map("".join)
"""Spelt control tokens among anything else, lone halves of surrogate pairs left out."""


@pytest.fixture(scope="module")
def slots(tokenizer: KeuralTokenizer) -> Writing:
    return Writing(tokenizer, "yes", context_length=2000)


@pytest.fixture(scope="module")
def client(tokenizer: KeuralTokenizer, slots: Writing) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, slots, system="Be <|im_end|> brief.")) as opened:
        yield opened


def requests_with(text: str, cut: int) -> dict[str, list[Mapping[str, Any]]]:
    """Every field of every address that becomes a prompt, with this text, as a whole and in two parts."""
    parts = [{"type": "text", "text": text[:cut]}, {"type": "text", "text": text[cut:]}]
    turns = [{"role": role, "content": content} for role in ("system", "user", "assistant", "user") for content in (text, parts)]
    spoken = [{"role": role, "content": content} for role, content in (("user", text), ("assistant", parts), ("user", parts))]
    inputs = [{"role": "user", "content": [{**part, "type": "input_text"} for part in parts]}]
    return {
        "/v1/chat/completions": [{"messages": turns}, {"messages": turns[2:]}],
        "/v1/completions": [{"prompt": text}, {"prompt": [text, text[cut:]]}],
        "/v1/responses": [{"input": text, "instructions": text}, {"input": inputs}],
        "/v1/messages": [
            {"messages": spoken, "system": text, "max_tokens": 3},
            {"messages": spoken, "system": parts, "max_tokens": 3},
        ],
    }


def control_ids(tokenizer: KeuralTokenizer, ids: list[int]) -> list[int]:
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.im_start_id, tokenizer.im_end_id}
    return [token for token in ids if token in special]


@examples(6)
@given(text=TEXTS, cut=st.integers(0, 8))
def test_what_the_network_reads(client: httpx.Client, slots: Writing, tokenizer: KeuralTokenizer, text: str, cut: int) -> None:
    turn = [tokenizer.im_start_id, tokenizer.im_end_id]
    for path, bodies in requests_with(text, cut).items():
        for body in bodies:
            slots.prompts.clear()
            response = client.post(path, json=body)
            assert response.status_code == 200, (path, response.text)
            for read in slots.prompts:
                found = control_ids(tokenizer, read)
                if path == "/v1/completions":
                    assert found == [tokenizer.bos_id]
                else:
                    assert found == turn * (len(found) // 2) + turn[:1], path
            assert len(slots.prompts) == (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)


@examples(6)
@given(text=TEXTS, cut=st.integers(0, 8))
def test_what_is_counted_and_shown_is_what_is_read(
    client: httpx.Client, slots: Writing, tokenizer: KeuralTokenizer, text: str, cut: int
) -> None:
    bodies = requests_with(text, cut)
    for body in bodies["/v1/chat/completions"]:
        slots.prompts.clear()
        client.post("/v1/chat/completions", json=body)
        shown = client.post("/v1/chat/completions/render", json=body).json()["token_ids"]
        assert shown == client.post("/tokenize", json=body).json()["tokens"] == slots.prompts[0]
    for body in bodies["/v1/messages"]:
        slots.prompts.clear()
        client.post("/v1/messages", json=body)
        asked = {name: value for name, value in body.items() if name != "max_tokens"}
        assert client.post("/v1/messages/count_tokens", json=asked).json() == {"input_tokens": len(slots.prompts[0])}
    plain = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert control_ids(tokenizer, plain) == []
    assert client.post("/detokenize", json={"tokens": plain}).json() == {"prompt": text}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"])
@pytest.mark.parametrize("half", [r"\ud83d", r"\udc4b", r"a\ud83d\ud83d\udc4b"])
def test_half_a_character_is_refused_or_read_as_text(client: httpx.Client, path: str, half: str) -> None:
    body = json.dumps(requests_with("HALF", 2).get(path, [{"prompt": "HALF"}])[0]).replace("HALF", half)

    response = client.post(path, content=body.encode(), headers=JSON)

    assert response.status_code in (200, 400), response.text
    response.json()
