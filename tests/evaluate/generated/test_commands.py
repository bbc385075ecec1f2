"""`keural evaluate` with written answers: tasks that generate, programs only where they are allowed, files for a judge, exports."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Keural
from tests.evaluate.generated.test_generate_tasks import SETS

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["the cat?", "a bird?"]},
    {"question_id": 2, "turns": ["고양이는?"]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The sets of some tasks, a row each."""
    import gzip

    for place, rows in SETS.values():
        file = tmp_path / "sets" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows) if isinstance(rows, dict) else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_bytes(gzip.compress(text.encode()) if place.endswith(".gz") else text.encode())
    return tmp_path / "sets"


def figures(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["tasks"]
    return found


def test_tasks_that_generate_are_asked_like_any_other(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    out, results = tmp_path / "figures.json", tmp_path / "results"
    arguments = ["evaluate", model_dir, "--data", data, "--tasks", "gsm8k", "--shots", 0, "--results", results, "--json", out]
    code, _, errors = keural(*arguments)
    assert code == 0, errors
    assert figures(out)["gsm8k"]["n"] == 1
    (file,) = results.glob("*/gsm8k-*.jsonl")
    item = json.loads(file.read_text(encoding="utf-8").splitlines()[1])
    assert item["details"]["answers"]
    before = file.read_bytes()
    assert keural(*arguments)[0] == 0
    assert file.read_bytes() == before


def test_programs_run_only_where_it_is_allowed(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    common = ["evaluate", model_dir, "--data", data, "--results", tmp_path / "results"]
    code, _, errors = keural(*common, "--tasks", "humaneval")
    assert code == 2
    assert "--run-code" in errors
    out = tmp_path / "figures.json"
    code, _, errors = keural(*common, "--tasks", "en", "--shots", 0, "--json", out)
    assert code == 0, errors
    assert "humaneval is left out" in errors
    assert "humaneval" not in figures(out)
    code, _, errors = keural(*common, "--tasks", "humaneval", "--run-code", "--json", out)
    assert code == 0, errors
    assert figures(out)["humaneval"]["score"] == 0


def test_answers_for_a_judge_and_what_it_says(keural: Keural, model_dir: Path, tmp_path: Path) -> None:
    questions, answers, judged = tmp_path / "question.jsonl", tmp_path / "answers.jsonl", tmp_path / "judged.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    code, shown, errors = keural("evaluate", "answers", model_dir, questions, answers, "--name", "mine", "--max-new-tokens", 8)
    assert code == 0, errors
    assert "answers to 2 questions" in shown
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 1]
    assert {row["model_id"] for row in rows} == {"mine"}
    judged.write_text("".join(
        json.dumps({"question_id": row["question_id"], "model": "mine", "turn": turn + 1, "score": 4 + turn}) + "\n"
        for row in rows for turn in range(len(row["choices"][0]["turns"]))
    ))  # fmt: skip
    code, shown, errors = keural("evaluate", "judgements", judged, "--questions", questions, "--json", tmp_path / "j.json")
    assert code == 0, errors
    assert "turn 2" in shown
    assert json.loads((tmp_path / "j.json").read_text())["models"]["mine"]["by_turn"]["1"]["mean"] == 4


def test_tasks_are_exported_and_what_cannot_be_is_said(keural: Keural, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tasks"
    names = "gsm8k,ifeval,humaneval,ko_instructions"
    code, _, errors = keural("evaluate", "export-tasks", out, "--data", data, "--tasks", names, "--shots", 0)
    assert code == 0, errors
    assert "humaneval is left out" in errors
    assert sorted(path.name for path in out.glob("*.yaml")) == [
        "keural_gsm8k.yaml",
        "keural_ifeval.yaml",
        "keural_ko_instructions.yaml",
    ]
    code, _, errors = keural("evaluate", "export-tasks", out, "--data", data, "--tasks", names, "--shots", 0)
    assert code == 2
    assert "not empty" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--include", "x"], "--include is for --harness"),
        (["--harness", "a", "--include", "nowhere"], "nowhere: no such directory"),
        (["--tasks", "ko_instruction"], "did you mean 'ko_instructions'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(keural: Keural, model_dir: Path, arguments: list[str], words: str) -> None:
    if "--harness" in arguments:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (`keural[eval]`)")
    code, _, errors = keural("evaluate", model_dir, *arguments)
    assert code == 2
    assert words in errors
    assert len(errors.strip().splitlines()) == 1
