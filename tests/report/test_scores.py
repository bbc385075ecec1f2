"""The table of a run's scores: what stands in it, marks only where they are earned, and text that stays text."""

import json
from pathlib import Path
from typing import Any

import pytest

from keural.evaluate.comparison.stages import complete
from keural.evaluate.contamination import Search, Seen, beside
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.statistics.summary import summarize
from keural.pipeline.run_directory import Summary
from keural.report.scores.table import Scores, scores
from tests.report.test_html import STAGES as RUN_STAGES
from tests.report.test_html import Page, write_recipe, write_report, write_stage

STAGES = ("untrained", "pretrain-1", "sft-1")
RIGHT = {"ko_copa": (50, 70, 40), "arc": (30, 30, 31), "pairs": (50, 52, 60)}
SCRIPT = "<script>alert('x')</script>"


def task(name: str, right: int, n: int = 100) -> TaskResults:
    items = [ItemResult(f"{at:03}", None, float(at < right), SCRIPT, "열아홉", "<b>", None, 1) for at in range(n)]
    kind = "pair" if name == "pairs" else "choice"
    baselines = {"length_only": 0.61} if name == "pairs" else {}
    return TaskResults(name, "ko" if name.startswith("ko") else "en", kind, 0.5, "d", items, {}, baselines)


def prose(bits: float) -> TaskResults:
    items = [ItemResult(str(at), None, bits * 100 + at % 3, "", "", "", None, 1, {"bytes": 100}) for at in range(20)]
    return TaskResults("prose", "ko", "rolling", None, "d", items, {}, {"xz_9": 2.5, "zstd_19": 2.61})


def evaluation() -> dict[str, Any]:
    files = {f"{stage}/{name}": task(name, right[at]) for name, right in RIGHT.items() for at, stage in enumerate(STAGES)}
    files |= {f"{stage}/prose": prose(bits) for stage, bits in zip(STAGES, (8.0, 2.0, 2.1), strict=True)}
    stages: dict[str, Any] = {stage: {"tasks": {}} for stage in STAGES}
    for path, results in files.items():
        stages[path.split("/")[0]]["tasks"][results.task] = summarize(results, path).to_json()
    return complete({"stages": stages}, files.__getitem__, {}, "pretrain-1")


@pytest.fixture
def figures() -> dict[str, Any]:
    return json.loads(json.dumps(evaluation()))


def rows(table: Scores) -> dict[str, Any]:
    return {row.name: row for _, found in table.groups for row in found}


def test_tasks_stand_by_language_and_stages_in_their_order(figures: dict[str, Any]) -> None:
    table = scores(figures)
    assert table.stages == list(STAGES)
    assert [(language, [row.name for row in found]) for language, found in table.groups] == [
        ("Korean", ["ko_copa"]), ("English", ["arc", "pairs"]),
    ]  # fmt: skip
    assert [cell.text for cell in rows(table)["ko_copa"].cells] == ["50.0", "70.0", "40.0"]
    assert rows(table)["ko_copa"].cells[1].half == "± 8.8"
    assert (rows(table)["ko_copa"].n, rows(table)["ko_copa"].chance, rows(table)["pairs"].length) == ("100", "50.0", "61.0")


def test_marks_stand_only_where_a_difference_is_significant(figures: dict[str, Any]) -> None:
    table = rows(scores(figures))
    assert [(cell.mark, cell.tone) for cell in table["ko_copa"].cells] == [("", ""), ("▲", "good"), ("▼", "bad")]
    assert [cell.mark for cell in table["arc"].cells] == ["", "", ""]
    # Eight gained and none lost has p 0.008; of four comparisons Holm makes 0.016 of it.
    assert table["pairs"].cells[2].mark == "▲"
    figures["stages"]["sft-1"]["tasks"]["pairs"]["change"]["better"] = None
    assert rows(scores(figures))["pairs"].cells[2].mark == ""


def test_a_hint_says_what_a_score_rests_on(figures: dict[str, Any]) -> None:
    hint = rows(scores(figures))["ko_copa"].cells[2].hint
    assert hint.startswith("sft-1: 40.0, 95% interval 30.9 to 49.8, n 100\nagainst pretrain-1: −30.0 [−39.")
    assert hint.endswith("0 items higher, 30 lower, p < 0.001 (Holm)")


def test_the_tax_says_what_alignment_cost(figures: dict[str, Any]) -> None:
    table = scores(figures)
    assert table.against == "pretrain-1"
    assert [(name, cells[2].text) for name, cells in table.tax] == [("all tasks", "−7.0"), ("Korean", "−30.0"), ("English", "+4.5")]
    assert [cells[1].text for _, cells in table.tax] == ["–"] * 3
    assert table.tax[1][1][2].tone == "bad"


def test_bits_have_the_packers_beside_them(figures: dict[str, Any]) -> None:
    bits = scores(figures).bits
    assert bits is not None
    assert list(bits.columns) == ["text", "language", "texts", *STAGES, "xz -9", "zstd -19"]
    assert [cell.text for cell in bits.rows[0]] == ["prose", "Korean", "20", "8.009", "2.010 ▼", "2.110 ▲", "2.500", "2.610"]
    assert [cell.strong for cell in bits.rows[0]] == [False] * 4 + [True] + [False] * 3


def test_what_training_data_held_stands_with_the_clean_part(figures: dict[str, Any]) -> None:
    results = task("ko_copa", 40)
    looked = Search({"sft-1": Seen({"d": frozenset(f"{at:03}" for at in range(20))}), "pretrain-1": Seen(unknown="gone")}, {})
    figures["stages"]["sft-1"]["tasks"]["ko_copa"]["contamination"] = beside(results, looked)
    table = scores(figures)
    row = rows(table)["ko_copa"]
    assert row.remark.startswith(
        "† 20 of 100 items in training data; without them 25.0 ± 9.3; training text of pretrain-1 is not there"
    )
    assert [cell.text for cell in row.cells] == ["50.0", "70.0", "40.0†"]
    assert "20 items in training data; the others: 25.0" in row.cells[2].hint
    assert table.seen
    figures["stages"]["sft-1"]["tasks"]["ko_copa"]["contamination"]["clean"] = None
    assert "none is left without them" in rows(scores(figures))["ko_copa"].remark


def test_figures_alone_are_a_table_without_marks() -> None:
    plain = {
        "stages": {"final": {"tasks": {"arc": {"score": 0.5, "low": 0.4, "high": None, "n": 3, "chance": None, "items": None}}}}
    }
    row = rows(scores(plain))["arc"]
    assert (row.chance, row.cells[0].text, row.cells[0].half, row.cells[0].mark) == ("–", "50.0", "", "")
    assert scores({}) == scores({"stages": {}}) == scores({"stages": {"a": {"tasks": {}}}}) == Scores()


def test_a_stage_that_lacks_a_task_leaves_a_gap(figures: dict[str, Any]) -> None:
    del figures["stages"]["pretrain-1"]["tasks"]["arc"]
    row = rows(scores(figures))["arc"]
    assert [cell.text for cell in row.cells] == ["30.0", "–", "31.0"]
    assert row.course.count("<circle") == 2


def test_the_page_shows_it_and_text_from_data_stays_text(figures: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "small"
    write_recipe(run)
    done = [write_stage(run, name, objective) for name, objective in RUN_STAGES]
    evil = figures["stages"]["sft-1"]["tasks"].pop("arc")
    figures["stages"]["sft-1"]["tasks"]["<img src=x onerror=alert(1)>"] = evil | {"language": "<i>"}
    summary = {"recipe": "small", "seconds": 1, "stages": done, "evaluation": figures, "samples": [], "data": {}}
    Summary.model_validate(summary).write(run / "summary.json")
    page = Page(write_report(run))
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "What it can do" in page.headings
    assert "Further figures" not in page.words
    for text in ("copa n 100", "alignment tax", "Wrong answers of the last stage", SCRIPT, "expected: 열아홉", "<img src=x"):
        assert text in page.words, text
    for text in (SCRIPT, "<img src=x", "<i>", "<b></p>"):
        assert text not in html, text
    assert page.references == [link for link in page.references if link.startswith("#")]
