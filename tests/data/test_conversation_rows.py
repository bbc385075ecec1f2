"""Rows of conversations: every field that carries meaning is honoured, or the row is counted, or its source refused."""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from keural.cli.printing import print_data
from keural.data import adapters
from keural.data.adapters import ADAPTERS, adapter_of
from keural.data.adapters.conversations import ADAPTERS as CONVERSATIONS
from keural.data.adapters.reasons import REASONS, reason_of
from keural.data.adapters.turns import FLAGS
from keural.data.field_use import FieldUse
from keural.data.prepare import prepare
from keural.data.prepared import Prepared
from keural.data.records import Conversation, Drop, Record
from keural.data.sources import open_source
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.message import Message, with_tools
from tests.helpers.examples import examples

Turn = tuple[str, str]
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def convert(adapter: str, value: Any, where: str = "file:1", **options: Any) -> Record | Drop:
    source = SourceSpec(name="s", adapter=adapter, options=options)
    return ADAPTERS[adapter](value, source, where)


def kept(record: Any) -> Conversation:
    assert isinstance(record, Conversation), record
    return record


def turns(record: Any) -> list[Turn]:
    return [(turn.role, turn.text) for turn in kept(record).messages]


def trained(record: Any) -> list[str]:
    return [text for turn in kept(record).messages for text, is_trained in turn.parts() if is_trained]


def reason(record: Any) -> tuple[str, str]:
    assert isinstance(record, Drop), record
    return record.reason, record.detail


def chat(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


# What is trained


@pytest.mark.parametrize("name", sorted(FLAGS))
@pytest.mark.parametrize(
    ("value", "on"), [(0, False), (1, True), (0.0, False), (1.0, True), (False, False), (True, True), ("false", False)]
)
def test_a_turn_is_trained_as_it_says(name: str, value: Any, on: bool) -> None:
    wrong = {"role": "assistant", "content": "wrong", name: value}
    record = convert("messages", chat(ASKED, wrong, ASKED, ANSWERED | {name: None}))
    assert trained(record) == (["wrong", "a"] if on == FLAGS[name] else ["a"])
    assert [text for _, text in turns(record)] == ["q", "wrong", "q", "a"], "it stays as what the next answer follows"


@pytest.mark.parametrize("name", sorted(FLAGS))
@pytest.mark.parametrize("where", ["turn", "row"])
@pytest.mark.parametrize("value", [0.5, 2, "yes", [1], float("nan")])
def test_a_flag_of_another_value_refuses_the_source(name: str, where: str, value: Any) -> None:
    row = chat(ASKED, ANSWERED | {name: value}) if where == "turn" else chat(ASKED, ANSWERED, **{name: value})
    found = convert("messages", row)
    assert reason(found)[0] == "undeclared_value"
    assert name in reason(found)[1]
    assert trained(convert("messages", row, ignore=[name])) == ["a"]


@pytest.mark.parametrize("adapter", ["messages", "sharegpt", "alpaca", "qa", "squad", "prompt_completion", "kto"])
@pytest.mark.parametrize(
    ("flag", "expected"), [({"weight": 0}, "not_trained"), ({"train": False}, "not_trained"), ({"label": False}, "label_false")]
)
def test_a_row_that_is_not_to_be_learned_is_counted(adapter: str, flag: dict[str, Any], expected: str) -> None:
    assert reason(convert(adapter, ADAPTERS[adapter].example | flag))[0] == expected
    good = {name: not value for name, value in flag.items()}
    assert kept(convert(adapter, ADAPTERS[adapter].example | good))


def test_a_flag_of_another_name_is_declared() -> None:
    row = chat(ASKED, {"role": "assistant", "content": "wrong", "mask": 1}, ASKED, ANSWERED | {"learn": True})
    assert reason(convert("messages", row))[0] == "undeclared_value", "1 may mean trained or hidden"
    assert trained(convert("messages", row, flags={"mask": False})) == ["a"]
    assert trained(convert("messages", row, flags={"mask": True, "learn": False})) == ["wrong"]


def test_flags_that_disagree_or_leave_nothing_are_counted() -> None:
    assert reason(convert("messages", chat(ASKED, ANSWERED | {"weight": 0, "train": True}))) == ("fields_differ", "train, weight")
    assert reason(convert("messages", chat(ASKED, ANSWERED | {"weight": 0})))[0] == "nothing_trained"
    assert reason(convert("messages", chat(ASKED, ANSWERED | {"train_detail": [{"begin_offset": 0}]})))[0] == "trained_spans"


def test_a_question_that_is_to_be_trained_is_and_it_is_noted() -> None:
    record = convert("messages", chat(ASKED | {"train": True}, ANSWERED))
    assert trained(record) == ["q", "a"]
    assert kept(record).notes == ("question_trained",)


def test_labels_of_good_answers_and_other_labels() -> None:
    row = chat(ASKED, ANSWERED)
    assert reason(convert("messages", row | {"label": 0}))[0] == "undeclared_value", "it could be a class"
    assert reason(convert("messages", row | {"label": 0}, label="label"))[0] == "label_false"
    assert reason(convert("messages", row, label="label"))[0] == "missing_label"
    assert reason(convert("sharegpt", {"conversations": [ASKED, ANSWERED], "kto_tag": False}))[0] == "label_false"
    assert kept(convert("messages", row | {"label": 1}, label="label"))
    assert kept(convert("messages", row | {"label": "geography"})), "listed as not read"
    assert reason(convert("messages", row | {"label": "geography"}, label="label"))[0] == "undeclared_value"
    assert kept(convert("qa", {"question": "q", "answer": "a", "label": 2}))
    assert reason(convert("kto", {"prompt": "q", "completion": "a"}))[0] == "missing_label"
    for value, good in ((True, True), (1, True), ("true", True), (0.0, False), ("False", False)):
        found = convert("kto", {"prompt": "q", "completion": "a", "label": value})
        assert isinstance(found, Conversation) == good


def test_of_a_prompt_with_its_completion_only_the_completion_is_trained() -> None:
    prompt = [ASKED, {"role": "assistant", "content": "earlier"}, ASKED]
    for asked in (prompt, json.dumps(prompt)):
        record = convert("prompt_completion", {"prompt": asked, "completion": [ANSWERED]})
        assert [text for _, text in turns(record)] == ["q", "earlier", "q", "a"]
        assert trained(record) == ["a"]
    assert turns(convert("prompt_completion", {"prompt": "[1, 2] sorted?", "completion": "yes"}))[0] == ("user", "[1, 2] sorted?")
    assert reason(convert("prompt_completion", {"prompt": prompt[:2], "completion": "a"}))[0] == "prompt_does_not_end_with_user"
    wrong = {"prompt": "q", "completion": [ASKED, ANSWERED]}
    assert reason(convert("prompt_completion", wrong))[0] == "completion_does_not_begin_with_assistant"


# Roles and order


def test_roles_by_their_usual_names_by_a_map_and_in_order() -> None:
    calls = {"from": "function_call", "value": '{"name": "wind", "arguments": {"city": "목포"}}'}
    talk = [{"from": "developer", "value": "s"}, {"from": "human", "value": "q"}, calls, {"from": "observation", "value": "3"}]
    expected = [
        ("system", "s"),
        ("user", "q"),
        ("assistant", '<tool_call>\n{"name": "wind", "arguments": {"city": "목포"}}\n</tool_call>'),
        ("tool", "3"),
        ("assistant", "a"),
    ]
    row = {"conversations": [*talk, {"from": "gpt", "value": "a"}]}
    assert turns(convert("sharegpt", row)) == expected
    assert trained(convert("sharegpt", row)) == [expected[2][1], "a"]
    spoken = {"dialog": [{"speaker": "A", "text": "q"}, {"speaker": "B", "text": "a"}]}
    keys = {"field": "dialog", "role": "speaker", "content": "text"}
    assert turns(convert("messages", spoken, **keys, roles={"A": "user", "B": "assistant"})) == [("user", "q"), ("assistant", "a")]
    assert turns(convert("messages", spoken, **keys, roles="in_order")) == [("user", "q"), ("assistant", "a")]
    assert reason(convert("messages", spoken, **keys)) == ("unknown_role", "'A'")
    three = {"dialog": [{"speaker": name, "text": "x"} for name in "ABC"]}
    assert reason(convert("messages", three, **keys, roles="in_order"))[0] == "more_than_two_speakers"
    coded = chat({"role": 0, "content": "q"}, {"role": 1, "content": "a"})
    assert turns(convert("messages", coded, roles={0: "user", 1: "assistant"})) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("roles", "options", "expected"),
    [
        ("aua", {}, "assistant_first"),
        ("aua", {"assistant_first": "keep"}, "a0 u1 a2"),
        ("saua", {"assistant_first": "cut"}, "s0 u2 a3"),
        ("a", {"assistant_first": "cut"}, "no_assistant_turn"),
        ("uasua", {}, "system_inside"),
        ("uasua", {"system_inside": "keep"}, "u0 a1 s2 u3 a4"),
        ("uasua", {"system_inside": "merge"}, "u0 a1 u2\n\n3 a4"),
        ("usa", {"system_inside": "merge"}, "u0\n\n1 a2"),
        ("ssua", {"system_inside": "merge"}, "s0 u1\n\n2 a3"),
        ("uasaua", {"system_inside": "merge"}, "system_inside"),
        ("uas", {"system_inside": "merge"}, "u0 a1"),
        ("uuaa", {}, "not_alternating"),
        ("uuaa", {"consecutive": "merge"}, "u0\n1 a2\n3"),
        ("usua", {"consecutive": "merge", "system_inside": "merge"}, "u0\n\n1\n2 a3"),
        ("uta", {}, "tool_result_without_call"),
        ("uat", {}, "u0 a1"),
        ("uattaua", {}, "u0 a1 t2 t3 a4 u5 a6"),
        ("uatua", {}, "not_alternating"),
    ],
)
def test_the_order_of_turns(roles: str, options: dict[str, str], expected: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    record = convert(
        "messages", chat(*({"role": names[role], "content": str(place)} for place, role in enumerate(roles))), **options
    )
    found = record.reason if isinstance(record, Drop) else " ".join(role[0] + text for role, text in turns(record))
    assert found == expected


def test_turns_of_one_side_are_not_merged_where_that_would_train_what_must_not_be() -> None:
    row = chat(ASKED, ANSWERED | {"weight": 0}, ANSWERED)
    assert reason(convert("messages", row, consecutive="merge"))[0] == "fields_differ"


def test_what_is_cut_after_the_last_answer_is_noted_and_duplicates_by_it_too(prepared: "Prepare") -> None:
    rows = [chat(ASKED, ANSWERED, {"role": "user", "content": text}) for text in "xyz"]
    assert kept(convert("messages", rows[0])).notes == ("unanswered_turns_cut",)
    (row,) = prepared("messages", rows).table
    assert (row.noted, row.drops) == ({"unanswered_turns_cut": 1}, {"duplicate_after_cut": 2})


# Content


def test_text_arrives_as_it_is_but_for_empty_lines_around_it() -> None:
    code = "    x = 0\n    return x"
    for adapter, row in (
        ("messages", chat(ASKED, {"role": "assistant", "content": f"\n \n{code}\n\n"})),
        ("alpaca", {"instruction": "q", "output": f"{code}  \n"}),
        ("qa", {"question": "q", "answer": code}),
        ("dialogue", ["q", code]),
        ("prompt_completion", {"prompt": "q", "completion": code}),
    ):
        assert turns(convert(adapter, row))[-1] == ("assistant", code), adapter
    assert turns(convert("alpaca", {"instruction": "\tq", "input": "  y: 1\n  z: 2\n", "output": "a"}))[0] == (
        "user",
        "\tq\n\n  y: 1\n  z: 2",
    )


def test_content_of_parts() -> None:
    text = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "image_url": None}]
    assert turns(convert("messages", chat(ASKED | {"content": text}, ANSWERED)))[0] == ("user", "one\ntwo")
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}, {"type": "text"}, {"image": "x"}):
        assert reason(convert("messages", chat(ASKED | {"content": [*text, part]}, ANSWERED)))[0] == "content_not_text"


@pytest.mark.parametrize("shape", [json.dumps, tuple, lambda messages: list(map(json.dumps, messages))])
def test_turns_as_text_and_as_other_lists(shape: Callable[[Any], Any]) -> None:
    assert turns(convert("messages", {"messages": shape([ASKED, ANSWERED])})) == [("user", "q"), ("assistant", "a")]
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert turns(convert("messages", {"messages": columns})) == [("user", "q"), ("assistant", "a")]


def test_two_places_of_a_turn_or_row_that_disagree_are_counted() -> None:
    assert reason(convert("messages", chat(ASKED | {"value": "r"}, ANSWERED)))[0] == "fields_differ"
    assert reason(convert("messages", chat(ASKED | {"from": "gpt"}, ANSWERED)))[0] == "fields_differ"
    assert turns(convert("messages", chat(ASKED | {"from": "human", "value": "q"}, ANSWERED)))[0] == ("user", "q")
    system = {"role": "system", "content": "s"}
    assert reason(convert("messages", chat(system, ASKED, ANSWERED, system="t")))[0] == "system_differs"
    assert turns(convert("messages", chat(system, ASKED, ANSWERED, system="s")))[0] == ("system", "s")
    assert turns(convert("messages", chat(system | {"content": ""}, ASKED, ANSWERED, system="t")))[0] == ("system", "t")
    wind, clock = [{"name": "wind"}], [{"name": "clock"}]
    assert reason(convert("messages", chat(ASKED, ANSWERED, tools=wind, functions=clock)))[0] == "fields_differ"


@pytest.mark.parametrize("value", [["x"], {"x": 1}, True, float("nan")])
def test_an_optional_field_that_is_no_text_is_not_taken_for_missing(value: Any) -> None:
    row = {"instruction": "q", "output": "a"}
    assert reason(convert("alpaca", row | {"input": value}))[0] == "input_is_not_text"
    assert reason(convert("alpaca", row | {"system": value}))[0] == "system_is_not_text"
    assert reason(convert("alpaca", row | {"history": value}))[0] == "history_is_no_list_of_pairs"
    assert reason(convert("messages", chat(ASKED, ANSWERED, tools=value)))[0] == "malformed_tools"
    for empty in (None, "", [], {}):
        assert turns(convert("alpaca", row | {"input": empty, "system": empty, "history": empty})) == [
            ("user", "q"),
            ("assistant", "a"),
        ]


def test_history_of_alpaca_comes_first() -> None:
    row = {"instruction": "third", "input": "", "output": "3", "history": [["first", "1"], ("second", "2")], "system": "s"}
    expected = [("system", "s"), ("user", "first"), ("assistant", "1"), ("user", "second"), ("assistant", "2"), ("user", "third")]
    assert turns(convert("alpaca", row)) == [*expected, ("assistant", "3")]
    assert turns(convert("alpaca", row | {"history": json.dumps(row["history"])})) == [*expected, ("assistant", "3")]


def test_reasoning_is_left_out_and_noted_or_kept_or_trained() -> None:
    for field in ("reasoning_content", "reasoning", "thinking"):
        row = chat(ASKED, ANSWERED | {field: "  because"})
        assert (trained(convert("messages", row)), kept(convert("messages", row)).notes) == (["a"], ("reasoning_left_out",))
        thought = "<think>\n  because\n</think>\n\n"
        assert turns(convert("messages", row, reasoning="keep"))[1] == ("assistant", f"{thought}a")
        assert trained(convert("messages", row, reasoning="keep")) == ["a"]
        assert trained(convert("messages", row, reasoning="train")) == [thought, "a"]
        assert turns(convert("messages", row, ignore=[field])) == [("user", "q"), ("assistant", "a")]
    inside = chat(ASKED, {"role": "assistant", "content": f"{thought}a"})
    assert trained(convert("messages", inside)) == [f"{thought}a"], "text is text unless asked"
    assert trained(convert("messages", inside, reasoning="keep")) == ["a"]
    assert turns(convert("messages", inside, reasoning="drop"))[1] == ("assistant", "a")
    assert trained(convert("alpaca", {"instruction": "q", "output": "a", "reasoning": "why"}, reasoning="train"))[0].startswith(
        "<think>"
    )
    assert reason(convert("messages", chat(ASKED, ANSWERED | {"reasoning": ["x"]})))[0] == "reasoning_is_not_text"
    assert reason(convert("messages", chat(ASKED | {"thinking": "x"}, ANSWERED)))[0] == "reasoning_outside_answer"


# Tools

WIND = {"name": "wind", "description": "바람", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "wind", "arguments": '{"city":"목포"}'}}
CALLED = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL | {"id": "2"}]},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "tool", "tool_call_id": "2", "content": {"speed": 4}},
    ANSWERED,
]


def test_tools_in_every_shape_are_the_same() -> None:
    shapes: list[Any] = [[WIND], [{"type": "function", "function": WIND}], WIND, [json.dumps(WIND)]]
    for shape in [*shapes, *map(json.dumps, shapes)]:
        record = convert("messages", chat(ASKED, ANSWERED, tools=shape, system="s"))
        assert list(kept(record).messages[:1]) == with_tools([Message("system", "s")], [WIND])
    assert turns(convert("messages", chat(ASKED, ANSWERED, tools="[]"))) == [("user", "q"), ("assistant", "a")]
    for broken in ("{", "search(q)", [1], [{"description": "no name"}]):
        assert reason(convert("messages", chat(ASKED, ANSWERED, tools=broken)))[0] == "malformed_tools"


def test_calls_are_trained_and_results_are_not() -> None:
    record = convert("messages", chat(*CALLED, tools=[WIND]))
    block = '<tool_call>\n{"name": "wind", "arguments": {"city":"목포"}}\n</tool_call>'
    assert turns(record)[2:] == [("assistant", f"{block}\n{block}"), ("tool", "3"), ("tool", '{"speed": 4}'), ("assistant", "a")]
    assert trained(record) == [f"{block}\n{block}", "a"]
    said = convert(
        "sharegpt",
        {"conversations": [ASKED, {"from": "gpt", "value": "Wait."}, {"from": "function_call", "value": '[{"name": "wind"}]'}]},
    )
    assert trained(said) == ['Wait.\n<tool_call>\n{"name": "wind", "arguments": {}}\n</tool_call>']


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({1: {"tool_calls": [{"function": {"name": "wind", "arguments": "{"}}]}}, "malformed_tool_call"),
        ({1: {"tool_calls": [{"function": {"arguments": {}}}]}}, "malformed_tool_call"),
        ({1: {"tool_calls": [CALL | {"type": "custom"}]}}, "malformed_tool_call"),
        ({1: {"tool_calls": "wind()"}}, "malformed_tool_call"),
        ({2: {"tool_call_id": "9"}}, "tool_result_without_call"),
        ({2: {"tool_call_id": "2"}, 3: {"tool_call_id": "1"}}, "tool_results_out_of_order"),
        ({0: {"tool_calls": [CALL]}}, "malformed_tool_call"),
    ],
)
def test_calls_and_results_that_cannot_be_read_are_counted(change: dict[int, dict[str, Any]], expected: str) -> None:
    messages = [message | change.get(place, {}) for place, message in enumerate(CALLED)]
    assert reason(convert("messages", chat(*messages)))[0] == expected


# Other shapes


def test_a_template_a_prompt_for_all_and_answers_that_are_true_or_false() -> None:
    assert turns(convert("qa", {"answer": "시"}, prompt="시를 써 줘.")) == [("user", "시를 써 줘."), ("assistant", "시")]
    yes = ["예", "아니요"]
    assert [turns(convert("qa", {"question": "q", "answer": answer}, booleans=yes))[1][1] for answer in (True, False)] == yes
    assert reason(convert("qa", {"question": "q", "answer": True})) == ("answer_is_not_text", "bool")


def test_lists_of_contexts_and_questions_are_unfolded(tmp_path: Path) -> None:
    paragraph = {
        "context": "c",
        "qas": [{"question": "q1", "answers": [{"text": "a1"}, {"text": "b"}]}, {"question": "q2", "answers": [{"text": "a2"}]}],
    }
    hard = {"context": "d", "qas": [{"question": "q3", "answers": [], "is_impossible": True}]}
    (tmp_path / "data.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph, hard]}, {"paragraphs": []}]}))

    def read(adapter: str, **options: Any) -> list[Any]:
        source = open_source(SourceSpec(name="s", adapter=adapter, path="data.json", options=options), tmp_path)
        return [record.reason if isinstance(record, Drop) else record for record in source.read(0)]

    *found, impossible, empty = read("squad")
    assert [turns(record) for record in found] == [[("user", f"c\n\nq{n}"), ("assistant", f"a{n}")] for n in (1, 2)]
    assert (impossible, empty) == ("unanswerable", "empty_list")
    assert [record.where for record in found] == ["data.json#1", "data.json#2"]
    named = {"question": ["context", "question"], "answer": "answers.0.text", "unfold": ["data", "paragraphs", "qas"]}
    first, second, *rest = read("qa", **named)
    assert [turns(first)[0][1], turns(second)[0][1], rest] == ["c\nq1", "c\nq2", ["missing_answers.0.text", "empty_list"]]
    assert (first.notes, second.notes) == (("other_items_left_out",), ())
    hub = {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}
    assert turns(convert("squad", hub)) == [("user", "c\n\nq"), ("assistant", "a")]


def test_rounds_under_the_names_of_who_speaks_are_their_turns() -> None:
    rounds = [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}]
    said = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert turns(convert("messages", {"conversation": rounds}, field="conversation")) == said
    assert turns(convert("sharegpt", {"conversations": [{"system": "s", **rounds[0]}, rounds[1]]})) == [("system", "s"), *said]
    own = {"roles": {"질문자": "user", "답변자": "assistant"}}
    assert turns(convert("messages", {"messages": [{"질문자": "q1", "답변자": "a1"}]}, **own)) == said[:2]


def test_who_asks_speaks_before_who_answers_however_the_names_of_a_round_are_sorted() -> None:
    rounds = [{"assistant": "a1", "human": "q1", "system": "s"}, {"assistant": "a2", "human": "q2"}]
    said = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    for options in ({}, {"assistant_first": "keep"}):
        assert turns(convert("messages", {"messages": rounds}, **options)) == said


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_a_turn_that_says_that_it_is_no_good_answer_is_not_trained(name: str) -> None:
    row = {"messages": [ASKED, ANSWERED | {"content": "bad", name: False}, ASKED, ANSWERED | {name: True}]}
    assert trained(convert("messages", row)) == ["a"]
    assert reason(convert("messages", {"messages": row["messages"][:2]}))[0] == "nothing_trained"
    assert trained(convert("messages", row, ignore=[name])) == ["bad", "a"]


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
def test_no_call_loses_its_arguments_under_another_name(name: str) -> None:
    call = {"function": {"name": "wind", name: {"city": "목포"}}}
    (said,) = trained(convert("messages", {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}))
    assert said == '<tool_call>\n{"name": "wind", "arguments": {"city": "목포"}}\n</tool_call>'
    two = {"name": "wind", "arguments": {"city": "목포"}, "parameters": {"city": "부산"}}
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [two]}]}
    assert reason(convert("messages", row))[0] == "fields_differ"


@pytest.mark.parametrize("more", [{"model": "m"}, {"score": 1}, {"train": False}])
def test_what_may_be_no_speaker_makes_no_round(more: dict[str, Any]) -> None:
    assert reason(convert("messages", {"messages": [{"human": "q", "assistant": "a"} | more]}))[0] == "unknown_role"


def test_lists_that_belong_together_are_unfolded_together() -> None:
    source = SourceSpec(
        name="s", adapter="qa", options={"unfold": ["questions, answers"], "question": ["story", "questions"], "answer": "answers"}
    )
    adapter = adapter_of(source)
    split = adapter.splitter(source)
    assert split is not None
    row = {"story": "s", "questions": ["q1", "q2"], "answers": ["a1", "a2"]}
    assert [turns(adapter(value, source, "w"))[0][1] for value in split(row, source)] == ["s\nq1", "s\nq2"]
    (uneven,) = split(row | {"answers": ["a1"]}, source)
    assert reason(adapter(uneven, source, "w"))[0] == "malformed_row"


def test_dialogues_of_pairs_keep_their_sides() -> None:
    assert reason(convert("dialogue", [["q", "a"], ["r"], ["s", "b"]])) == ("malformed_row", "not all turns are pairs")
    assert turns(convert("dialogue", [["q", "a"], ["r"]])) == [("user", "q"), ("assistant", "a")]
    assert turns(convert("dialogue", {"dialogue": '["q", "a"]', "system": "s"}))[0] == ("system", "s")


# Sources


@pytest.mark.parametrize(
    ("adapter", "options", "complaint"),
    [
        ("messages", {"roles": {"bot": "robot"}}, "'robot' is no role"),
        ("messages", {"roles": "guess"}, "in_order"),
        ("qa", {"flags": {"mask": 1}}, "must be true"),
        ("messages", {"reasoning": "hide"}, "must be one of drop, keep, train"),
        ("messages", {"assistant_first": True}, "must be a text"),
        ("qa", {"prompt": "p", "question": "q"}, "'question' has no effect"),
        ("qa", {"template": "Say it."}, "no {question}"),
        ("qa", {"booleans": ["yes"]}, "two texts"),
        ("openhermes", {"roles": {"bot": "robot"}}, "'robot' is no role"),
    ],
)
def test_options_that_cannot_work_are_refused(
    adapter: str, options: dict[str, Any], complaint: str, write: Any, data_dir: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        open_source(write("a.jsonl", "{}\n", adapter, options=options), data_dir)


Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(write: Any, data_dir: Path, tmp_path: Path, tokenizer: KeuralTokenizer) -> Prepare:
    """Prepare rows of one source."""

    def run(adapter: str, rows: list[Any], **settings: Any) -> Prepared:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        source = write("rows.jsonl", lines, adapter, **settings)
        return prepare(DataSpec(sources=[source], sequence_length=2000), "sft", data_dir, tokenizer, tmp_path / "out", 1)

    return run


def test_a_source_is_refused_with_all_values_seen_and_how_to_declare_them(prepared: Prepare) -> None:
    rows = [chat(ASKED | {"content": str(number)}, ANSWERED, weight=weight) for number, weight in enumerate((1, 0.5, 0.5, 2))]
    with pytest.raises(UserError) as refused:
        prepared("messages", rows)
    message = str(refused.value)
    for part in ("source 'source'", "weight is 0.5 (2 rows)", "weight is 2 (1 rows)", "first rows.jsonl:2", "option ignore"):
        assert part in message
    assert prepared("messages", rows, options={"ignore": ["weight"]}).table[0].kept == 4


def test_fields_to_ignore_and_to_name_rows_by_must_be_there(prepared: Prepare) -> None:
    rows = [chat(ASKED, ANSWERED, weight=1, id="a")]
    with pytest.raises(UserError, match=r"option 'ignore' has no effect: no row has a field 'weigth'"):
        prepared("messages", rows, options={"ignore": ["weigth"]})
    with pytest.raises(UserError, match=r"option 'id_field' has no effect: no row has a field 'nope'"):
        prepared("messages", rows, id_space="s", id_field="nope")
    assert prepared("messages", rows, id_space="s", id_field="id", options={"ignore": ["weight", "train"]}).table[0].kept == 1


def test_an_option_without_effect_refuses_the_source(prepared: Prepare) -> None:
    with pytest.raises(UserError, match=r"option 'system' has no effect: no row has a field 'systm'.*not read: system"):
        prepared("messages", [chat(ASKED, ANSWERED, system="s")], options={"system": "systm"})
    with pytest.raises(UserError, match=r"option 'unfold' has no effect: no row has a field 'item'"):
        prepared(
            "qa", [{"items": [{"question": "q", "answer": "a"}], "question": "q", "answer": "a"}], options={"unfold": ["item"]}
        )
    rows = [{"items": [{"question": "q", "answer": "a"}]}]
    assert prepared("qa", rows, options={"unfold": ["items"]}).table[0].kept == 1


def test_fields_that_are_not_read_are_listed_once(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(ASKED | {"name": "Kim"}, ANSWERED, id=1, tools=None, lang="", category="x"), chat(ASKED, ANSWERED, label="web")]
    (row,) = prepared("messages", rows).table
    assert row.not_read == ("category", "id", "label", "messages.name")
    print_data(Shown({"s": prepared("messages", rows)}))  # type: ignore[arg-type]
    assert "not read: category, id, label, messages.name" in " ".join(capsys.readouterr().out.replace("│", " ").split())


class Shown:
    """What the table is printed from."""

    def __init__(self, data: dict[str, Prepared]) -> None:
        self.data = data


def test_reasoning_beside_a_row_is_read_or_listed(prepared: Prepare) -> None:
    assert prepared("messages", [chat(ASKED, ANSWERED, reasoning="why")]).table[0].not_read == ("reasoning",)
    (row,) = prepared("qa", [{"question": "q", "answer": "a", "thinking": "why"}], options={"reasoning": "keep"}).table
    assert (row.not_read, row.noted) == (None, {})
    both = {"prompt": "q", "completion": [ANSWERED | {"reasoning": "x"}], "reasoning": "y"}
    assert reason(convert("prompt_completion", both, reasoning="keep"))[0] == "fields_differ"


def test_unknown_roles_are_named_in_the_table(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(ASKED, ANSWERED), *(chat(ASKED, {"role": role, "content": "x"}) for role in ("ipython", "critic", "ipython"))]
    done = prepared("messages", rows, max_drop=1.0)
    assert done.table[0].details == {"unknown_role": {"'ipython'": 2, "'critic'": 1}}
    print_data(Shown({"s": done}))  # type: ignore[arg-type]
    assert "'ipython' 2; 'critic' 1" in " ".join(capsys.readouterr().out.replace("│", " ").split())


# Round trips


def stored(done: Prepared, tokenizer: KeuralTokenizer) -> list[list[tuple[str, str, str]]]:
    """Of each sequence of a store, the turns: role, text, and the text that is trained."""
    store = TokenStore.open(done.train)
    talks = []
    for index in range(store.num_sequences):
        ids, mask = store.sequence(index).tolist(), store.loss_mask(index).tolist()
        starts = [place for place, token in enumerate(ids) if token == tokenizer.im_start_id]
        talk = []
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            role, _, text = tokenizer.decode(ids[start:end]).partition("\n")
            learned = tokenizer.decode([token for token, counts in zip(ids[start:end], mask[start:end], strict=True) if counts])
            talk.append((role, text.removesuffix("\n"), learned))
        talks.append(talk)
    return talks


OAK = [("user", "Name a tree.", ""), ("assistant", "An oak.", "An oak.")]
BLOCK = '<tool_call>\n{"name": "wind", "arguments": {"city":"목포"}}\n</tool_call>'
ROUND_TRIPS: dict[str, tuple[str, dict[str, Any], Any, list[tuple[str, str, str]]]] = {
    "messages": ("messages", {}, ADAPTERS["messages"].example, OAK),
    "sharegpt": ("sharegpt", {}, ADAPTERS["sharegpt"].example, OAK),
    "prompt_completion": ("prompt_completion", {}, ADAPTERS["prompt_completion"].example, OAK),
    "kto": ("kto", {}, ADAPTERS["kto"].example, OAK),
    "qa": ("qa", {}, ADAPTERS["qa"].example, OAK),
    "dialogue": ("dialogue", {}, ADAPTERS["dialogue"].example, OAK),
    "alpaca": ("alpaca", {}, ADAPTERS["alpaca"].example, [*OAK, ("user", "Add.\n\n1, 2", ""), ("assistant", "3", "3")]),
    "squad": (
        "squad",
        {},
        ADAPTERS["squad"].example,
        [("user", "The mill stands by the river.\n\nWhere is the mill?", ""), ("assistant", "by the river", "by the river")],
    ),
    "flags": (
        "messages",
        {},
        chat(ASKED, {"role": "assistant", "content": "wrong", "weight": 0}, ASKED, ANSWERED),
        [("user", "q", ""), ("assistant", "wrong", ""), ("user", "q", ""), ("assistant", "a", "a")],
    ),
    "reasoning": (
        "messages",
        {"reasoning": "keep"},
        chat(ASKED, ANSWERED | {"reasoning_content": "why"}),
        [("user", "q", ""), ("assistant", "<think>\nwhy\n</think>\n\na", "a")],
    ),
    "tools": (
        "messages",
        {},
        chat(*CALLED, tools=[WIND]),
        [
            ("system", with_tools([], [WIND])[0].content, ""),
            ("user", "q", ""),
            ("assistant", f"{BLOCK}\n{BLOCK}", f"{BLOCK}\n{BLOCK}"),
            ("tool", "3", ""),
            ("tool", '{"speed": 4}', ""),
            ("assistant", "a", "a"),
        ],
    ),
}


@pytest.mark.parametrize("name", sorted(ROUND_TRIPS))
def test_rows_come_back_from_the_store_with_roles_texts_and_what_is_trained(
    name: str, prepared: Prepare, tokenizer: KeuralTokenizer
) -> None:
    adapter, options, row, expected = ROUND_TRIPS[name]
    assert stored(prepared(adapter, [row], options=options), tokenizer) == [expected]


def test_a_saved_tokenizer_renders_tools_as_the_store_has_them(
    prepared: Prepare, tokenizer: KeuralTokenizer, tmp_path: Path
) -> None:
    reasoned = [*CALLED[:-1], ANSWERED | {"reasoning_content": "They ask for the wind."}]
    row = chat({"role": "system", "content": "s"}, *reasoned, tools=[{"type": "function", "function": WIND}])
    store = TokenStore.open(prepared("messages", [row], options={"reasoning": "train"}).train)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(
        row["messages"], tools=row["tools"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == store.sequence(0).tolist()
    assert theirs["assistant_masks"] == store.loss_mask(0).tolist()


def test_columns_of_lists_and_objects_give_the_same_records(tmp_path: Path) -> None:
    clock = CALL["function"] | {"name": "clock", "arguments": {"zone": "KST"}}  # type: ignore[operator]
    other = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"function": clock}]},
        {"role": "tool", "content": "9"},
        ANSWERED,
    ]
    wind = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "wind", "arguments": {"city": "목포"}}}]},
    ]
    rows = [
        chat(*wind, {"role": "tool", "content": "3"}, ANSWERED | {"weight": 1}, tools=[WIND]),
        chat(*other, tools=[{"name": "clock", "parameters": {"type": "object"}}], system="s"),
    ]
    pa.parquet.write_table(pa.Table.from_pylist([row | {"system": row.get("system")} for row in rows]), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for suffix in ("parquet", "jsonl"):
        source = open_source(SourceSpec(name="s", adapter="messages", path=f"rows.{suffix}"), tmp_path)
        found[suffix] = [(turns(record), trained(record)) for record in source.read(0)]
    assert found["parquet"] == found["jsonl"], "keys that only other rows have are no nulls"


# Whatever rows hold

WORDS = st.sampled_from(["", " ", "\n", "None"])
ODD = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 0.0, 1.0, 2, 0.5, "0", "true", "x", float("nan")])
    | st.lists(st.just("x"), max_size=1)
)


@st.composite
def odd_rows(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of messages in which every field that carries meaning may be there, mostly with a fitting value; and options."""

    def sometimes(target: dict[str, Any], name: str, fitting: Any, one_in: int = 4) -> None:
        if draw(st.integers(1, one_in)) == 1:
            target[name] = draw(ODD) if draw(st.integers(1, 8)) == 1 else draw(fitting)

    usual = st.sampled_from([["user", "assistant"], ["user", "assistant", "tool", "assistant", "user", "assistant"]])
    other = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=5)
    row: dict[str, Any] = {"messages": []}
    for place, role in enumerate(draw(st.one_of(usual, usual, other))):
        turn: dict[str, Any] = {"role": role, "content": draw(WORDS) if draw(st.integers(1, 20)) == 1 else f"said{place}x"}
        sometimes(turn, draw(st.sampled_from(sorted(FLAGS))), st.sampled_from([0, 1, True, False]), 3)
        if role == "assistant":
            sometimes(turn, "reasoning", st.just(f"thought{place}x"))
            sometimes(turn, "tool_calls", st.just([{"function": {"name": f"call{place}x", "arguments": {}}}]))
        row["messages"].append(turn)
    sometimes(row, "system", st.just("systemx"))
    sometimes(row, "tools", st.just([{"name": "toolx"}]))
    sometimes(row, "label", st.booleans(), 8)
    sometimes(row, "weight", st.sampled_from([0, 1]), 8)
    sometimes(row, "train", st.booleans(), 8)
    choices = {
        "reasoning": st.sampled_from(["drop", "keep", "train"]),
        "assistant_first": st.sampled_from(["drop", "cut", "keep"]),
        "system_inside": st.sampled_from(["drop", "merge", "keep"]),
        "consecutive": st.sampled_from(["drop", "merge"]),
    }
    return row, draw(st.fixed_dictionaries({}, optional=choices))


def yes(value: Any) -> bool | None:
    """What a value of a flag means, written apart from the reader; None: nothing."""
    return None if value is None else bool({"0": 0, "true": 1}.get(value, value) if isinstance(value, str) else value)


@pytest.mark.hypothesis
def test_every_field_that_carries_meaning_is_honoured_or_the_row_is_counted() -> None:
    became: Counter[str] = Counter()

    @examples(150)
    @given(odd_rows())
    def run(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
        record = convert("messages", case[0], **case[1])
        became[type(record).__name__] += 1
        if isinstance(record, Drop):
            assert reason_of(record.reason), record.reason
        else:
            check_honoured(record, *case)

    run()
    assert min(became["Drop"], became["Conversation"]) > 40


def check_honoured(record: Any, row: dict[str, Any], options: dict[str, Any]) -> None:
    """Assert that a kept record has all that its row says."""
    whole = "\n".join(turn.text for turn in kept(record).messages)
    learned = "\n".join(trained(record))
    assert row.get("label") not in (False, 0, "0"), "others are no such labels, and are listed as not read"
    assert all(yes(row.get(name)) in (None, True) for name in ("weight", "train"))
    assert ("systemx" in whole) == (row.get("system") == "systemx")
    assert ("toolx" in whole) == (row.get("tools") == [{"name": "toolx"}])
    said = row["messages"]
    last = max(place for place, turn in enumerate(said) if turn["role"] == "assistant")
    first = next((place for place, turn in enumerate(said) if turn["role"] == "user"), 0)
    for place, turn in enumerate(said):
        if f"said{place}x" not in turn["content"]:
            continue
        left_out = place > last or ("greeting_left_out" in record.notes and place < first and turn["role"] != "system")
        assert (f"said{place}x" in whole) != left_out
        if left_out:
            continue
        flags = {name: yes(value) for name in FLAGS if (value := turn.get(name)) is not None}
        wants = {value == FLAGS[name] for name, value in flags.items()}
        if not (options.get("system_inside") == "merge" and turn["role"] == "system"):
            assert (f"said{place}x" in learned) == (wants.pop() if wants else turn["role"] == "assistant")
        if turn.get("tool_calls"):
            assert f'"call{place}x"' in whole
        if turn.get("reasoning"):
            thought = f"<think>\n{turn['reasoning']}\n</think>"
            assert (thought in whole) == (options.get("reasoning", "drop") != "drop")
            assert "reasoning_left_out" in record.notes or thought in whole
            assert thought not in learned or options["reasoning"] == "train"


MEANINGFUL = {
    "system": "systemx",
    "tools": [{"name": "toolx"}],
    "reasoning": "thoughtx",
    "history": [["questionx", "answerx"]],
    "label": True,
    "weight": 1,
    "masked": 0,
}


@pytest.mark.parametrize("adapter", ["alpaca", "qa", "squad", "dialogue", "prompt_completion", "kto"])
@pytest.mark.hypothesis
def test_fields_beside_questions_and_answers_are_honoured_or_the_row_is_counted(adapter: str) -> None:
    plain = {key: value for key, value in ADAPTERS[adapter].example.items() if key not in MEANINGFUL}
    fields = {name: st.just(value) | ODD for name, value in MEANINGFUL.items() if name != "history" or adapter == "alpaca"}

    @examples(50)
    @given(st.fixed_dictionaries({}, optional=fields))
    def run(extra: dict[str, Any]) -> None:
        record = convert(adapter, plain | extra, reasoning="keep")
        if isinstance(record, Drop):
            assert reason_of(record.reason), record.reason
            return
        whole = "\n".join(turn.text for turn in kept(record).messages)
        for name, value in MEANINGFUL.items():
            marker = next(iter(re.findall(r"\w+x", json.dumps(value))), None)
            if marker is not None:
                assert (marker in whole) == (extra.get(name) == value), name
        assert yes(extra.get("weight")) in (None, True)
        assert yes(extra.get("masked")) in (None, False)
        assert extra.get("label") is not False

    run()


# The tables


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_the_example_of_an_adapter_is_a_row_that_it_reads(name: str) -> None:
    assert kept(convert(name, ADAPTERS[name].example)).notes == ()


def test_every_reason_is_explained() -> None:
    root = Path(adapters.__file__).parents[1]
    found = set()
    for path in [*root.glob("adapters/*.py"), *root.glob("filtering/*.py"), *root.glob("tokens/*.py"), *root.glob("readers/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("BadRow", "Drop")
            if named and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
                found.add(node.args[0].value)  # type: ignore[attr-defined]
    assert len(found) > 40
    assert sorted(name for name in found if reason_of(name) is None) == []
    assert all(reason.meaning for reason in REASONS.values())


# What stands in places of its own


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_a_part_that_says_whether_it_is_trained_is_counted(name: str) -> None:
    parts = [{"type": "text", "text": "wrong", name: False}, {"type": "text", "text": "right", name: True}]
    row = chat(ASKED, {"role": "assistant", "content": parts})
    assert reason(convert("messages", row)) == ("trained_spans", f"{name} of a part")
    assert trained(convert("messages", row, ignore=[name])) == ["wrong\nright"]


@pytest.mark.parametrize(
    ("channel", "is_read"), [("analysis", False), ("commentary", False), ("final", True), ("", True), (None, True)]
)
def test_an_answer_for_another_channel_is_not_trained_as_one(channel: str | None, is_read: bool) -> None:
    row = chat(ASKED, ANSWERED | {"channel": channel})
    record = convert("messages", row)
    assert trained(record) == ["a"] if is_read else reason(record) == ("other_channel", repr(channel))
    assert trained(convert("messages", row, ignore=["channel"])) == ["a"]


def called(*names: str, **ids: str) -> dict[str, Any]:
    calls = [{"id": ids.get(name), "function": {"name": name, "arguments": "{}"}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(**fields: str) -> dict[str, Any]:
    return {"role": "tool", "content": "r", **fields}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(ASKED, called("f", "g"), result(name="g"), result(name="f"), ANSWERED), "tool_results_out_of_order"),
        (chat(ASKED, called("f", "g"), result(name="f"), result(name="g"), ANSWERED), ""),
        (chat(ASKED, called("f", "f"), result(name="f"), result(name="f"), ANSWERED), ""),
        (chat(ASKED, called("f"), result(name="a tool"), ANSWERED), ""),
        (chat(ASKED, called("f", f="1"), result(tool_call_id="1"), result(tool_call_id="1"), ANSWERED), "tool_result_without_call"),
    ],
)
def test_a_result_is_of_the_call_that_it_names(row: dict[str, Any], expected: str) -> None:
    record = convert("messages", row)
    assert reason(record)[0] == expected if expected else kept(record)


def test_a_system_turn_is_no_speaker() -> None:
    system = {"role": "system", "content": "s"}
    spoken = chat(system, {"role": "mina", "content": "q"}, {"role": "june", "content": "a"})
    assert turns(convert("messages", spoken, roles="in_order")) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert reason(convert("messages", chat(*spoken["messages"][:2]), roles="in_order"))[0] == "no_assistant_turn"


# What values of a label mean


@pytest.mark.parametrize(
    ("labels", "value", "expected"),
    [
        ({"desirable": True, "undesirable": False}, "desirable", "kept"),
        ({"desirable": True, "undesirable": False}, "Undesirable ", "label_false"),
        ({"desirable": True, "undesirable": False}, "unknown", "undeclared_value"),
        ({1: True, -1: False}, -1.0, "label_false"),
        ({0: True, 1: False}, 1, "label_false"),
        ({0: True, 1: False}, 0, "kept"),
        ({"good": True, "bad": False}, None, "missing_label"),
        ({"good": True, "bad": False}, float("nan"), "missing_label"),
    ],
)
@pytest.mark.parametrize("adapter", ["kto", "prompt_completion"])
def test_a_recipe_says_which_labels_are_of_good_answers(adapter: str, labels: dict[Any, bool], value: Any, expected: str) -> None:
    record = convert(adapter, {"prompt": "q", "completion": "a", "label": value}, labels=labels)
    assert trained(record) == ["a"] if expected == "kept" else reason(record)[0] == expected


def test_meanings_of_labels_are_true_or_false() -> None:
    check = ADAPTERS["kto"].check
    assert check is not None
    assert "must be true" in str(check(SourceSpec(name="s", adapter="kto", options={"labels": {"good": "yes"}})))


@pytest.mark.parametrize(
    ("adapter", "options", "refused"),
    [
        ("kto", {"ignore": ["label"]}, "label"),
        ("kto", {"label": "good", "ignore": ["good"]}, "good"),
        ("kto", {"label": "good", "ignore": ["label"]}, None),
        ("messages", {"label": "good", "ignore": ["good"]}, "good"),
        ("messages", {"ignore": ["label"]}, None),
    ],
)
def test_a_field_is_not_the_label_and_something_else(adapter: str, options: dict[str, Any], refused: str | None) -> None:
    check = ADAPTERS[adapter].check
    assert check is not None

    complaint = check(SourceSpec(name="s", adapter=adapter, options=options))

    assert complaint is None if refused is None else f"names {refused!r}, the field that says" in str(complaint)


# Questions


@pytest.mark.parametrize(
    ("value", "expected"), [("True", "unanswerable"), (1, "unanswerable"), ("0", ""), (None, ""), ("perhaps", "undeclared_value")]
)
def test_a_question_without_an_answer_is_said_in_any_way(value: Any, expected: str) -> None:
    record = convert("squad", {"context": "c", "question": "q", "answers": ["a"], "is_impossible": value})
    assert reason(record)[0] == expected if expected else trained(record) == ["a"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"question": "answer"}, "name the same field, 'answer'"),
        ({"template": "{context}: {question}"}, "{context} is filled with nothing"),
    ],
)
def test_options_of_a_question_that_would_train_nonsense_are_refused(options: dict[str, Any], words: str) -> None:
    check = ADAPTERS["qa"].check
    assert check is not None
    assert words in str(check(SourceSpec(name="s", adapter="qa", options=options)))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_fields_are_the_same_composed_or_not(form: Literal["NFC", "NFD"]) -> None:
    row = {normalize(form, "질문"): "q", normalize(form, "답변"): "a"}
    source = SourceSpec(name="s", adapter="qa", options={"question": "질문", "answer": "답변"})
    use = FieldUse(ADAPTERS["qa"], source)
    use.look(row)
    assert turns(convert("qa", row, **source.options)) == [("user", "q"), ("assistant", "a")]
    assert not use.unread


def test_fields_of_parts_are_listed_where_nobody_reads_them() -> None:
    use = FieldUse(ADAPTERS["messages"], SourceSpec(name="s", adapter="messages"))
    use.look(chat({"role": "user", "content": [{"type": "text", "text": "q", "citations": ["c"]}]}))
    assert use.unread == {"messages.content.citations"}


def test_a_flag_may_stand_inside_an_object() -> None:
    row = chat(ASKED, ANSWERED | {"meta": {"train": 1}}, meta={"train": 0})
    assert reason(convert("messages", row, flags={"meta.train": True}))[0] == "not_trained"
    spoken = chat(ASKED, ANSWERED | {"meta": {"train": 0}}, ASKED, ANSWERED)
    assert trained(convert("messages", spoken, flags={"meta.train": True})) == ["a"]
    assert [turn.trained for turn in kept(convert("messages", spoken, flags={"meta.train": True})).messages] == [
        None,
        False,
        None,
        None,
    ]


@pytest.mark.parametrize(("flag", "is_unseen"), [("tained", True), ("learn", False), ("meta.learn", False), ("meta.learned", True)])
def test_a_flag_that_no_row_has_is_an_option_without_effect(flag: str, is_unseen: bool) -> None:
    use = FieldUse(ADAPTERS["messages"], SourceSpec(name="s", adapter="messages", options={"flags": {flag: True}}))
    use.look(chat(ASKED, ANSWERED | {"learn": 1, "meta": {"learn": 1}}))
    assert bool(use.unseen) == is_unseen
