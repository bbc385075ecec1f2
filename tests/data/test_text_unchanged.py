"""Text arrives as it was written: indentation, spaces, characters; only line ends of files and decomposed Hangul change."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.adapters.composition import compose
from keural.data.readers.notes import ReadingNotes
from keural.data.records import Conversation, Document, PreferencePair
from keural.data.sources import open_source
from keural.recipe import SourceSpec
from tests.helpers.examples import examples

KOREAN = "고양이는 빨간 집을 봅니다. 값이 싸다!"
LETTERS = unicodedata.normalize("NFD", KOREAN)
CODE = "    x = 0\n\n\tif x:\n        return x  # 끝"


def read(
    data_dir: Path, name: str, content: str | bytes, adapter: str = "text", **options: Any
) -> tuple[list[Any], tuple[str, ...]]:
    (data_dir / name).write_bytes(content.encode() if isinstance(content, str) else content)
    notes = ReadingNotes()
    spec = SourceSpec(name="s", adapter=adapter, path=name, options=options)
    return list(open_source(spec, data_dir).read(seed=0, notes=notes)), notes.lines()


class TestDecomposedHangul:
    @pytest.mark.parametrize("escaped", [True, False])
    def test_it_is_composed_wherever_it_stands_and_said_once(self, data_dir: Path, escaped: bool) -> None:
        for name, content in (
            ("a.txt", LETTERS),
            ("a.jsonl", json.dumps({"text": LETTERS}, ensure_ascii=escaped)),
            ("a.csv", f"text\n{LETTERS}\n"),
            ("a.yaml", f"text: {LETTERS}"),
        ):
            (record,), lines = read(data_dir, name, content)
            assert record.text == KOREAN
            assert lines == ("1 record held Hangul written letter by letter, which is composed (NFC)",)

    def test_in_every_turn_reasoning_and_both_answers(self, data_dir: Path) -> None:
        turns = [
            {"role": "system", "content": LETTERS},
            {"role": "user", "content": LETTERS},
            {"role": "assistant", "content": LETTERS, "reasoning_content": LETTERS},
        ]
        (talk,), lines = read(data_dir, "a.jsonl", json.dumps({"messages": turns}), "messages", reasoning="keep")
        assert isinstance(talk, Conversation)
        assert {text for turn in talk.messages for text in (turn.content, turn.reasoning) if text} == {KOREAN}
        assert len(lines) == 1
        pair = {"prompt": LETTERS, "chosen": LETTERS, "rejected": f"{LETTERS}?"}
        (found,), _ = read(data_dir, "b.jsonl", json.dumps(pair), "preference")
        assert isinstance(found, PreferencePair)
        assert (found.prompt[0].content, found.chosen, found.rejected) == (KOREAN, KOREAN, f"{KOREAN}?")

    def test_a_final_consonant_behind_a_syllable(self) -> None:
        assert compose("가\u11ab") == "간"

    @pytest.mark.parametrize("text", ["ㅋㅋㅋ ㅠㅠ", "ㄱ ㅏ", "\u1112\u119e\u11ab", "e\u0301 é", "ﾊﾝ", "\u1100", KOREAN, "ﬁ ①"])
    def test_nothing_else_changes(self, text: str) -> None:
        assert compose(text) is text

    @given(st.text(st.characters(exclude_categories=["Cs"]) | st.characters(min_codepoint=0x1100, max_codepoint=0x11FF)))
    @examples(50)
    def test_the_result_means_the_same_and_stays(self, text: str) -> None:
        composed = compose(text)
        assert unicodedata.normalize("NFC", composed) == unicodedata.normalize("NFC", text)
        assert compose(composed) == composed

    def test_text_that_is_composed_already_is_said_nothing_of(self, data_dir: Path) -> None:
        assert read(data_dir, "a.txt", KOREAN) == ([Document(KOREAN, "a.txt")], ())


class TestSpace:
    @pytest.mark.parametrize(
        ("adapter", "row"),
        [
            ("messages", {"messages": [{"role": "user", "content": "Go on:"}, {"role": "assistant", "content": CODE}]}),
            ("sharegpt", {"conversations": [{"from": "human", "value": "Go on:"}, {"from": "gpt", "value": CODE}]}),
            ("alpaca", {"instruction": "Go on:", "input": "", "output": CODE}),
            ("qa", {"question": "Go on:", "answer": CODE}),
            ("dialogue", {"dialogue": ["Go on:", CODE]}),
        ],
    )
    def test_the_first_line_of_an_answer_keeps_its_indentation(self, data_dir: Path, adapter: str, row: dict[str, Any]) -> None:
        (record,), _ = read(data_dir, "a.jsonl", json.dumps(row), adapter)
        assert record.messages[-1].content == CODE

    def test_documents_keep_everything(self, data_dir: Path) -> None:
        text = f"\n  \n{CODE}  \n\n"
        assert read(data_dir, "a.txt", text)[0] == [Document(text, "a.txt")]
        assert read(data_dir, "a.jsonl", json.dumps({"text": text}))[0] == [Document(text, "a.jsonl:1")]

    def test_line_ends_are_those_of_files_and_not_of_values(self, data_dir: Path) -> None:
        assert read(data_dir, "a.txt", "one\r\ntwo\r\n")[0][0].text == "one\ntwo\n"
        assert read(data_dir, "b.txt", "one\rtwo\r", split="line")[0][1].text == "two"
        assert read(data_dir, "c.csv", 'text,n\r\n"one\r\ntwo",1\r\n')[0][0].text == "one\ntwo"
        assert read(data_dir, "d.jsonl", '{"text": "one\\r\\ntwo"}\r\n')[0][0].text == "one\r\ntwo"
