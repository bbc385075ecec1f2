"""Calls are read out of an answer however it comes, stop strings leave them alone, and the grammar holds them to their schema."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.serve.calls import (
    Arguments,
    CallBegun,
    CallEnded,
    CallEvent,
    CallForm,
    CallReader,
    Said,
    StopsBesideCalls,
    arguments_schema,
)
from keural.serve.constrain import Grammars
from keural.serve.stops import StopStrings
from keural.tokenizer import KeuralTokenizer, ToolCall, parse_answer, with_calls

LETTERS = ["<", "tool_call", ">", "\n", "{", "}", '"', "\\", "가", " ", "</tool_call>", "a"]
TEXT = st.lists(st.sampled_from(LETTERS), max_size=6).map("".join)
VALUE = st.recursive(
    st.none() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2)
)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "g-1"]), st.dictionaries(TEXT, VALUE, max_size=2)), max_size=3)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(places)]


def read(parts: list[str]) -> list[CallEvent]:
    """All events of a text, with texts that follow each other joined."""
    reader, events = CallReader(), list[CallEvent]()
    for event in [event for part in parts for event in reader.push(part)] + reader.flush():
        last = events[-1] if events else None
        if isinstance(event, Said) and isinstance(last, Said):
            events[-1] = Said(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            events[-1] = Arguments(last.text + event.text)
        else:
            events.append(event)
    return events


@given(said=TEXT.filter(lambda text: "<tool_call>" not in text), calls=CALLS, cuts=st.lists(st.integers(0, 400), max_size=30))
def test_an_answer_is_taken_apart_however_it_comes(said: str, calls: list[tuple[str, Any]], cuts: list[int]) -> None:
    text = with_calls(said, [ToolCall(*call) for call in calls])
    events = read(pieces(text, cuts))

    parsed = parse_answer(text) if not text.startswith("<think>") else None
    assert parsed is not None
    assert "".join(event.text for event in events if isinstance(event, Said)) == parsed.content
    found = [event for event in events if not isinstance(event, Said)]
    expected = [
        event
        for name, arguments in calls
        for event in (CallBegun(name), Arguments(json.dumps(arguments, ensure_ascii=False)), CallEnded())
    ]
    assert found == expected


@pytest.mark.parametrize("length", range(1, 70))
def test_a_cut_answer_gives_what_there_is(length: int) -> None:
    text = with_calls("hi", [ToolCall("f", {"a": {"b": "}"}})])[:length]
    events = read([text])

    arguments = '{"a": {"b": "}"}}'
    started = text.partition('"arguments": ')[2]
    assert "".join(event.text for event in events if isinstance(event, Arguments)) == started[: len(arguments)]
    assert (CallEnded() in events) == started.startswith(arguments)


@given(
    said=TEXT.filter(lambda text: "<tool_call>" not in text), calls=CALLS,
    stops=st.lists(st.sampled_from(["<", "tool", "\n\n", "\n", "}", "가 ", '"', "a"]), min_size=1, max_size=2),
    cuts=st.lists(st.integers(0, 400), max_size=30),
)  # fmt: skip
def test_stop_strings_are_those_of_what_is_said(said: str, calls: list[tuple[str, Any]], stops: list[str], cuts: list[int]) -> None:
    text = with_calls(said, [ToolCall(*call) for call in calls])
    before = text.partition("<tool_call>")[0]
    before = before.rstrip("\n") if calls else before
    plain, beside = StopStrings(stops), StopsBesideCalls(stops)
    shown = "".join(beside.push(part) for part in pieces(text, cuts)) + beside.flush()

    expected = plain.push(before) + plain.flush()
    assert beside.found == plain.found
    assert shown == (expected if plain.found else text)


SCHEMAS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"properties": {"a": {"type": "integer"}}},
        ['{"a": 1}', "{}"],
        ['{"a": 1, "b": 2}', '{"a":1}', '{\n"a": 1}', '{"a": "1"}', "[]", "null"],
    ),
    ({"properties": {"a": {}}, "additionalProperties": True}, ['{"a": 1, "b": 2}'], ["[]"]),
    ({"properties": {"a": {}}, "required": ["b"]}, ['{"b": 2}'], ["{}"]),
    ({}, ['{"x": [1, {"y": null}]}'], ["1"]),
    (
        {"properties": {"a": {"type": "array", "items": {"type": "object", "properties": {"b": {}}}}}},
        ['{"a": [{"b": 1}]}'],
        ['{"a": [{"c": 1}]}'],
    ),
    (
        {"properties": {"a": {"type": "integer"}}, "allOf": [{"properties": {"b": {"type": "integer"}}, "required": ["b"]}]},
        ['{"a": 1, "b": 1}'],
        ['{"a": 1}'],
    ),
    ({"properties": {"a": {}}, "x-guidance": {"whitespace_flexible": True}}, ["{}"], ["{ }"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), SCHEMAS)
def test_arguments_follow_their_schema_on_one_line(
    tokenizer: KeuralTokenizer, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    """Properties that a schema does not name come only where it asks for them, or says that they may."""
    grammars = Grammars(tokenizer)
    grammar = CallForm("required", {"f": schema}).grammar()

    for arguments, expected in [*((text, True) for text in good), *((text, False) for text in bad)]:
        form, follows = grammars.lark(grammar, "it"), True
        for token in [*tokenizer.encode(with_calls("", [ToolCall("f", arguments)])), tokenizer.im_end_id]:
            follows = follows and bool(form.allowed()[token])
            form.take(token)
        assert follows == expected, arguments


def test_a_schema_is_left_as_it_was() -> None:
    schema = {"properties": {"a": {"type": "object", "properties": {}}}}
    before = json.dumps(schema)

    assert arguments_schema(schema)["properties"]["a"]["additionalProperties"] is False
    assert json.dumps(schema) == before
