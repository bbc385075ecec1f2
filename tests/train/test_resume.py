"""Stopped at any moment and started again, a stage ends with the weights of an uninterrupted run, bit for bit."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keural.train.stage import run
from keural.train.stage.item_losses import AFTER, BEFORE
from tests.helpers.train_small import (
    calling_before_each_step,
    kill_before_step,
    losses_of,
    metrics_of,
    small_job,
    start,
    train_stage,
    weights_of,
)

STEPS = 12
SETTINGS: dict[str, Any] = {"train": {"steps": STEPS, "save_every": 2, "evaluate_every": 5}, "heldout": True}


def finish_and_compare(directory: Path, objective: str) -> None:
    """Train the rest, and everything anew in another run directory; both must be the same."""
    job = small_job(directory, objective, **SETTINGS)
    weights = weights_of(train_stage(job))
    uninterrupted = small_job(directory, objective, run="uninterrupted", **SETTINGS)
    expected = weights_of(train_stage(uninterrupted))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert losses_of(job) == losses_of(uninterrupted)
    assert [line["step"] for line in metrics_of(job)] == [line["step"] for line in metrics_of(uninterrupted)]
    assert metrics_of(job)[-1]["heldout"] == metrics_of(uninterrupted)[-1]["heldout"]
    for name in (BEFORE, AFTER) if objective == "sft" else ():
        assert (job.run_dir / name).read_bytes() == (uninterrupted.run_dir / name).read_bytes()


@pytest.mark.parametrize("objective", ["next_token", pytest.param("sft", marks=pytest.mark.slow), "dpo", "kto"])
def test_kill_9_then_the_same_command_gives_bit_identical_weights(tmp_path: Path, objective: str) -> None:
    kill_before_step(tmp_path, 5, {"objective": objective, **SETTINGS})
    finish_and_compare(tmp_path, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
def test_kill_9_at_many_random_moments(tmp_path: Path, objective: str) -> None:
    moments = random.Random(5)
    small_job(tmp_path, objective)
    for _ in range(20):
        process = start({"directory": str(tmp_path), "objective": objective, "pause": 0.05, **SETTINGS})
        time.sleep(moments.uniform(0.02, 1.2))
        process.kill()
        process.join()
    finish_and_compare(tmp_path, objective)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    job = small_job(tmp_path, **SETTINGS)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who started the tests may have asked for it to be ignored
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with calling_before_each_step(lambda step: os.kill(os.getpid(), number) if step == 6 else None):
        result = train_stage(job)
    assert result.interrupted
    assert result.steps == len(losses_of(job)) == 7
    assert (job.run_dir / "checkpoints" / "step-00000007" / "manifest.json").is_file()
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    finish_and_compare(tmp_path, "next_token")


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with calling_before_each_step(lambda step: os.kill(os.getpid(), signal.SIGHUP)):
            assert not train_stage(small_job(tmp_path, **SETTINGS)).interrupted
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class TestCheckpointsByTheClock:
    """Without `save_every`."""

    @pytest.fixture(autouse=True)
    def every_step_is_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(run, "SAVE_SHARE", float("inf"))

    def test_what_was_done_when_the_process_ended_is_kept_bit_for_bit(self, tmp_path: Path) -> None:
        class Ended(BaseException):
            pass

        def end(step: int) -> None:
            if step == 7:
                raise Ended

        clock = {**SETTINGS, "train": {**SETTINGS["train"], "save_every": None}}
        job = small_job(tmp_path, **clock)
        with calling_before_each_step(end), pytest.raises(Ended):
            train_stage(job)
        (kept,) = (job.run_dir / "checkpoints").iterdir()
        assert 1 <= int(kept.name.removeprefix("step-")) <= 7, "which one: none is begun while the one before is written"
        weights = weights_of(train_stage(job))
        expected = weights_of(train_stage(small_job(tmp_path, run="uninterrupted", **SETTINGS)))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)

    def test_steps_that_are_given_are_kept_to(self, tmp_path: Path) -> None:
        job = small_job(tmp_path, train={"steps": 6, "save_every": 4, "keep_checkpoints": 9})
        train_stage(job)
        assert sorted(path.name for path in (job.run_dir / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now))
    pause = run.Pause()
    for cost, expected in ((0.0, 600), (3.0, 600), (60.0, 1200)):
        pause.begin(cost)
        begun = now
        now = begun + expected - 1
        assert not pause.over()
        now = begun + expected
        assert pause.over()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def interrupt_twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel test workers ignore the signal
    try:
        with calling_before_each_step(interrupt_twice), pytest.raises(KeyboardInterrupt):
            train_stage(small_job(tmp_path, **SETTINGS))
    finally:
        signal.signal(signal.SIGINT, before)


def test_seconds_and_tokens_add_up_over_restarts(tmp_path: Path) -> None:
    job = small_job(tmp_path, train={"steps": 12, "save_every": 4, "keep_checkpoints": 9})
    whole = train_stage(job)
    for step in (8, 12):
        shutil.rmtree(job.run_dir / "checkpoints" / f"step-{step:08d}")
    seconds_at_4 = metrics_of(job)[3]["seconds"]
    resumed = train_stage(job)
    assert resumed.tokens == whole.tokens
    assert resumed.seconds > seconds_at_4
    assert [line["seconds"] for line in metrics_of(job)] == sorted(line["seconds"] for line in metrics_of(job))
    assert (resumed.loss_first, resumed.loss_last) == (whole.loss_first, whole.loss_last)
