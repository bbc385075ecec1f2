"""The figures of a run's stages: changes against the predecessor, the alignment tax, wrong answers."""

import json
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate.comparison.paired import compare
from keural.evaluate.comparison.stages import LONGEST, complete, wrong_answers
from keural.evaluate.results.records import TaskResults
from keural.evaluate.statistics.summary import summarize
from tests.evaluate.comparison.test_paired import answers, results

STAGES = {
    "untrained": {"ko_a": range(20), "b": range(20)},
    "pretrain-1": {"ko_a": range(35), "b": range(30)},
    "sft-1": {"ko_a": range(34), "b": range(15)},
    "dpo-1": {"ko_a": range(36), "b": range(12)},
}


def run(**more: Any) -> tuple[dict[str, Any], dict[str, TaskResults]]:
    files = {f"{stage}/{task}": results(task, answers(right)) for stage, tasks in STAGES.items() for task, right in tasks.items()}
    stages = {
        stage: {"tasks": {task: summarize(files[f"{stage}/{task}"], f"{stage}/{task}").to_json() for task in tasks}}
        for stage, tasks in STAGES.items()
    }
    return {"stages": stages} | more, files


def test_each_stage_is_compared_with_the_one_it_starts_from() -> None:
    figures, files = run()
    found = complete(figures, files.__getitem__, {"dpo-1": "pretrain-1"}, "pretrain-1")
    assert "change" not in found["stages"]["untrained"]["tasks"]["b"]
    against = {name: stage["tasks"]["b"]["change"]["against"] for name, stage in found["stages"].items() if name != "untrained"}
    assert against == {"pretrain-1": "untrained", "sft-1": "pretrain-1", "dpo-1": "pretrain-1"}
    same = compare([files["pretrain-1/ko_a"], files["pretrain-1/b"]], [files["sft-1/ko_a"], files["sft-1/b"]])
    assert found["stages"]["sft-1"]["tasks"]["b"]["change"] == same.tasks[1].to_json() | {"against": "pretrain-1"}
    assert found["stages"]["sft-1"]["tasks"]["b"]["change"]["better"] is False
    assert found["stages"]["sft-1"]["tasks"]["ko_a"]["change"]["better"] is None
    assert found["stages"]["sft-1"]["tasks"]["ko_a"]["language"] == "ko"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_tax_is_the_mean_difference_against_the_last_pretraining_stage() -> None:
    figures, files = run()
    tax = complete(figures, files.__getitem__, {}, "pretrain-1")["tax"]
    assert [row["language"] for row in tax] == [None, "ko", "en"]
    assert list(tax[0]["stages"]) == ["sft-1", "dpo-1"]
    assert tax[0]["stages"]["sft-1"]["value"] == pytest.approx((-1 / 40 - 15 / 40) / 2)
    assert tax[2]["stages"]["dpo-1"]["value"] == pytest.approx(-18 / 40)
    assert tax[0]["stages"]["sft-1"]["low"] < tax[0]["stages"]["sft-1"]["value"] < tax[0]["stages"]["sft-1"]["high"]
    assert complete(figures, files.__getitem__)["tax"] == []
    assert complete(figures, files.__getitem__, {}, "nowhere")["tax"] == []


def test_a_stage_that_was_asked_in_another_way_is_not_compared() -> None:
    figures, files = run()
    for stage in STAGES:
        figures["stages"][stage]["tasks"]["b"]["asked"] = "chat" if stage == "sft-1" else "bos"
    found = complete(figures, files.__getitem__, {"dpo-1": "pretrain-1"}, "pretrain-1")
    assert "change" not in found["stages"]["sft-1"]["tasks"]["b"]
    assert "change" in found["stages"]["sft-1"]["tasks"]["ko_a"]
    assert found["stages"]["dpo-1"]["tasks"]["b"]["change"]["against"] == "pretrain-1"
    assert [row["stages"].get("sft-1", {}).get("tasks") for row in found["tax"]] == [1, 1, None]


def test_wrong_answers_are_those_of_the_last_stage_and_the_same_ones_each_time() -> None:
    figures, files = run()
    found = complete(figures, files.__getitem__)["stages"]
    assert "wrong" not in found["sft-1"]["tasks"]["b"]
    shown = found["dpo-1"]["tasks"]["b"]["wrong"]
    assert len(shown) == 10
    assert shown == wrong_answers(results("b", dict(reversed(answers(range(12)).items()))))
    assert found["dpo-1"]["tasks"]["ko_a"]["wrong"] == [
        {"question": f"q{n}", "expected": "e", "given": "g"} for n in (36, 37, 38, 39)
    ]


def test_long_answers_are_shown_in_part() -> None:
    long = results("t", {"a" * 5000: 0.0})
    assert len(wrong_answers(long)[0]["question"]) <= LONGEST + 3
    assert wrong_answers(results("t", {"a": 12.0}, "rolling", bytes=3)) == []


def test_tasks_that_were_measured_otherwise_are_not_compared() -> None:
    figures, files = run()
    files["sft-1/b"] = results("b", answers(range(3)), digest="other")
    found = complete(figures, files.__getitem__, {}, "pretrain-1")
    assert "change" not in found["stages"]["sft-1"]["tasks"]["b"]
    assert "change" in found["stages"]["sft-1"]["tasks"]["ko_a"]


def test_a_stage_without_items_has_its_figures_and_no_more() -> None:
    figures, files = run()
    del figures["stages"]["sft-1"]["tasks"]["b"]["items"]
    found = complete(figures, files.__getitem__)["stages"]
    assert "change" not in found["sft-1"]["tasks"]["b"]
    assert "change" not in found["dpo-1"]["tasks"]["b"]
    assert complete({"stages": {}}, files.__getitem__) == {"stages": {}, "tax": []}


def test_items_that_cannot_be_read_are_not_passed_over() -> None:
    def read(path: str) -> TaskResults:
        raise UserError(f"{path}: damaged")

    with pytest.raises(UserError, match="untrained/ko_a: damaged"):
        complete(run()[0], read)
