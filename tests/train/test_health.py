"""Steps that are not taken, processes that are stuck, memory and disks that are too small."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keural.errors import UserError
from keural.train.objectives.base import LossTerms
from keural.train.stage import health
from keural.train.stage.health import FEWEST, IN_A_ROW, STUCK, WINDOW, SpikeGuard, Watchdog, check_disk, enough_memory
from keural.train.stage.job import StageJob
from keural.train.stage.metrics import read_metrics
from keural.train.stage.run import StageRun
from keural.train.stage.signals import StopSignals
from tests.helpers.train_small import open_run, small_job

STEPS = 30


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare steps with 12 before them, so that a stage can be short."""
    monkeypatch.setattr(health, "FEWEST", 12)


def weights(run: StageRun) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.trainer.policy.model.state_dict().items()}


def planted(run: StageRun, factors: dict[int, float]) -> StageRun:
    """The stage with the task loss of some steps multiplied by a factor."""
    objective = run.trainer.objective

    def spoiled(logprobs: Any, micro: Any, references: Any) -> LossTerms:
        terms = objective(logprobs, micro, references)
        return replace(terms, loss=terms.loss * factors.get(run.progress.step, 1.0))

    spoiled.denominator, spoiled.uniform = objective.denominator, objective.uniform  # type: ignore[attr-defined]
    run.trainer = replace(run.trainer, objective=spoiled)  # type: ignore[arg-type]
    return run


def job(tmp_path: Path, **train: Any) -> StageJob:
    return small_job(tmp_path, train={"steps": STEPS, "save_every": 10, "keep_checkpoints": 4, **train})


def lines_of(run: StageRun) -> list[dict[str, Any]]:
    return read_metrics(run.job.run_dir / "metrics.jsonl")[0]


def test_a_spike_is_left_out_and_said(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted(open_run(job(tmp_path, skip_spikes=6.0)), {22: 50.0})
    before: list[dict[str, Tensor]] = []
    take = run._advance

    def watched(report: Any) -> None:
        if report.step in (21, 22):
            before.append(weights(run))
        take(report)

    run._advance = watched  # type: ignore[method-assign]
    assert not run.train(StopSignals())
    assert all(torch.equal(before[0][name], before[1][name]) for name in before[0])
    skipped = {line["step"]: line["skipped"] for line in lines_of(run) if "skipped" in line}
    assert list(skipped) == [22]
    assert skipped[22].startswith("loss ")
    assert "step 22 is left out: loss" in capsys.readouterr().err
    assert run.progress.spikes == 1
    assert len(run.progress.last_losses) == 10
    assert max(run.progress.last_losses) < 10


def test_a_batch_that_is_not_a_number_stops_the_stage_and_names_itself(tmp_path: Path) -> None:
    run = planted(open_run(job(tmp_path, skip_spikes=6.0)), {15: math.nan})
    with pytest.raises(UserError) as stopped:
        run.train(StopSignals())
    for part in ("small: loss is nan at step 15", "--step 15", "small.train.steps_to_skip=[15]"):
        assert part in str(stopped.value)


def test_the_step_that_stopped_it_can_be_left_out_and_the_stage_goes_on(tmp_path: Path) -> None:
    spoiled = {15: math.nan}
    with pytest.raises(UserError):
        planted(open_run(job(tmp_path)), spoiled).train(StopSignals())
    run = planted(open_run(job(tmp_path, steps_to_skip=[15])), spoiled)
    assert run.progress.step == 10
    assert not run.train(StopSignals())
    whole = planted(open_run(small_job(tmp_path, run="whole", train={"steps": STEPS, "steps_to_skip": [15]})), spoiled)
    whole.train(StopSignals())
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {line["step"]: line.get("skipped") for line in lines_of(run) if "skipped" in line} == {15: "asked"}


def test_a_step_that_is_done_cannot_be_left_out_any_more(tmp_path: Path) -> None:
    open_run(job(tmp_path)).train(StopSignals())
    with pytest.raises(UserError, match=r"step 29 is done, and train\.steps_to_skip says otherwise"):
        open_run(job(tmp_path, steps_to_skip=[29]))


@pytest.mark.parametrize("precision", ["fp32", "split"])
def test_a_stage_with_spikes_goes_on_bit_for_bit(few: None, tmp_path: Path, precision: str) -> None:
    settings = {"skip_spikes": 4.0, "precision": precision, "save_every": 10, "steps": 24}
    spikes = {16: 30.0, 18: 30.0}
    whole = planted(open_run(small_job(tmp_path, run="whole", train=settings)), spikes)
    whole.train(StopSignals())
    stop = StopSignals()
    first = planted(open_run(small_job(tmp_path, train=settings)), spikes)
    take = first._advance

    def stopping(report: Any) -> None:
        take(report)
        stop.requested = report.step == 17

    first._advance = stopping  # type: ignore[method-assign]
    assert first.train(stop)
    second = planted(open_run(small_job(tmp_path, train=settings)), spikes)
    assert second.progress.step == 18
    assert second.trainer.guard.taken == first.trainer.guard.taken
    second.train(StopSignals())
    assert second.progress.spikes == whole.progress.spikes == 2
    ours, theirs = weights(second), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_spikes_that_do_not_end_stop_the_stage(few: None, tmp_path: Path) -> None:
    run = planted(open_run(job(tmp_path, skip_spikes=6.0)), dict.fromkeys(range(15, STEPS), 50.0))
    with pytest.raises(UserError, match=rf"{IN_A_ROW} steps in a row were spikes, the last one step {15 + IN_A_ROW - 1}"):
        run.train(StopSignals())


def test_what_counts_as_a_spike() -> None:
    guard = SpikeGuard(6.0)
    for step in range(FEWEST):
        assert guard.spike(2.0 + 0.1 * (step % 2), 1.0) is None
    calm = list(guard.taken)
    assert guard.spike(2.5, 1.0) is not None  # 9 standard deviations
    assert guard.spike(2.0, 1.5) == "gradient norm 1.5 where the steps before have 1 ± 0.001"
    assert (guard.in_a_row, guard.taken) == (2, calm)
    assert guard.spike(0.1, 0.1) is None  # lower is no harm
    assert guard.in_a_row == 0
    assert SpikeGuard(None).spike(math.inf, math.inf) is None
    for _ in range(WINDOW):
        guard.spike(2.0, 1.0)
    assert len(guard.taken) == WINDOW
    assert guard.spike(2.0001, 1.0) is None  # figures that do not vary are not left by rounding
    few = SpikeGuard(6.0)
    assert [few.spike(2.0, 1.0) for _ in range(FEWEST - 1)] == [None] * (FEWEST - 1)
    assert few.spike(1e9, 1.0) is None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps_to_skip": [3, 3]}, "each step once"),
        ({"steps_to_skip": [4, 3]}, "must rise"),
        ({"steps_to_skip": [-1]}, "from 0"),
        ({"steps_to_skip": [12]}, "names step 12, and the last of 12 is 11"),
        ({"skip_spikes": 0}, "greater than 0"),
        ({"stuck_after": 1}, "greater than or equal to 10"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_job(tmp_path, train=train)


STUCK_PROGRAM = """
import threading
from keural.train.stage.health import Watchdog
def waiting_for_the_others():
    threading.Event().wait(600)
with Watchdog(1.0, rank=3) as watchdog:
    watchdog.sign("step 7 of sft-1")
    waiting_for_the_others()
"""


def test_a_stuck_process_ends_and_says_where_it_was() -> None:
    ended = subprocess.run([sys.executable, "-c", STUCK_PROGRAM], capture_output=True, text=True, timeout=280, check=False)
    assert (ended.returncode, ended.stdout) == (STUCK, "")
    assert "rank 3 is stuck: nothing happened for 1 s in step 7 of sft-1" in ended.stderr
    assert "waiting_for_the_others" in ended.stderr


class Ended(Exception):
    """A watchdog has ended the process."""


class Looks:
    """The time between a watchdog's looks: how long each took, and whether there was a sign of life; then the block ends."""

    def __init__(self, watchdog: Watchdog, *looks: tuple[float, bool]) -> None:
        self._watchdog, self._looks, self.now = watchdog, iter(looks), 0.0

    def wait(self, pause: float) -> bool:
        """As an event's."""
        longer, signs = next(self._looks, (None, False))
        if longer is None:
            return True
        self.now += pause + longer
        if signs:
            self._watchdog.sign("step 8")
        return False


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a watchdog of 8 seconds, which looks every two, see what is given."""

    def end(self: Watchdog) -> None:
        raise Ended

    def run(*looks: tuple[float, bool]) -> None:
        watchdog: Any = Watchdog(8.0, rank=0)
        watchdog._over = Looks(watchdog, *looks)
        monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: watchdog._over.now))
        watchdog._watch()

    monkeypatch.setattr(Watchdog, "_end", end)
    return run


def test_silence_ends_a_process_when_it_is_longer_than_is_allowed(watch: Callable[..., None]) -> None:
    watch(*[(0.0, False)] * 4)
    with pytest.raises(Ended):
        watch(*[(0.0, False)] * 5)


def test_a_process_that_gives_signs_of_life_is_left_alone(watch: Callable[..., None]) -> None:
    watch(*[(0.0, number % 4 == 0) for number in range(100)])


def test_a_process_that_was_suspended_was_not_stuck(watch: Callable[..., None]) -> None:
    watch((0.0, False), (3600.0, False), (0.0, False), (0.0, True), (0.0, False))


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_bytes, asked = [], health.free_bytes
    monkeypatch.setattr(health, "free_bytes", lambda directory: 10_000)
    run = open_run(small_job(tmp_path, train={"keep_checkpoints": 2}))
    with pytest.raises(UserError, match=r"0\.0 GB are free, and small will write up to"):
        run.train(StopSignals())
    assert not (run.job.run_dir / "metrics.jsonl").exists()
    monkeypatch.setattr(health, "free_bytes", asked)
    run.train(StopSignals())
    for path in (run.job.run_dir / "checkpoints").iterdir():
        checkpoint_bytes.append(sum(file.stat().st_size for file in path.glob("*.safetensors")))
    expected = []
    monkeypatch.setattr("keural.train.stage.run.check_disk", lambda *given: expected.append(given[2]))
    run._check_disk()
    assert max(checkpoint_bytes) == pytest.approx(expected[0], rel=0.1)


@pytest.mark.parametrize(("there", "needed"), [(0, 410), (1, 310), (3, 210), (9, 110)])
def test_checkpoints_that_are_there_need_no_room(tmp_path: Path, there: int, needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "free_bytes", lambda directory: needed)
    check_disk(tmp_path, "s", 100, 3 if there < 3 else 4, there, 10)
    monkeypatch.setattr(health, "free_bytes", lambda directory: needed - 1)
    with pytest.raises(UserError, match="will write"):
        check_disk(tmp_path, "s", 100, 3 if there < 3 else 4, there, 10)


def test_free_space_is_that_of_the_place_that_will_be(tmp_path: Path) -> None:
    assert health.free_bytes(tmp_path / "a" / "b") > 0


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def out_of_host_memory() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("fail", [out_of_device_memory, out_of_host_memory])
def test_memory_that_runs_out_is_one_line_that_helps(fail: Callable[[], None]) -> None:
    with (
        pytest.raises(UserError, match=r"(?s)^sft-1: memory ran out in step 3 \([^\n]*train.recompute: full"),
        enough_memory("sft-1", "step 3"),
    ):
        fail()


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), enough_memory("sft-1", "step 3"):
        raise RuntimeError("shape '[3]' is invalid")


def test_steps_left_out_stand_in_the_metrics_without_figures(tmp_path: Path) -> None:
    run = open_run(small_job(tmp_path, train={"steps_to_skip": [0, 5]}))
    run.train(StopSignals())
    lines = {line["step"]: line for line in lines_of(run) if "heldout" not in line}
    assert sorted(lines) == list(range(12))
    assert "loss" not in lines[5]
    assert json.loads(json.dumps(lines[5]))["skipped"] == "asked"
    assert lines[6]["tokens"] > lines[5]["tokens"] == lines[4]["tokens"]
