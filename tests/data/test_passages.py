"""Running text among conversations: nothing lost, and held out where pretraining holds the text out."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.adapters import ADAPTERS
from keural.data.filtering.holdout import Splitter
from keural.data.records import Conversation, Document, Drop
from keural.data.sources import open_source
from keural.errors import UserError
from keural.recipe import SourceSpec

ROWS: dict[str, Any] = {
    "text": {"text": "The mill stands.\n\nThe wheel turns.\nThe miller sleeps."},
    "markdown": {"text": "---\ntitle: mill\n---\n# The mill\n\nIt stands by the river."},
}


def source(**options: Any) -> SourceSpec:
    return SourceSpec(name="again", adapter="passage", options=options)


def passages(row: Any, spec: SourceSpec) -> list[Conversation]:
    adapter = ADAPTERS["passage"]
    assert adapter.split is not None
    found = [adapter(part, spec, f"file:1#{place}") for place, part in enumerate(adapter.split(row, spec), start=1)]
    assert all(isinstance(record, Conversation) for record in found)
    return found  # type: ignore[return-value]


@given(st.lists(st.text("ab 가\u2028", max_size=30), min_size=1, max_size=12), st.integers(1, 60))
def test_passages_are_short_enough_and_nothing_between_them_is_lost(lines: list[str], most: int) -> None:
    text = "\n".join(lines)
    if not text.strip():
        return
    found = passages({"text": text}, source(characters=most))
    said = [record.messages[1].content for record in found]
    assert "".join("".join(said).split()) == "".join(text.split())
    assert all(len(answer) <= most for answer in said)


def test_passages_end_with_lines_and_long_lines_with_words() -> None:
    found = passages(
        {"text": "The mill stands by the river.\nThe wheel\nturns.\nabcdefghijklmnopqrstuvwxyz"}, source(characters=20)
    )
    assert [record.messages[1].content for record in found] == [
        "The mill stands by", "the river.", "The wheel\nturns.", "abcdefghijklmnopqrst", "uvwxyz",
    ]  # fmt: skip


@pytest.mark.parametrize("read_as", ROWS)
def test_a_passage_is_held_out_where_its_text_is(read_as: str) -> None:
    """In another stage, by another splitter, with fewer held out: the text decides, not the prompt that all passages share."""
    splits = set()
    for number in range(40):
        row = {"text": ROWS[read_as]["text"] + f"\n{number}"}
        document = ADAPTERS[read_as](row, SourceSpec(name="s", adapter=read_as), "file:1")
        assert isinstance(document, Document)
        wanted = Splitter(500).assign(document)
        splitter = Splitter(500)
        found = [splitter.assign(record) for record in passages(row, source(read_as=read_as, characters=20))]
        assert found == [wanted] * len(found)
        assert len(found) > 1
        splits.add(wanted)
    assert splits == {"train", "heldout"}


def test_an_answer_is_held_out_where_pretraining_holds_out_the_text_of_its_row() -> None:
    """Whatever the template asks: the fields that pretraining reads decide."""
    splits = set()
    for number in range(40):
        row = {"q": f"Where is mill {number}?", "key": "a mill", "why": "It stands by the river."}
        document = ADAPTERS["text"](row, SourceSpec(name="s", adapter="text", options={"field": ["q", "why"]}), "file:1")
        assert isinstance(document, Document)
        wanted, splitter = Splitter(500).assign(document), Splitter(500)
        for template in ("What is {question}?", "Tell me about {question}."):
            options = {"question": "key", "answer": "why", "template": template, "text": ["q", "why"]}
            record = ADAPTERS["qa"](row, SourceSpec(name="s", adapter="qa", options=options), "file:1")
            assert isinstance(record, Conversation)
            assert [turn.content for turn in record.messages] == [template.format(question="a mill"), row["why"]]
            assert splitter.assign(record) == wanted
        splits.add(wanted)
    assert splits == {"train", "heldout"}
    dropped = ADAPTERS["qa"]({"question": "?", "answer": "a"}, SourceSpec(name="s", adapter="qa", options={"text": "q"}), "file:1")
    assert isinstance(dropped, Drop)
    assert dropped.reason == "missing_q"


@pytest.mark.parametrize(("text", "reason"), [("a \ud800 mill", "invalid_unicode"), (" ", "empty")])
def test_an_answer_whose_text_pretraining_drops_is_dropped_for_the_same_reason(text: str, reason: str) -> None:
    row, options = {"question": "?", "answer": "a", "whole": text}, {"text": "whole"}
    dropped = ADAPTERS["qa"](row, SourceSpec(name="s", adapter="qa", options=options), "file:1")
    assert isinstance(dropped, Drop)
    assert dropped.reason == reason


def test_the_same_passage_twice_is_a_duplicate() -> None:
    splitter = Splitter(0)
    one, other = (passages({"text": "The mill stands."}, source())[0] for _ in range(2))
    assert splitter.assign(one) == "train"
    assert isinstance(again := splitter.assign(other), Drop)
    assert again.reason == "duplicate"


def test_the_prompt_asks_and_the_passage_answers() -> None:
    (found,) = passages({"body": "물레방아가 돈다."}, source(field="body", prompt="글을 써 줘."))
    assert [(turn.role, turn.content) for turn in found.messages] == [("user", "글을 써 줘."), ("assistant", "물레방아가 돈다.")]


@pytest.mark.parametrize("row", [{"text": " \n "}, {"body": "x"}, {"text": [7]}, {"text": "a\ud800"}], ids=str)
def test_what_text_would_drop_is_dropped_for_the_same_reason(row: Any) -> None:
    adapter = ADAPTERS["passage"]
    assert adapter.split is not None
    (part,) = adapter.split(row, source())
    dropped, as_text = adapter(part, source(), "file:1"), ADAPTERS["text"](row, SourceSpec(name="s", adapter="text"), "file:1")
    assert isinstance(dropped, Drop)
    assert isinstance(as_text, Drop)
    assert dropped.reason == as_text.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": " "}, "prompt"),
        ({"read_as": "markdown", "field": "x"}, "field"),
        ({"side": "en"}, "side"),
        ({"read_as": "tex"}, "text"),
        ({"characters": 0}, "characters"),
        ({"characters": -800}, "characters"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    (tmp_path / "a.txt").write_text("The mill stands.")
    with pytest.raises(UserError, match=words):
        open_source(SourceSpec(name="again", adapter="passage", path="a.txt", options=options), tmp_path)


def test_catalogues_are_read_as_pretraining_reads_them_and_nothing_else_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.po").write_text('msgid "mill"\nmsgstr "물레방아"\n\nmsgid "river"\nmsgstr "강"\n')
    (tmp_path / "a.txt").write_text("The mill stands.")

    def said(path: str) -> list[Any]:
        spec = SourceSpec(name="again", adapter="passage", path=path, options={"read_as": "po"})
        return list(open_source(spec, tmp_path).read(1))

    (document,) = open_source(SourceSpec(name="s", adapter="po", path="a.po"), tmp_path).read(1)
    (passage,) = said("a.po")
    assert isinstance(document, Document)
    assert (passage.origin, passage.messages[1].content) == (document.text, document.text)
    (dropped,) = said("a.txt")
    assert (dropped.reason, "gettext" in dropped.detail) == ("wrong_schema", True)
