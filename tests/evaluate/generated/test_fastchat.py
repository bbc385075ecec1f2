"""MT-Bench and LogicKor: questions read, two turns answered, files in FastChat's form, judgements read back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate.generated.fastchat import (
    Question,
    read_judgements,
    read_questions,
    write_answers_file,
    write_chats,
)
from keural.evaluate.generated.writing import write_answers
from keural.evaluate.scoring.network import Network
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.tasks.items import Writing, Written
from keural.model import KeuralMoECausalLM
from keural.serve.batching.transformers_slots import TransformersSlots
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

QUESTIONS = [
    Question(81, "writing", ("the cat?", "two birds?")),
    Question(82, "math", ("a red house?", "고양이는?")),
    Question(83, "x", ("a",)),
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_questions_of_both_sets_are_read(tmp_path: Path) -> None:
    mt_bench = {"question_id": 81, "category": "writing", "turns": ["one", "two"]}
    logickor = {"id": 0, "category": "추론(Reasoning)", "questions": ["하나", "둘"], "references": [None, None]}
    assert read_questions(write_lines(tmp_path / "q.jsonl", [mt_bench, logickor])) == [
        Question(81, "writing", ("one", "two")),
        Question(0, "추론(Reasoning)", ("하나", "둘")),
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no question"),
        (["{"], r"q.jsonl:1: not valid JSON"),
        (["[1]"], r"q.jsonl:1: not a JSON object"),
        ([{"question_id": 1, "turns": []}], "no question"),
        ([{"question_id": True, "turns": ["a"]}], "no question"),
        ([{"question_id": 1, "turns": ["a"]}, {"question_id": 1, "turns": ["b"]}], r"q.jsonl:2: question 1 stands there twice"),
    ],
)
def test_a_file_without_questions_is_refused_by_line(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_questions(write_lines(tmp_path / "q.jsonl", rows))


def test_the_second_turn_follows_the_models_own_first_answer(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    network = Network(copy.deepcopy(model), tokenizer)
    asking = Asking(tokenizer, "chat", network.context_length)
    found = write_chats(network, asking, QUESTIONS, max_new_tokens=9)
    assert [len(turns) for turns in found] == [2, 2, 1]
    assert found == write_chats(network, asking, QUESTIONS, max_new_tokens=9)
    first, second = found[1]
    chat = [Message("user", "a red house?"), Message("assistant", first.text), Message("user", "고양이는?")]
    ids = tuple(render_prompt(tokenizer, chat))
    ((_, alone),) = write_answers(TransformersSlots(network.model, 1), tokenizer, [Writing(ids, 9)])
    assert second == alone


def test_a_chat_that_does_not_fit_is_refused_by_its_number(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    network = Network(copy.deepcopy(model), tokenizer)
    asking = Asking(tokenizer, "chat", network.context_length)
    with pytest.raises(UserError, match="question 9, turn 1"):
        write_chats(network, asking, [Question(9, "", ("the cat " * 200,))])


def test_answers_are_written_as_fastchat_reads_them(tmp_path: Path) -> None:
    answers = [(Written("하나", 1, "stop"), Written("둘", 1, "length")), (Written("a", 1, "stop"), Written("b", 1, "stop"))]
    file = tmp_path / "answers.jsonl"
    write_answers_file(file, "keural-x", QUESTIONS[:2], answers)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["하나", "둘"]}]
    assert rows[0]["model_id"] == "keural-x"
    assert rows[0]["ends"] == ["stop", "length"]
    before = file.read_bytes()
    write_answers_file(file, "keural-x", QUESTIONS[:2], answers)
    assert file.read_bytes() == before


def judgement(question: int, turn: int, score: float, model: str = "a") -> dict[str, Any]:
    return {"question_id": question, "model": model, "judge": ["gpt-4", "single-v1"], "judgment": "…", "score": score, "turn": turn}


def test_judgements_become_means_by_turn_and_category_with_questions_as_units(tmp_path: Path) -> None:
    rows = [
        judgement(81, 1, 8),
        judgement(81, 2, 6),
        judgement(82, 1, 4),
        judgement(82, 2, 2),
        judgement(83, 1, -1),
        judgement(81, 1, 10, "b"),
    ]
    first, second = read_judgements(write_lines(tmp_path / "j.jsonl", rows), {81: "writing", 82: "math", 83: "math"})
    assert (first.model, first.overall.mean, first.overall.judgements, first.overall.questions, first.unjudged) == ("a", 5, 4, 2, 1)
    assert {turn: judged.mean for turn, judged in first.by_turn.items()} == {1: 6, 2: 4}
    assert {kind: judged.mean for kind, judged in first.by_category.items()} == {"writing": 7, "math": 3}
    assert first.overall.low < 5 < first.overall.high
    assert 0 <= first.overall.low <= first.overall.high <= 10
    assert second.overall.mean == 10


def test_judgements_of_logickor_are_read(tmp_path: Path) -> None:
    row = {
        "id": 3,
        "category": "수학(Math)",
        "outputs": ["a", "b"],
        "query_single": {"judge_message": "…", "judge_score": 7.0},
        "query_multi": {"judge_message": "…", "judge_score": 5},
    }
    (found,) = read_judgements(write_lines(tmp_path / "keural.jsonl", [row]))
    assert found.model == "keural"
    assert found.overall.mean == 6
    assert found.by_category["수학(Math)"].judgements == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_id": 1, "model": "a", "turn": 1}, "no turn or no score"),
        ({"model": "a", "turn": 1, "score": 3}, "neither question_id nor id"),
        ({"question_id": 1, "model": "a", "turn": 1, "score": 11}, "0 to 10"),
        ({"question_id": 1, "model": "a", "turn": 1, "score": "8"}, "0 to 10"),
        ({"question_id": 1, "g1_winner": "model_1"}, "mode single"),
        ({"question_id": 1, "model": "a", "turn": 1, "score": -1}, "has a score"),
    ],
)
def test_what_is_no_judgement_is_refused_by_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_judgements(write_lines(tmp_path / "j.jsonl", [row]))
