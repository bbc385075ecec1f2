"""A run whose stages train adapters: every stage leaves an adapter and a whole model, and the next one starts from the model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keural.lora.directory import open_adapter
from keural.lora.merge import weights_digest
from keural.pretrained.lineage import read_record
from keural.pretrained.stored_model import load_model, open_network
from tests.pipeline.conftest import Place, keural_run

pytest.importorskip("peft", reason="adapters are trained through PEFT: pip install 'keural[lora]'")

Keural = Callable[..., tuple[int, str, str]]
LORA = ("chat.lora.rank=4", "align.lora.targets=[attention,router]")


@pytest.fixture(scope="module")
def adapted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with two stages of adapters. Do not change it."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    keural_run(finished / "recipe", *LORA, "--out", run)
    return run


def test_the_next_stage_starts_from_the_merged_model(adapted: Path) -> None:
    chat, align = open_adapter(adapted / "chat"), open_adapter(adapted / "align")
    assert chat.base_digest == weights_digest(open_network(adapted / "steady").weights)
    assert align.base_digest == weights_digest(open_network(adapted / "chat").weights)
    assert chat.names == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    assert align.names == ("q_proj", "k_proj", "v_proj", "o_proj", "gate")
    for stage, chain in (("chat", ["steady", "chat"]), ("align", ["steady", "chat", "align"])):
        for directory in (adapted / stage / "adapter", adapted / stage / "model"):
            record = read_record(directory)
            assert (record["chain"], record["stage"]) == (chain, stage)
            assert record["adapter"]["base"]
    done = json.loads((adapted / "chat" / "done.json").read_text())
    assert 0 < done["trained"] < sum(value.numel() for value in load_model(adapted / "chat").parameters()) / 4
    assert "trained parameters" in (adapted / "report.html").read_text()


def test_merge_makes_the_stages_model_again(adapted: Path, keural: Keural, tmp_path: Path) -> None:
    code, said, err = keural("merge", adapted / "align", "--to", tmp_path / "merged")
    assert code == 0, err
    assert "in its base, float32" in said
    made, expected = load_model(tmp_path / "merged").state_dict(), load_model(adapted / "align").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
    code, said, err = keural("generate", tmp_path / "merged", "--prompt", "하늘", "--max-new-tokens", "2")
    assert code == 0, err


def test_an_export_of_the_base_is_the_base(adapted: Path, keural: Keural, tmp_path: Path) -> None:
    for name, exported in (("hf", True), ("granite", False)):
        code, _, err = keural("export", adapted / "steady", tmp_path / name, "--format", name)
        assert code == 0, err
        code, _, err = keural("merge", adapted / "chat", "--to", tmp_path / "new", "--base", tmp_path / name)
        assert (code == 0) is exported, err
        shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_a_finished_stage_is_skipped_and_a_killed_one_goes_on(
    adapted: Path, finished: Path, keural: Keural, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted, run, symlinks=True)
    for name in ("model", "adapter"):
        shutil.rmtree(run / "align" / name)
    (run / "align" / "done.json").unlink()
    code, said, err = keural("run", finished / "recipe", *LORA, "--out", run)
    assert code == 0, err
    assert "chat: finished already, skipped" in said
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (run / "align" / name).read_bytes() == (adapted / "align" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{chat}", "--to", "{new}", "--base", "{chat}/model"], "is not the model that"),
        (["{chat}", "--to", "{chat}"], "exists and is not empty"),
        (["{chat}", "--to", "{new}", "--dtype", "int8"], "--dtype int8: unknown"),
        (["{steady}", "--to", "{new}"], "is a stage of a run; its model is .* \\(not an adapter"),
        (["{steady}/none", "--to", "{new}"], "no such directory; give an adapter directory"),
        (["{chat}", "--to", "{new}", "--base", "{new}"], "no such directory"),
    ],
)
def test_what_cannot_be_merged_is_one_line(
    adapted: Path, keural: Keural, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    places = {"chat": adapted / "chat", "steady": adapted / "steady", "new": tmp_path / "new"}
    code, _, err = keural("merge", *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert err.count("\n") == 1, err
    assert re.search(reason, err), err
    assert not (tmp_path / "new").exists()


def test_an_adapter_whose_base_was_moved_asks_for_it(adapted: Path, keural: Keural, tmp_path: Path) -> None:
    shutil.copytree(adapted, tmp_path / "moved", symlinks=True)
    config = tmp_path / "moved" / "chat" / "adapter" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(adapted / "steady" / "model")
    shutil.move(tmp_path / "moved" / "steady", tmp_path / "elsewhere")
    code, _, err = keural(
        "merge", tmp_path / "moved" / "chat", "--to", tmp_path / "new", "--base", tmp_path / "elsewhere" / "model"
    )
    assert code == 0, err


def test_without_peft_the_recipe_is_refused_before_anything_is_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keural.pipeline.workspace.find_spec", lambda name: None)
    line = place.refused("chat.lora.rank=4", out=place.root / "new")
    assert "lora needs the peft package" in line
    assert not (place.root / "new").exists()


def test_settings_of_adapters_come_from_the_command_line_too(place: Place) -> None:
    assert "lora adapts a model" in place.refused("steady.lora.rank=4")
    assert "unknown key" in place.refused("chat.lora.dropout=0.1")
