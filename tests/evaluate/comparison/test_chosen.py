"""Whose results a path stands for."""

from pathlib import Path

import pytest

from keural.errors import UserError
from keural.evaluate.comparison.chosen import results_of
from keural.evaluate.results.records import ItemResult
from keural.evaluate.results.store import Header, ModelIdentity, open_results, results_file


def keep(
    directory: Path, name: str, right: int, task: str = "kobest_copa", prompting: str = "bos", n: int = 20, digest: str = "d" * 64
) -> Path:
    """Results of a model, as an evaluation leaves them."""
    model = ModelIdentity(name, f"weights of {name}", "t", prompting, "", "stored", "transformers")
    header = Header(model, task, "ko", "choice", 0.5, digest, n)
    path = results_file(directory, header)
    with open_results(path, header) as writer:
        writer.append((at, ItemResult(str(at), None, float(at < right), "q", "e", "g", None, 1)) for at in range(n))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, right in (("untrained", 10), ("sft-1", 12), ("dpo-1", 19)):
        keep(tmp_path / "run" / "results", name, right)
    return tmp_path / "run"


def test_a_stage_of_a_run_and_its_directory_of_results_are_the_same(run: Path) -> None:
    stage = results_of(run / "sft-1")
    directory = results_of(next((run / "results").glob("sft-1-*")))
    assert stage.tasks == directory.tasks
    assert [item.score for item in stage.tasks[0].items] == [1.0] * 12 + [0.0] * 8
    assert stage.label == str(run / "sft-1")


def test_the_metrics_of_a_stage_are_no_results(run: Path) -> None:
    (run / "sft-1").mkdir()
    (run / "sft-1" / "metrics.jsonl").write_text("{}\n")
    assert [one.task for one in results_of(run / "sft-1").tasks] == ["kobest_copa"]


def test_a_single_model_needs_no_name(tmp_path: Path) -> None:
    keep(tmp_path / "results", "mine", 3)
    assert results_of(tmp_path).label == results_of(tmp_path / "results").label == "mine"


def test_several_models_must_be_told_apart(run: Path) -> None:
    with pytest.raises(UserError, match=r"several models \(dpo-1, sft-1, untrained\); name one, such as .*run/untrained"):
        results_of(run)
    with pytest.raises(UserError, match=r"several models .* such as .*results/dpo-1-"):
        results_of(run / "results")
    with pytest.raises(UserError, match=r"has no results of 'sft-2'.*did you mean 'sft-1'.*dpo-1, sft-1, untrained"):
        results_of(run / "sft-2")


def test_tasks_that_were_asked_in_several_ways_are_one_models(run: Path) -> None:
    keep(run / "results", "sft-1", 4, task="toy_facts_ko", prompting="chat")
    found = results_of(run / "sft-1")
    assert {one.task for one in found.tasks} == {"toy_facts_ko", "kobest_copa"}
    assert {one.prompting for one in found.asked} == {"bos", "chat"}


def test_results_of_one_task_that_were_made_twice_are_refused(run: Path) -> None:
    keep(run / "results", "sft-1", 4, prompting="chat")
    with pytest.raises(UserError, match=r"more than once on kobest_copa .*results/sft-1-.* and .*results/sft-1-"):
        results_of(run / "sft-1")


def test_where_there_are_none_it_says_so(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        results_of(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no results"):
        results_of(tmp_path / "empty")
    damaged = next((run / "results").glob("sft-1-*/*.jsonl"))
    damaged.write_text(damaged.read_text().replace('"given":"g"', '"given":"h"', 1))
    with pytest.raises(UserError, match="checksum"):
        results_of(run / "sft-1")
