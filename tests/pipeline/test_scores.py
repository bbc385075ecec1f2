"""What `keural evaluate` measured of a run's stages: in its summary and report, with what its training data held."""

import json
import random
import shutil
from pathlib import Path

import pytest

from keural.data.records import Document
from keural.evaluate.results.records import ItemResult
from keural.evaluate.results.store import Header, ModelIdentity, open_results, read_results, results_file
from keural.pipeline.run_directory import Done, Summary
from keural.pipeline.scores import Measured, keep, scores_of, with_kept
from keural.pipeline.training_texts import trained_on
from tests.pipeline.conftest import WORDS, Place


@pytest.fixture
def run(place: Place) -> Path:
    """A finished run of three stages."""
    return place.run


def items_of(data: Path) -> dict[str, Document]:
    """50 texts that `steady` was trained on, as far as they were not held out, and 50 that nobody has seen."""
    draw = random.Random(77)
    seen = [json.loads(line)["text"] for line in (data / "prose.jsonl").read_text().splitlines()[:50]]
    other = [" ".join(draw.choices(WORDS, k=30)) for _ in range(50)]
    return {f"{at:03}": Document(text, f"set:{at}") for at, text in enumerate(seen + other)}


def trained_of(run: Path, records: dict[str, Document]) -> set[str]:
    """Those of the first 50 that are not held out."""
    files = (run / "data").glob("*/heldout/texts.jsonl")
    held_out = {json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    return {key for key in list(records)[:50] if records[key].text not in held_out}


def measured(
    run: Path, name: str, right: int, records: dict[str, Document], task: str = "planted", limit: int | None = None
) -> Measured:
    header = Header(
        ModelIdentity(name, name, "t", "bos", "", "stored", "transformers"), task, "ko", "choice", 0.5, task * 8, len(records)
    )
    path = results_file(run / "results", header)
    with open_results(path, header) as writer:
        new = [key for key in records if key not in writer.items]
        writer.append((int(key), ItemResult(key, None, float(int(key) < right), "q", "e", "g", None, 1)) for key in new)
    results = read_results(path).results(limit)
    return Measured(results, path, records, limit)


def test_items_that_a_stage_was_trained_on_are_flagged_in_it_and_in_all_after_it(run: Path, finished: Path) -> None:
    records = items_of(finished / "data")
    found = keep(run, {name: [measured(run, name, 50, records)] for name in ("untrained", "steady", "chat")})
    tasks = {name: stage["tasks"]["planted"] for name, stage in found["stages"].items()}
    assert "contamination" not in tasks["untrained"]
    seen = set(tasks["steady"]["contamination"]["items"])
    assert seen == trained_of(run, records)
    assert tasks["chat"]["contamination"]["by_stage"] == tasks["steady"]["contamination"]["by_stage"] == {"steady": len(seen)}
    assert tasks["steady"]["contamination"]["clean"]["score"] == pytest.approx((50 - len(seen)) / (100 - len(seen)))


def test_summary_and_report_have_it(run: Path, finished: Path) -> None:
    records = items_of(finished / "data")
    keep(run, {name: [measured(run, name, right, records)] for name, right in (("untrained", 10), ("steady", 50), ("chat", 20))})
    summary = Summary.read(run / "summary.json").evaluation
    assert list(summary["stages"]) == ["untrained", "steady", "chat"]
    assert summary["stages"]["chat"]["tasks"]["planted"]["change"]["better"] is False
    assert summary["stages"]["steady"]["tasks"]["planted"]["change"]["against"] == "untrained"
    assert summary["tax"][0]["against"] == "steady"
    assert (run / summary["stages"]["chat"]["tasks"]["planted"]["items"]).is_file()
    assert "items in training data" in (run / "report.html").read_text(encoding="utf-8")


def test_more_tasks_are_added_and_the_same_ones_replaced(run: Path, finished: Path) -> None:
    records = items_of(finished / "data")
    for name, right in (("steady", 10), ("chat", 60)):
        keep(run, {name: [measured(run, name, right, records)]})
        keep(run, {name: [measured(run, name, right, records, "more", limit=20)]})
    summary = Summary.read(run / "summary.json").evaluation["stages"]
    assert {name: list(stage["tasks"]) for name, stage in summary.items()} == {
        name: ["planted", "more"] for name in ("steady", "chat")
    }
    assert summary["chat"]["tasks"]["more"]["n"] == summary["chat"]["tasks"]["more"]["change"]["n"] == 20
    assert summary["chat"]["tasks"]["planted"]["change"]["n"] == 100


def test_a_smaller_limit_does_not_replace_what_more_items_gave(
    run: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = items_of(finished / "data")
    for limit, n in ((40, 40), (20, 40), (60, 60), (None, 100), (20, 100)):
        found = keep(run, {"chat": [measured(run, "chat", 30, records, limit=limit)]})
        assert found["stages"]["chat"]["tasks"]["planted"]["n"] == (limit or 100)
        assert Summary.read(run / "summary.json").evaluation["stages"]["chat"]["tasks"]["planted"]["n"] == n
    assert "(chat: planted: the run's table keeps the score of more items, 0.300)" in capfd.readouterr().err


def test_figures_of_a_stage_that_was_trained_again_are_left_out(run: Path, finished: Path) -> None:
    records = items_of(finished / "data")
    keep(run, {name: [measured(run, name, 50, records)] for name in ("steady", "chat")})
    done = Done.read(run / "chat" / "done.json")
    done.model_copy(update={"fingerprint": "another"}).write(run / "chat" / "done.json")
    assert list(with_kept(run, {"accuracy": 0.5})["stages"]) == ["steady"]
    (run / "results" / "scores.json").unlink()
    assert with_kept(run, {"accuracy": 0.5}) == {"accuracy": 0.5}


def test_training_text_that_is_gone_is_said(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "data")
    assert [stage.stage for stage in trained_on(run, "chat")] == ["steady", "chat"]
    figures = keep(run, {"chat": [measured(run, "chat", 50, items_of(finished / "data"))]})["stages"]["chat"]["tasks"]["planted"]
    assert figures["contamination"]["found"] == 0
    assert set(figures["contamination"]["unknown"]) == {"steady", "chat"}
    assert "training text of steady, chat is not there" in (run / "report.html").read_text(encoding="utf-8")


def test_stages_that_began_elsewhere_or_with_an_earlier_version_say_so(run: Path, finished: Path) -> None:
    done = Done.read(run / "steady" / "done.json")
    done.model_copy(update={"init_from": "/models/other", "data": []}).write(run / "steady" / "done.json")
    figures = keep(run, {"steady": [measured(run, "steady", 50, items_of(finished / "data"))]})["stages"]["steady"]["tasks"][
        "planted"
    ]
    unknown = figures["contamination"]["unknown"]
    assert "steady starts from /models/other" in unknown["/models/other"]
    assert "did not keep where its data was" in unknown["steady"]


def test_the_command_flags_a_set_that_a_run_was_trained_on(place: Place, finished: Path) -> None:
    root, run = place.root, place.run
    (root / "sets").mkdir()
    rows = [
        {"question": record.text, "choices": {"text": ["하늘", "바다"], "label": ["A", "B"]}, "answerKey": "AB"[at % 2]}
        for at, record in enumerate(items_of(finished / "data").values())
    ]
    (root / "sets" / "test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    task = {"name": "planted", "language": "ko", "kind": "choice", "places": [{"adapter": "arc", "path": "sets/test.jsonl"}]}
    (root / "planted.yaml").write_text(json.dumps(task))
    arguments = ("evaluate", run, "--tasks", root / "planted.yaml", "--data", root, "--limit", 80, "--json", root / "out.json")
    code, out, err = place.command(*arguments)
    assert code == 0, err
    figures = json.loads((root / "out.json").read_text())
    assert list(figures["stages"]) == ["untrained", "steady", "chat", "align"]
    found = figures["stages"]["steady"]["tasks"]["planted"]
    assert found["contamination"]["found"] == len(trained_of(run, items_of(finished / "data"))) > 40
    assert (found["n"], found["contamination"]["clean"]["n"]) == (80, 80 - found["contamination"]["found"])
    assert f"steady: planted: {found['contamination']['found']} of 80 items are in its training data" in out
    assert found["change"]["against"] == "untrained"
    assert (root / found["items"]).is_file()
    assert [row["language"] for row in figures["tax"]] == ["ko"]
    again = place.command(*arguments)
    assert again[0] == 0
    assert json.loads((root / "out.json").read_text()) == figures
    assert Summary.read(run / "summary.json").evaluation["stages"]["align"]["tasks"]["planted"]["n"] == 80
    code, out, err = place.command("evaluate", "compare", run / "steady", run / "align")
    assert code == 0, err
    code, out, err = place.command("export", run / "final", root / "exported", "--format", "hf")
    assert code == 0, err
    card = (root / "exported" / "README.md").read_text()
    assert "| planted | ko | " in card
    [bits] = Summary.read(run / "summary.json").evaluation["bits_per_byte"]
    assert f"| prose |  | {bits['models']['align']:.3f} bits/byte (xz -9 {bits['xz']:.3f}" in card


def test_a_task_that_is_called_as_a_measure_of_the_recipe_is_stays_in_the_card(run: Path) -> None:
    summary = Summary.read(run / "summary.json")
    [bits] = summary.evaluation["bits_per_byte"]
    task = {"score": 0.5, "n": 3}
    evaluation = {**summary.evaluation, "stages": {"align": {"tasks": {"prose": task}}}}
    summary.model_copy(update={"evaluation": evaluation}).write(run / "summary.json")
    found = scores_of(run / "final")
    assert found is not None
    assert found["prose"] == task
    assert found["prose, held-out text of the recipe"]["score"] == bits["models"]["align"]


def test_the_same_run_again_keeps_what_was_measured(place: Place, finished: Path) -> None:
    run = place.run
    keep(run, {"chat": [measured(run, "chat", 60, items_of(finished / "data")), measured(run, "chat", 0, {}, "empty")]})
    out = place.again()
    assert "planted" in out
    tasks = Summary.read(run / "summary.json").evaluation["stages"]["chat"]["tasks"]
    assert (tasks["planted"]["score"], tasks["empty"]["score"], tasks["empty"]["n"]) == (0.6, None, 0)
