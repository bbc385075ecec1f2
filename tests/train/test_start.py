"""What a stage starts from, what it refuses before the first step, and what it tells while it runs."""

import contextlib
import dataclasses
import math
import os
import pty
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keural.errors import UserError
from keural.train.initial.weights import initial_model
from keural.train.stage.metrics import keep_until, line_text
from tests.helpers.train_small import losses_of, open_run, random_model, small_config, small_job, step_gradients, train_stage

CPU = torch.device("cpu")


def test_random_weights_follow_from_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (
        initial_model(small_config(), None, seed, CPU, compiled=False, tokenizer_sha="").state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_model_directory_in_bfloat16_becomes_float32_master_weights(tmp_path: Path) -> None:
    model = random_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    loaded = initial_model(small_config(), tmp_path / "model", 0, CPU, compiled=False, tokenizer_sha="")
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float()), name


@pytest.mark.parametrize("damage", ["missing tensor", "truncated", "no directory"])
def test_an_incomplete_model_directory_is_refused(tmp_path: Path, damage: str) -> None:
    job = small_job(tmp_path, "sft")
    assert job.init is not None
    weights = job.init / "model.safetensors"
    if damage == "missing tensor":
        tensors = load_file(weights)
        tensors.pop("model.norm.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        shutil.rmtree(job.init)
    with pytest.raises(UserError) as error:
        train_stage(job)
    assert str(job.init) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (job.run_dir / "checkpoints").exists()


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        train_stage(dataclasses.replace(small_job(tmp_path), tokenizer_sha="1" * 64))


def test_a_store_of_another_kind_is_refused(tmp_path: Path) -> None:
    pairs = small_job(tmp_path, "dpo").train_store
    with pytest.raises(UserError, match="holds pairs; objective sft needs conversations"):
        train_stage(dataclasses.replace(small_job(tmp_path, "sft"), train_store=pairs))


def test_diverging_training_stops_with_the_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    job = small_job(tmp_path, train={"lr": 1e30, "min_lr": 0.0, "warmup_steps": 0, "save_every": 1, "weight_decay": 0.0})
    with pytest.raises(UserError, match=r"small: \w+ is (nan|inf) at step 1; .*--step 1"):
        train_stage(job)
    assert [path.name for path in (job.run_dir / "checkpoints").iterdir()] == ["step-00000001"]


def test_tensorboard_events_are_written_when_asked_for(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = small_job(tmp_path, heldout=True, boards=("tensorboard",))
    train_stage(job)
    events = reader.EventAccumulator(str(job.run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(12))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses_of(job))
    assert "heldout/loss" in events.Tags()["scalars"]


def test_weights_and_biases_gets_each_step_and_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own counter ignores steps that come again after a restart, so figures carry the step they are of."""
    runs: list[dict[str, Any]] = []

    class Run:
        def __init__(self, **settings: Any) -> None:
            runs.append({"settings": settings, "logged": [], "metrics": []})

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            runs[-1]["metrics"].append((name, step_metric))

        def log(self, figures: dict[str, float]) -> None:
            runs[-1]["logged"].append(figures)

        def finish(self) -> None:
            runs[-1]["finished"] = True

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))
    job = small_job(tmp_path, heldout=True, boards=("wandb",))
    train_stage(job)
    train_stage(job)
    first, second = runs

    assert first["settings"]["id"] == second["settings"]["id"]
    assert first["settings"]["resume"] == "allow"
    assert first["metrics"] == [("step", None), ("*", "step")]
    steps = [figures for figures in first["logged"] if "loss" in figures]
    assert [figures["step"] for figures in steps] == list(range(12))
    assert [figures["loss"] for figures in steps] == pytest.approx(losses_of(job))
    assert "heldout/loss" in first["logged"][-1]
    assert first["finished"]


@pytest.mark.slow
def test_weights_and_biases_itself_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = small_job(tmp_path, heldout=True, boards=("wandb",))
    train_stage(job)
    assert list(job.run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def test_weights_and_biases_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"cannot be reached \(api_key not configured \(no-tty\)\.\); log in .*WANDB_MODE=offline"):
        train_stage(small_job(tmp_path, boards=("wandb",)))


def test_tensorboard_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"keural\[tensorboard\]"):
        train_stage(small_job(tmp_path, boards=("tensorboard",)))


def test_plain_lines_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_stage(small_job(tmp_path, heldout=True))
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("small: step 12/12 loss ") and line.endswith("left") for line in lines)
    assert any(line.startswith("small: held-out loss ") for line in lines)


def test_a_bar_with_the_time_left_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()

    def watch() -> None:
        with contextlib.suppress(OSError):  # the terminal's end
            while data := os.read(ours, 4096):
                shown.extend(data)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train_stage(small_job(tmp_path))
    watcher.join()
    os.close(ours)
    assert b"12/12" in shown
    assert b"tok/s" in shown


def test_metrics_are_cut_back_to_a_step_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line_text(line) for line in ({"step": 0}, {"step": 1}, {"step": 1, "heldout": {}}, {"step": 2})]
    path.write_text("".join([*lines, '{"ste']))
    keep_until(path, 2)
    assert path.read_text() == "".join(lines[:3])
    keep_until(path, 0)
    assert path.read_text() == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_layers_are_one_graph_each_part_and_give_the_same_gradients(tmp_path: Path, recompute: str) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    train = {"micro_batch_tokens": 128, "recompute": recompute}
    plain = open_run(small_job(tmp_path, "dpo", run="plain", train=train)).trainer
    fast = open_run(small_job(tmp_path, "dpo", run="fast", train=train | {"compile": True}))
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["graph_break"]
    torch.testing.assert_close(step_gradients(fast.trainer), step_gradients(plain), atol=1e-5, rtol=1e-4)
    train_stage(fast.job)
    assert losses_of(fast.job)[0] == pytest.approx(math.log(2), abs=1e-7)
