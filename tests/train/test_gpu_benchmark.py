"""The check for an accelerator runs whole on a CPU with small shapes."""

import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts.align import CASES, lengths_of, stage_of
from benchmarks.gpu_parts.bench import REAL
from benchmarks.gpu_parts.command import PARTS, main
from benchmarks.gpu_parts.toy import ENDING, TOY, toy
from keural.recipe import load_recipe
from keural.recipe.shipped import SHIPPED

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize("mode", TOY)
def test_the_toy_recipe_takes_the_settings_that_it_is_tried_with(mode: str) -> None:
    load_recipe(SHIPPED / "toy", TOY[mode])


REAL_BENCH: Any = SimpleNamespace(size=REAL, small=False, cuda=False)


def test_what_is_timed_of_alignment_is_as_long_as_the_published_data() -> None:
    conversations, pairs = lengths_of(REAL_BENCH, "sft"), lengths_of(REAL_BENCH, "dpo")
    assert conversations.mean() == pytest.approx(621, rel=0.03)  # a little less: what is longer than a row is cut
    assert (conversations.max(), pairs.max()) == (4096, 1024)
    assert pairs.mean() == pytest.approx(500, rel=0.01)
    assert {*lengths_of(REAL_BENCH, "dpo_longest").ravel().tolist()} == {1024}


@pytest.mark.parametrize("case", CASES)
def test_alignment_is_timed_with_the_recipes_own_settings_for_a_card(case: str) -> None:
    stage = stage_of(REAL_BENCH, case)
    recipe = load_recipe(SHIPPED / "keural-14b-h100", ["data=."]).stage(stage.name)
    assert stage.router.load == "lagged"  # else every forward pass runs twice
    for name in ("precision", "recompute", "compile", "micro_batch_tokens", "clip_norm", "betas"):
        assert getattr(stage.train, name) == getattr(recipe.train, name)
    assert stage.data.sequence_length == (4096 if case == "sft" else 1024)


def test_a_part_that_there_is_not_is_refused_before_earlier_results_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    out.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "check,nix", "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        main("")
    assert "'nix': no such part; there are check, " in capsys.readouterr().err
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--small", "--out", "nowhere/gpu.json"], "--out: nowhere/gpu.json: cannot be written (No such file or directory)"),
        (["--small", "--out", "."], "--out: .: cannot be written"),
        (["--small", "--seconds", "nan"], "--seconds: nan: is no time"),
        pytest.param(
            [],
            "torch finds no CUDA device here; --small",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
    ],
)
def test_what_could_give_no_figures_is_refused_before_a_part_is_run(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "toy", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main("")
    assert said in capsys.readouterr().err


def test_a_command_of_a_part_ends_before_the_part_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on beside the parts after it."""
    given: list[float] = []

    def run(command: list[str], *, timeout: float, **_: Any) -> None:
        given.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    deadline = time.monotonic() + 30
    bench: Any = SimpleNamespace(small=True, deadline=deadline, guarded=lambda *_: contextlib.suppress(subprocess.TimeoutExpired))
    toy(bench)
    assert len(given) == 2
    assert all(0 < seconds <= 30 - ENDING for seconds in given)


@pytest.mark.slow
def test_every_part_runs_small_and_finds_the_engine_right(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    subprocess.run([sys.executable, str(BENCHMARK), "--small", "--seconds", "1200", "--out", str(out)], check=True, timeout=1300)
    found = json.loads(out.read_text())
    assert list(found) == list(PARTS)
    failed = {
        f"{part}/{name}": values["error"]
        for part, results in found.items()
        for name, values in results.items()
        if "error" in values
    }
    assert failed == {}
    check = found["check"]
    assert check["engine_float32"]["to_float64"] < 1e-5
    assert check["engine_bfloat16_selective_compiled"]["ratio_to_plain"] < 2
    assert check["split"]["same_bits_as_float32"] is True
    assert max(check["experts_of_any_rows"].values()) < 0.05
    assert check["muon"]["to_cpu"] == 0
    assert all(check[f"discipline_{mode}"]["waiting_operations"] == 0 for mode in ("none", "selective", "full"))
    assert found["align"]["dpo"]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # references are the policy's own values
    assert all(found["align"][case]["same_loss_again"] for case in CASES)
    assert all(found["align"][case]["layers_4"]["update_s"] > 0 for case in CASES)
    assert max(found["serve"]["equal"][name] for name in ("graphs_to_float64", "graphs_to_plain")) < 1e-5
    assert [found["toy"][mode]["exit_code"] for mode in ("fp32", "split")] == [0, 0]
