"""Calls are read out of an answer however it comes, stop strings leave them alone, and the grammar holds them to their schema."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keural.serve.calls import (
    UNCALLED,
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
    reader = CallReader()
    return joined([event for part in parts for event in reader.push(part)] + reader.flush())


def joined(found: list[CallEvent]) -> list[CallEvent]:
    events = list[CallEvent]()
    for event in found:
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


@given(text=st.lists(st.sampled_from(["<tool_call>", *"<tool_cal>\n가"]), max_size=9).map("".join))
@example("<<tool_call>")
@example("<tool_<tool_call>")
def test_text_without_a_call_is_what_the_expression_says(text: str) -> None:
    assert bool(re.fullmatch(UNCALLED, text)) == ("<tool_call>" not in text)


@given(text=TEXT | st.just("<tool_cal"), calls=CALLS, cuts=st.lists(st.integers(0, 400), max_size=30))
def test_where_calls_come_instead_of_what_is_said_it_spells_what_it_likes(
    text: str, calls: list[tuple[str, Any]], cuts: list[int]
) -> None:
    """An answer that does not begin with a call has none; stop strings are of all of it."""
    called = with_calls("", [ToolCall(*call) for call in calls])
    said = "{" + text + called
    for answer, expected in ((said, [Said(said)]), (called, read([called]))):
        reader = CallReader("first")
        events = [event for part in pieces(answer, cuts) for event in reader.push(part)] + reader.flush()
        assert joined(events) == expected

    plain, beside = StopStrings(["가", "a"]), StopsBesideCalls(["가", "a"], "first")
    assert "".join(map(beside.push, pieces(said, cuts))) + beside.flush() == plain.push(said) + plain.flush()
    untouched = StopsBesideCalls(["a", "}"], "first")
    assert "".join(map(untouched.push, pieces(called, cuts))) + untouched.flush() == called


FORMS = {"weather": {"properties": {"city": {"enum": ["::=", "</tool_call>"]}}, "required": ["city"]}, "age": {"properties": {}}}
A_CALL = with_calls("", [ToolCall("weather", {"city": "</tool_call>"})])
TWO = with_calls("", [ToolCall("weather", {"city": "::="}), ToolCall("age", {})])
ANSWERS = {
    A_CALL: {"required", "one", "auto", "or JSON"},
    TWO: {"required", "auto", "or JSON"},
    '{"a": "said"}': {"auto", "none", "or JSON"},
    '{"b": "said"}': {"auto", "none"},
    '{"a": "<tool_call>"}': {"or JSON"},
    with_calls("가 <tool_call\n", [ToolCall("age", {})]): {"auto"},
    "<<tool_cal": {"auto", "none"},
    "": {"auto", "none"},
    "<tool_call>": set(),
    A_CALL + "\n": set(),
    A_CALL + " so": set(),
    A_CALL.replace("weather", "wether"): set(),
    A_CALL.replace("city", "town"): set(),
    "\n".join([TWO] * 9): set(),
}
KINDS = {
    "required": CallForm("required", FORMS),
    "one": CallForm("required", FORMS, parallel=False),
    "auto": CallForm("auto", FORMS),
    "none": CallForm("none", FORMS),
    "or JSON": CallForm("auto", FORMS, said={"type": "object", "properties": {"a": {}}, "additionalProperties": False}),
}


def followed(accepts: Callable[[str, str], bool]) -> None:
    for text, expected in ANSWERS.items():
        assert {kind for kind in KINDS if accepts(kind, text)} == expected, text


def test_answers_have_calls_as_their_form_says(tokenizer: KeuralTokenizer) -> None:
    grammars = Grammars(tokenizer)
    forms = {kind: grammars.lark(form.grammar(), kind) for kind, form in KINDS.items()}

    def accepts(kind: str, text: str) -> bool:
        form = forms[kind].fresh()
        for token in [*tokenizer.encode(text), tokenizer.im_end_id]:
            if not form.allowed()[token]:
                return False
            form.take(token)
        return True

    followed(accepts)


@pytest.mark.parametrize("written", ["lark", "structural_tag"])
def test_xgrammar_reads_the_form_alike(written: str) -> None:
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    end = 256
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo([*(bytes([byte]) for byte in range(end)), b"</s>"], xgrammar.VocabType.RAW, stop_token_ids=[end])
    )
    forms = {
        kind: compiler.compile_grammar(xgrammar.Grammar.from_lark(form.grammar()))
        if written == "lark"
        else compiler.compile_structural_tag(json.dumps(form.structural_tag()))
        for kind, form in KINDS.items()
    }

    def accepts(kind: str, text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(forms[kind])
        return all(matcher.accept_token(token) for token in [*text.encode(), end])

    followed(accepts)


def test_no_reader_takes_the_grammar_for_another_language() -> None:
    """vLLM and llguidance call one that has `::=` EBNF."""
    assert all("::=" not in form.grammar() for form in KINDS.values())
