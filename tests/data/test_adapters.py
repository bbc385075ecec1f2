"""What each adapter makes of rows in the shapes their publishers use, and every reason for which a row is dropped."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.adapters import ADAPTERS
from keural.data.readers.po import parse_po
from keural.data.records import Conversation, Document, Drop, PreferencePair, Record
from keural.recipe import SourceSpec

OTHER = {"human": "gpt", "gpt": "human"}


def convert(adapter: str, value: Any, **options: Any) -> Record | Drop:
    source = SourceSpec(name="s", adapter=adapter, language="ko", options=options)
    return ADAPTERS[adapter](value, source, "file:1")


def turns(record: Record | Drop) -> list[tuple[str, str]]:
    assert isinstance(record, Conversation), record
    return [(turn.role, turn.content) for turn in record.messages]


def pair(record: Record | Drop) -> tuple[list[tuple[str, str]], str, str]:
    assert isinstance(record, PreferencePair), record
    return [(turn.role, turn.content) for turn in record.prompt], record.chosen, record.rejected


def reason(record: Record | Drop) -> str:
    assert isinstance(record, Drop), record
    assert record.where == "file:1"
    return record.reason


def test_text_from_a_field_or_several() -> None:
    assert convert("text", {"text": " a\n  b"}) == Document(" a\n  b", "file:1", "ko")
    assert convert("text", {"title": "제목", "body": "본문"}, field=["title", "body"]) == Document("제목\n본문", "file:1", "ko")
    assert convert("text", {"a": {"b": ["x", "y"]}}, field="a.b.1") == Document("y", "file:1", "ko")
    assert reason(convert("text", {"body": "a"})) == "missing_text"
    assert reason(convert("text", {"text": ["a"]})) == "text_is_not_text"
    assert reason(convert("text", {"text": " \n"})) == "empty"
    assert reason(convert("text", {"text": "a\ud800"})) == "invalid_unicode"


@pytest.mark.parametrize("matter", ["---\ntitle: x\n---\n", "+++\ntitle = 1\n+++\n\n", ""])
def test_markdown_keeps_everything_but_front_matter(matter: str) -> None:
    body = "# 제목\n\n```python\ndef f():\n    return 1\n```\n\n---\n\n끝  \n"
    assert convert("markdown", {"text": matter + body}) == Document(body, "file:1", "ko")


def test_po_sides() -> None:
    text = (
        'msgid "one"\nmsgstr "하나"\n\nmsgid "two"\nmsgstr ""\n\n'
        'msgid "file"\nmsgid_plural "files"\nmsgstr[0] "파일"\nmsgstr[1] "파일들"\n'
    )
    value = {"messages": parse_po(text)}
    assert convert("po", value) == Document("하나\n\n파일\n파일들", "file:1", "ko")
    assert convert("po", value, side="en") == Document("one\n\ntwo\n\nfile\nfiles", "file:1", "en")
    both = convert("po", value, side="both")
    assert isinstance(both, Document)
    assert both.text == "one\n하나\n\nfile\nfiles\n파일\n파일들"
    assert reason(convert("po", {"messages": []})) == "empty"


def test_messages_and_sharegpt() -> None:
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    chatml = [{"role": "system", "content": "\n \ns "}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a\n"}]
    assert turns(convert("messages", {"messages": chatml})) == expected
    assert turns(convert("messages", {"talk": chatml}, field="talk")) == expected
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert turns(convert("sharegpt", {"conversations": sharegpt, "system": "s"})) == expected
    assert turns(convert("sharegpt", {"conversations": sharegpt, "p": "s"}, system="p")) == expected
    assert turns(convert("sharegpt", {"conversations": sharegpt, "system": None})) == expected[1:]
    empty_system = [{"from": "system", "value": ""}, *sharegpt]
    assert turns(convert("sharegpt", {"conversations": empty_system})) == expected[1:]


def talk(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (talk(("user", "q")), "no_assistant_turn"),
        (talk(), "no_assistant_turn"),
        (talk(("system", "s")), "no_assistant_turn"),
        (talk(("user", "q"), ("alien", "x"), ("assistant", "a")), "unknown_role"),
        (talk(("user", "q"), ("tool", "x"), ("assistant", "a")), "tool_result_without_call"),
        (talk(("user", "q"), ("assistant", "")), "empty_turn"),
        (talk(("user", None), ("assistant", "a")), "empty_turn"),
        (talk(("user", " \n"), ("assistant", "a")), "empty_turn"),
        (talk(("assistant", "a"), ("user", "q"), ("assistant", "b")), "assistant_first"),
        (talk(("user", "q"), ("assistant", "a"), ("assistant", "b")), "not_alternating"),
        (talk(("user", "q"), ("system", "s"), ("assistant", "b")), "system_inside"),
        (talk(("user", ["q"]), ("assistant", "b")), "malformed_row"),
        (talk(("user", "q\udc80"), ("assistant", "b")), "invalid_unicode"),
        ({"messages": "text"}, "malformed_row"),
        ({"other": []}, "missing_messages"),
        ("text", "missing_messages"),
        (None, "missing_messages"),
    ],
)
def test_conversations_that_are_dropped(value: Any, expected: str) -> None:
    assert reason(convert("messages", value)) == expected


def test_trailing_user_turns_are_cut_and_markers_stay_text() -> None:
    value = talk(("user", "<|im_end|>"), ("assistant", "<|im_start|>system"), ("user", "more"))
    assert turns(convert("messages", value)) == [("user", "<|im_end|>"), ("assistant", "<|im_start|>system")]


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert turns(convert("alpaca", row)) == [("user", "Add.\n\n1 2"), ("assistant", "3")]
    for placeholder in ("", "<noinput>", "[no-input]", "입력 없음", " No input ", None):
        found = convert("alpaca", row | {"input": placeholder})
        assert (turns(found), found.notes) == ([("user", "Add."), ("assistant", "3")], ())
    for word in ("N/A", "none", "없음", "해당 없음"):
        found = convert("alpaca", row | {"input": word})
        assert (turns(found), found.notes) == ([("user", "Add."), ("assistant", "3")], ("input_left_out",)), "it may be an input"
    for text in ("None of them", "null", "nothing"):
        assert turns(convert("alpaca", row | {"input": text}))[0] == ("user", f"Add.\n\n{text}")
    renamed = {"지시": "더하라", "응답": 3, "task": {"system": "s"}}
    found = convert("alpaca", renamed, instruction="지시", output="응답", system="task.system")
    assert turns(found) == [("system", "s"), ("user", "더하라"), ("assistant", "3")]
    assert reason(convert("alpaca", {"instruction": "Add."})) == "missing_output"
    assert reason(convert("alpaca", row | {"output": " "})) == "empty_turn"


def test_questions_and_answers() -> None:
    assert turns(convert("qa", {"question": "q", "answer": "a"})) == [("user", "q"), ("assistant", "a")]
    assert turns(convert("qa", {"0": "q", "1": "a"}, question=0, answer=1)) == [("user", "q"), ("assistant", "a")]
    row = {"t": "본문", "q": "질문?", "a": "답", "s": "규칙"}
    found = convert("qa", row, question=["t", "q"], answer="a", system="s")
    assert turns(found) == [("system", "규칙"), ("user", "본문\n질문?"), ("assistant", "답")]
    asked = convert("qa", {"question": "{Go}", "answer": "가"}, template="옮기세요: {question}")
    assert turns(asked)[0] == ("user", "옮기세요: {Go}")
    assert reason(convert("qa", {"question": " ", "answer": "가"}, template="옮기세요: {question}")) == "empty_turn"
    assert reason(convert("qa", {"q": "?"})) == "missing_question"


def test_dialogues() -> None:
    expected = [("user", "안녕"), ("assistant", "네"), ("user", "뭐해"), ("assistant", "42")]
    assert turns(convert("dialogue", {"dialogue": [["안녕", "네"], ["뭐해", 42]]})) == expected
    assert turns(convert("dialogue", ["안녕", "네", "뭐해", "42"])) == expected
    assert reason(convert("dialogue", {"dialogue": ["안녕", {"a": 1}]})) == "malformed_row"
    assert reason(convert("dialogue", {"dialogue": "안녕"})) == "malformed_row"
    assert reason(convert("dialogue", {})) == "missing_dialogue"
    assert reason(convert("dialogue", ["안녕"])) == "no_assistant_turn"


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[place % 2]}: {turn}" for place, turn in enumerate(turns))


def test_hh_transcripts() -> None:
    found = convert("hh_rlhf", {"chosen": hh("q", "a\n\nb", "q2", "good"), "rejected": hh("q", "a\n\nb", "q2", "bad")})
    assert pair(found) == ([("user", "q"), ("assistant", "a\n\nb"), ("user", "q2")], "good", "bad")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (hh("q", "a"), hh("q", " a"), "chosen_equals_rejected"),
        (hh("q", "ａ"), hh("q", "a"), "chosen_equals_rejected"),
        (hh("q", ""), hh("q", "a"), "empty_turn"),
        (hh("q", "a", ""), hh("q", "a", "b"), "empty_turn"),
        (hh("q", "a", "b"), hh("q", "a"), "ends_with_user"),
        (hh("q", "a"), hh("r", "b"), "history_differs"),
        (hh("q", "a", "b", "c"), hh("q", "a"), "history_differs"),
        ("before" + hh("q", "a"), hh("q", "b"), "text_before_first_turn"),
        ("text", hh("q", "b"), "text_before_first_turn"),
        ("\n\nAssistant: a" + hh("q", "a"), hh("q", "b"), "not_alternating"),
        (hh("q", "a", "q") + "\n\nHuman: r", hh("q", "b"), "not_alternating"),
        (hh("q", "a Human: r"), hh("q", "b"), "role_marker_in_turn"),
        (hh("q", "a"), hh("q", "b\nAssistant: c"), "role_marker_in_turn"),
        (None, hh("q", "b"), "missing_chosen"),
    ],
)
def test_hh_defects(chosen: Any, rejected: Any, expected: str) -> None:
    assert reason(convert("hh_rlhf", {"chosen": chosen, "rejected": rejected})) == expected


WORDS = st.text("abc가나 \n", min_size=1).filter(str.strip)


@given(st.lists(WORDS, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1), WORDS, WORDS)
def test_a_transcript_gives_back_its_turns(history: list[str], good: str, bad: str) -> None:
    found = convert("hh_rlhf", {"chosen": hh(*history, "1" + good), "rejected": hh(*history, "2" + bad)})
    prompt, chosen, rejected = pair(found)
    assert [content for _, content in prompt] == [turn.strip() for turn in history]
    assert (chosen, rejected) == (("1" + good).strip(), ("2" + bad).strip())


SHAPES = [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"question": "q", "chosen": "good", "rejected": "bad", "system": ""},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": "good", "rejected": "bad"},
    {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
    {
        "prompt": "q",
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "score_chosen": 8.0,
        "score_rejected": 7.5,
    },
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    {"instruction": "q", "input": "", "output": "good", "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": ["good"], "rejected": ["bad"]},
]


@pytest.mark.parametrize("value", SHAPES)
def test_the_usual_shapes_of_preferences(value: dict[str, Any]) -> None:
    assert pair(convert("preference", value)) == ([("user", "q")], "good", "bad")


def test_preferences_with_system_input_and_other_names() -> None:
    orca = {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}
    assert pair(convert("preference", orca))[0] == [("system", "s"), ("user", "q")]
    assert pair(convert("preference", SHAPES[7] | {"input": "x"}))[0] == [("user", "q\n\nx")]
    renamed = {"묻기": "q", "y": "good", "n": "bad"}
    assert pair(convert("preference", renamed, prompt="묻기", chosen="y", rejected="n")) == ([("user", "q")], "good", "bad")


def test_a_label_says_which_of_two_answers_is_better() -> None:
    row = {"input": "q", "one": "x", "two": "y", "better": 2}
    options = {"prompt": "input", "answers": ["one", "two"], "label": "better"}
    assert pair(convert("preference", row, **options)) == ([("user", "q")], "y", "x")
    assert pair(convert("preference", row | {"better": "1"}, **options)) == ([("user", "q")], "x", "y")
    assert reason(convert("preference", row | {"better": 0}, **options)) == "undeclared_value"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rejected": " good\n"}, "chosen_equals_rejected"),
        ({"rejected": ""}, "empty_turn"),
        ({"rejected": None}, "missing_rejected"),
        ({"chosen": []}, "missing_chosen"),
        ({"chosen": [{"role": "user", "content": "good"}]}, "ends_with_user"),
        ({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "prompt_does_not_end_with_user"),
        ({"prompt": ""}, "missing_prompt"),
        ({"prompt": [{"role": "alien", "content": "q"}]}, "unknown_role"),
        ({"score_chosen": 5, "score_rejected": 5}, "score_tie"),
        ({"score_chosen": 4, "score_rejected": 5}, "score_reversed"),
        ({"rejected": SHAPES[4]["rejected"], "prompt": "p", "chosen": SHAPES[4]["chosen"]}, "history_differs"),
        ({"rejected": SHAPES[4]["rejected"]}, "history_differs"),
    ],
)
def test_preferences_that_are_dropped(change: dict[str, Any], expected: str) -> None:
    assert reason(convert("preference", SHAPES[0] | change)) == expected


KEYS = "text messages role content from value chosen rejected prompt question answer instruction output dialogue conversations"
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("adapter", sorted(set(ADAPTERS) - {"po", "microworld"}))
@given(value=ANYTHING)
def test_no_row_however_odd_breaks_an_adapter(adapter: str, value: Any) -> None:
    assert isinstance(convert(adapter, value), Document | Conversation | PreferencePair | Drop)
