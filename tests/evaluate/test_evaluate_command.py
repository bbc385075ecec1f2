"""`keural evaluate` as it is typed: a model, a run with its stages, figures for programs, and everything that is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from keural.evaluate.results.store import find_results, read_results
from keural.files import sha256_file, write_checked_text
from keural.pipeline.run_directory import FORMAT, Done, RunMarker
from tests.conftest import Keural
from tests.helpers.small_sets import write_copa, write_mmlu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    write_copa(directory, 8)
    write_mmlu(directory, 8)
    return directory


@pytest.fixture
def run(model_dir: Path, tmp_path: Path) -> Path:
    """A run of two finished stages and one that is not; the first is of documents alone."""
    out = tmp_path / "run"
    stages = [("pretrain-1", "random", "next_token"), ("sft-1", "pretrain-1", "sft"), ("dpo-1", "sft-1", "dpo")]
    RunMarker(format=FORMAT, keural="0").write(out / "run.json")
    listed = [{"name": name, "init_from": start} for name, start, _ in stages]
    write_checked_text(out / "recipe.yaml", yaml.safe_dump({"recipe": {"seed": 7}, "stages": listed}))
    for name, start, objective in stages[:2]:
        shutil.copytree(model_dir, out / name / "model")
        Done(
            name=name, objective=objective, init_from=start, fingerprint=name, init="", seconds=1, tokens=1, steps=1, loss_first=1,
            loss_last=1, heldout={},
        ).write(out / name / "done.json")  # fmt: skip
    return out


def test_a_model_is_measured_and_its_items_are_kept(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    asked = ("evaluate", model_dir, "--data", data, "--results", tmp_path / "kept", "--json", tmp_path / "out" / "figures.json")

    code, out, err = keural(*asked)

    assert code == 0, err
    assert "kobest_copa" in out
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert set(figures["tasks"]) == {"kobest_copa", "mmlu"}
    copa = figures["tasks"]["kobest_copa"]
    assert copa["n"] == 8
    assert copa["chance"] == 0.5
    assert copa["low"] <= copa["score"] <= copa["high"]
    items = read_results(tmp_path / "out" / copa["items"]).results().items
    assert sum(item.score for item in items) / 8 == copa["score"]


def test_a_run_is_measured_stage_by_stage_from_the_untrained_network_on(keural: Keural, run: Path, data: Path) -> None:
    code, _, err = keural("evaluate", run, "--data", data, "--tasks", "ko", "--limit", 3, "--json", run / "figures.json")

    assert code == 0, err
    figures = json.loads((run / "figures.json").read_text())["stages"]
    assert list(figures) == ["untrained", "pretrain-1", "sft-1"]
    assert {tasks["tasks"]["kobest_copa"]["n"] for tasks in figures.values()} == {3}
    # The stages' models are the same files here, so their results are the same file.
    assert [path.parents[1] for path in find_results(run / "results")] == [run / "results"] * 2


def test_a_model_of_a_run_shares_the_runs_results(keural: Keural, run: Path, data: Path) -> None:
    keural("evaluate", run, "--data", data, "--tasks", "kobest_copa")
    before = {path: path.read_bytes() for path in find_results(run / "results")}

    code, out, _ = keural("evaluate", run / "sft-1", "--data", data, "--tasks", "kobest_copa")

    assert code == 0
    assert str(run / "results") in out.replace("\n", "")
    assert {path: path.read_bytes() for path in find_results(run / "results")} == before


def test_only_stages_that_know_chats_are_asked_in_one(keural: Keural, run: Path, data: Path) -> None:
    record = run / "pretrain-1" / "model" / "keural.json"
    record.unlink()
    (run / "pretrain-1" / "model" / "chat_template.jinja").unlink()

    code, _, err = keural("evaluate", run, "--data", data, "--tasks", "ko", "--limit", 2, "--chat", "--json", run / "figures.json")

    assert code == 0, err
    assert "pretrain-1: has no chat template" in err
    assert list(json.loads((run / "figures.json").read_text())["stages"]) == ["sft-1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "give a model directory or a run directory"),
        (("nowhere",), "nowhere: no such directory"),
        (("MODEL", "--tasks", "kobest_cop"), "did you mean 'kobest_copa'?"),
        (("MODEL", "--tasks", "kmmlu"), "hf download --repo-type dataset HAERAE-HUB/KMMLU --local-dir"),
        (("MODEL", "--tasks", "kobest_boolq"), "keural data fetch evaluation"),
        (("MODEL", "--engine", "llama.cpp"), "--engine llama.cpp"),
        (("MODEL", "--limit", "0"), "--limit"),
        (("MODEL", "--tasks", ",,"), "an empty name"),
        (("MODEL", "--harness", ","), "--harness ,: an empty name"),
        (("MODEL", "--tasks", "x" * 5000), "unknown task"),
        (("MODEL", "--shots", "-1"), "--shots"),
        (("MODEL", "--tasks", "kobest_copa", "--shots", "3"), "examples is not in"),
        (("MODEL", "--dtype", "float8"), "--dtype"),
        (("MODEL", "--chat", "--no-bos"), "--no-bos is for texts"),
        (("MODEL", "--json", "DATA"), "is a directory"),
        (("MODEL", "--json", "/dev/stdout"), "is a link, a pipe or a device"),
        (("MODEL", "--tasks", "/dev/zero"), "/dev/zero: cannot be read (a pipe or a device, not a file)"),
        (("MODEL", "--data", "nowhere"), "nowhere: no such directory"),
        (("MODEL", "--data", __file__), "is no directory"),
        (("MODEL", "--data", __file__, "--tasks", "kobest_copa"), "is no directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    keural: Keural, model_dir: Path, data: Path, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    named = {"MODEL": str(model_dir), "DATA": str(data)}
    where = () if "--data" in given else ("--data", data)

    code, _, err = keural("evaluate", *(named.get(part, part) for part in given), *where, "--results", tmp_path / "results")

    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_damaged_results_are_refused_by_line_and_stay(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    asked = ("evaluate", model_dir, "--data", data, "--tasks", "kobest_copa", "--results", tmp_path)
    keural(*asked)
    (file,) = find_results(tmp_path)
    damaged = file.read_bytes().replace(b'"score":', b'"skore":', 1)
    file.write_bytes(damaged)

    code, _, err = keural(*asked)

    assert code == 2
    assert f"{file}:2: damaged" in err
    assert file.read_bytes() == damaged


def test_a_base_model_is_not_asked_in_a_chat(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(model_dir, copied)
    (copied / "keural.json").unlink()
    (copied / "chat_template.jinja").unlink()

    code, _, err = keural("evaluate", copied, "--data", data, "--tasks", "ko", "--chat")

    assert code == 2
    assert "has no chat template" in err


def test_replaced_weights_have_no_results_of_the_ones_before(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    copied, kept = tmp_path / "model", tmp_path / "kept"
    shutil.copytree(model_dir, copied)
    asked = ("evaluate", copied, "--data", data, "--tasks", "kobest_copa", "--results", kept)
    assert keural(*asked)[0] == keural(*asked)[0] == 0
    weights = max(copied.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    code, out, err = keural(*asked)

    assert (code, out) == (2, "")
    assert f"{weights}: does not match its checksum" in err
    (copied / "keural.json").unlink()
    assert keural(*asked)[0] == 0
    assert len(find_results(kept)) == 2


def test_models_are_compared_by_their_directories(keural: Keural, model_dir: Path, data: Path, tmp_path: Path) -> None:
    kept, renamed, other = tmp_path / "kept", tmp_path / "renamed", tmp_path / "other"
    shutil.copytree(model_dir, renamed)
    shutil.copytree(model_dir, other)
    read = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(read | {"rms_norm_eps": 2e-5}))
    (other / "keural.json").unlink()
    asked = ("--data", data, "--tasks", "kobest_copa", "--results", kept)
    assert keural("evaluate", model_dir, *asked)[0] == 0
    assert f"{other}: {kept} has no results of this model" in keural("evaluate", "compare", renamed, other, "--results", kept)[2]
    assert keural("evaluate", other, *asked)[0] == 0

    code, out, _ = keural("evaluate", "compare", renamed, other, "--results", kept)

    assert code == 0
    assert f"A: {renamed}\nB: {other}" in out
    assert "kobest_copa" in out
    assert "has no results of this model" in keural("evaluate", "compare", renamed, other)[2]
    found = next(kept.glob("*/"))
    assert "is for models" in keural("evaluate", "compare", found, found, "--results", kept)[2]


def test_checksums_of_weights_are_remembered_until_a_file_changes(
    keural: Keural, model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, read = tmp_path / "model", list[str]()
    shutil.copytree(model_dir, copied)
    weights = max(copied.glob("*.safetensors"))
    monkeypatch.setattr("keural.files.SETTLED_NS", -1_000_000_000)
    monkeypatch.setattr("keural.files.sha256_file", lambda path: (read.append(path.name), sha256_file(path))[1])
    asked = ("evaluate", copied, "--data", data, "--tasks", "kobest_copa", "--limit", "2", "--results", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    assert keural(*asked)[0] == keural(*asked)[0] == 0
    assert read.count(weights.name) == 1

    os.utime(weights, ns=(1, 1))

    assert keural(*asked)[0] == 0
    assert read.count(weights.name) == 2


def test_tasks_are_listed(keural: Keural, data: Path) -> None:
    code, out, _ = keural("evaluate", "--list", "--data", data)

    assert code == 0
    assert "kobest_copa" in out
    assert "there" in out
    assert "needs none" in next(line for line in out.splitlines() if "ko_instructions" in line)
    code, out, err = keural("evaluate", "--list", "--data", data / "nowhere")
    assert (code, out) == (2, "")
    assert f"{data / 'nowhere'}: no such directory" in err
