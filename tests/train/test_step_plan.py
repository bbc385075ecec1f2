"""The number of steps: given, from epochs, or from a time budget, and never changed afterwards."""

import dataclasses
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_pre_hook

from keural.errors import UserError
from keural.files import read_json
from keural.train.micro_batches import MicroBatch
from keural.train.network.policy import Policy
from keural.train.stage import run, step_plan, training
from keural.train.stage.job import StageJob
from keural.train.stage.step_plan import RESERVE, Costs, PlanFile, StepPlan, bounded_plan, budget_plan
from tests.helpers.train_small import calling_before_each_step, losses_of, metrics_of, small_job, small_stage, train_stage

BUDGET = {"steps": None, "budget_share": 0.5}


def test_epochs_become_steps_rounded_up(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=10, train={"steps": None, "epochs": 1.5})
    assert train_stage(job).steps == 4  # 15 pairs, 4 in a step


def test_epochs_shorter_than_the_warm_up_are_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=4, train={"steps": None, "epochs": 1})
    with pytest.raises(UserError, match=r"1 steps, not more than train\.warmup_steps 2"):
        train_stage(job)


@given(
    seconds=st.floats(0.1, 1e4),
    step=st.floats(1e-3, 10),
    evaluation=st.floats(0, 20),
    every=st.none() | st.integers(1, 50),
    epoch=st.integers(1, 1000),
    dpo=st.booleans(),
)
def test_a_budget_plan_fits_and_one_step_more_would_not(
    seconds: float, step: float, evaluation: float, every: int | None, epoch: int, dpo: bool
) -> None:
    stage = small_stage("dpo" if dpo else "sft", train=BUDGET | {"evaluate_every": every})
    costs = Costs(step=step, forward=step / 3, evaluation=evaluation)
    plan = budget_plan(stage, seconds, costs, epoch)

    def needed(steps: int) -> float:
        evaluations = 2 + (steps / every if every else 0)  # of pairs the reference comes first, conversations are measured
        return steps * step + evaluations * evaluation + dpo * min(steps, epoch) * costs.forward

    assert plan.steps == 1 or needed(plan.steps) <= seconds * RESERVE * 1.001
    assert needed(plan.steps + 1) > seconds * RESERVE * 0.999
    assert plan.warmup_steps == min(2, plan.steps // 2)


class SteadyClock:
    """The clock of a machine on which a token costs the same whatever else runs there, three times as much with its gradient."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def count(self, policy: Policy, arguments: tuple[MicroBatch, ...]) -> None:
        self.now += 1e-4 * arguments[0].input_ids.numel() * (3 if torch.is_grad_enabled() else 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SteadyClock]:
    """What stages and plans read the time from, advanced by every forward pass."""
    steady = SteadyClock()
    for module in (training, run, step_plan):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=steady, perf_counter=steady))
    counting = register_module_forward_pre_hook(
        lambda module, arguments: steady.count(module, arguments) if isinstance(module, Policy) else None
    )
    yield steady
    counting.remove()


@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
def test_a_stage_with_a_budget_ends_in_time(tmp_path: Path, clock: SteadyClock, objective: str) -> None:
    job = small_job(tmp_path, objective, heldout=True, budget_seconds=2.0, train=BUDGET | {"evaluate_every": 8, "save_every": None})
    result = train_stage(job)
    assert 1.8 < clock.now <= 2.0
    assert read_json(job.run_dir / "plan.json")["steps"] == result.steps


def test_a_stage_with_a_budget_ends_where_its_epochs_end_and_says_so(
    tmp_path: Path, clock: SteadyClock, capsys: pytest.CaptureFixture[str]
) -> None:
    bounded = small_job(tmp_path, "dpo", number=10, budget_seconds=0.5, train=BUDGET | {"max_epochs": 1.5})
    assert train_stage(bounded).steps == 4  # 15 pairs, 4 in a step
    assert read_json(bounded.run_dir / "plan.json")["steps"] == 4
    assert re.search(r"4 steps \(2 of warm-up\) by train[.]max_epochs 1[.]5; \d+ would fit into its 0 s", capsys.readouterr().out)
    by_epochs = small_job(tmp_path, "dpo", run="epochs", number=10, train={"steps": None, "epochs": 1.5})
    train_stage(by_epochs)
    assert losses_of(bounded) == losses_of(by_epochs)  # the learning rate falls to the end that it has


def test_epochs_that_a_budget_does_not_reach_bound_nothing(
    tmp_path: Path, clock: SteadyClock, capsys: pytest.CaptureFixture[str]
) -> None:
    train_stage(small_job(tmp_path, "dpo", budget_seconds=0.2, train=BUDGET | {"max_epochs": 1e30}))
    assert "of warm-up) in 0 s" in capsys.readouterr().out


def test_a_plan_that_is_ended_early_warms_up_for_half_of_it_at_most() -> None:
    stage = small_stage("dpo", train=BUDGET | {"max_epochs": 1, "warmup_steps": 9})
    epoch: Any = SimpleNamespace(steps_for=lambda epochs: round(6 * epochs))
    assert bounded_plan(stage, StepPlan(50, 9), epoch) == StepPlan(6, 3)
    assert bounded_plan(stage, StepPlan(6, 3), epoch) == StepPlan(6, 3)


def test_measuring_changes_no_weight(tmp_path: Path, clock: SteadyClock) -> None:
    measured = small_job(tmp_path, run="measured", budget_seconds=1.0, train=BUDGET)
    steps = train_stage(measured).steps
    warmup = read_json(measured.run_dir / "plan.json")["warmup_steps"]
    plain = small_job(tmp_path, run="plain", train={"steps": steps, "warmup_steps": warmup})
    train_stage(plain)
    assert losses_of(measured) == losses_of(plain)


def test_a_restart_keeps_the_plan_even_with_another_budget(tmp_path: Path, clock: SteadyClock) -> None:
    job = small_job(tmp_path, budget_seconds=1.0, train=BUDGET)
    first = train_stage(job)
    for checkpoint in (job.run_dir / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    again = train_stage(dataclasses.replace(job, budget_seconds=100.0))
    assert again.steps == first.steps
    assert len(metrics_of(job)) == first.steps


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    train_stage(job)
    plan = job.run_dir / "plan.json"
    PlanFile.read(plan).model_copy(update={"steps": 24}).write(plan)
    with pytest.raises(UserError, match=r"step-00000012: was made for 12 steps, .*plan\.json says 24, .*another from step 3 on"):
        train_stage(job)


def test_a_stage_that_has_not_begun_to_fall_may_be_made_longer(tmp_path: Path) -> None:
    def job(steps: int) -> StageJob:
        return small_job(tmp_path, train={"steps": steps, "decay": "linear", "decay_share": 0.5, "save_every": 3})

    def stop(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with calling_before_each_step(stop):
        assert train_stage(job(12)).interrupted
    assert train_stage(job(24)).steps == 24
    with pytest.raises(UserError, match=r"another from step 14 on"):
        train_stage(job(36))


@pytest.mark.parametrize("content", ["[]", '{"fingerprint": "f", "steps": 3, "warmup_steps": 0}', '{"steps": 1e400}', ""])
def test_a_damaged_plan_is_refused(tmp_path: Path, content: str) -> None:
    job = small_job(tmp_path)
    (job.run_dir / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        train_stage(job)


def test_the_plan_of_a_budget_that_is_gone_is_the_checkpoints(tmp_path: Path) -> None:
    job = small_job(tmp_path, budget_seconds=1.0, train=BUDGET)
    first = train_stage(job)
    (job.run_dir / "plan.json").unlink()
    assert train_stage(dataclasses.replace(job, budget_seconds=100.0)).steps == first.steps


def test_a_plan_of_another_stage_is_not_used(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    PlanFile(fingerprint="other", steps=3, warmup_steps=0).write(job.run_dir / "plan.json")
    assert train_stage(job).steps == 12
    assert PlanFile.read(job.run_dir / "plan.json").steps == 12
