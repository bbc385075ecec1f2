"""Figures that leave their range are said once, with what it usually means; healthy ones are not."""

from pathlib import Path
from typing import Any

import pytest

from keural.train.stage.alarms import RANGES, WINDOW, Alarms
from keural.train.stage.metrics import line_text, read_metrics
from keural.train.stage.training import train_stage
from tests.helpers.train_small import losses_of, metrics_of, small_job, small_stage

HEALTHY = {
    "loss": 0.5, "balance_loss": 1.05, "reward_accuracy": 0.7, "reward_margin": 0.8, "reward_chosen": 0.2, "length_chosen": 40.0,
    "kl_estimate": 0.01,
}  # fmt: skip
OUTSIDE = {
    "accuracy_low": {"reward_accuracy": 0.3},
    "accuracy_perfect": {"reward_accuracy": 1.0},
    "margin_large": {"reward_margin": 40.0},
    "chosen_falls": {"reward_chosen": -0.1 * 40 * 0.5},
    "collapse": {"balance_loss": 2.5},
    "margin_reversed": {"reward_margin": -0.7},
    "good_falls": {"reward_desirable": -0.1 * 40 * 0.5},
    "far_from_reference": {"kl": 70.0},
}
HEALTHY_ANSWERS = {
    "loss": 0.45, "balance_loss": 1.05, "reward_margin": 0.8, "reward_desirable": 0.2, "length_desirable": 40.0, "kl": 3.0,
}  # fmt: skip
OF_ANSWERS = ("margin_reversed", "good_falls", "far_from_reference", "margin_large", "collapse")


def raised(lines: list[dict[str, Any]], objective: str = "dpo", **changes: Any) -> list[tuple[int, str]]:
    alarms = Alarms(small_stage(objective, **changes))
    return [(step, alarm.name) for step, line in enumerate(lines) for alarm in alarms.look({"step": step, **line})]


def test_every_range_is_tested() -> None:
    assert set(OUTSIDE) == set(RANGES)


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_figures_of_labelled_answers_have_ranges_of_their_own(name: str) -> None:
    assert raised([HEALTHY_ANSWERS | OUTSIDE[name]] * (3 * WINDOW), "kto") == [(WINDOW - 1, name)]
    assert raised([HEALTHY_ANSWERS] * 100, "kto") == []
    one_label = {key: value for key, value in HEALTHY_ANSWERS.items() if "desirable" not in key and "margin" not in key}
    assert raised([one_label] * 100, "kto") == [], "a step may have no good answer"


@pytest.mark.parametrize("name", [name for name, each in RANGES.items() if not each.objectives or "dpo" in each.objectives])
def test_a_figure_out_of_its_range_is_said_once_when_a_window_of_it_is(name: str) -> None:
    lines = [HEALTHY | OUTSIDE[name]] * (3 * WINDOW)
    assert raised(lines) == [(WINDOW - 1, name)]


def test_healthy_figures_raise_nothing() -> None:
    assert raised([HEALTHY] * 100) == []


def test_a_single_step_raises_nothing() -> None:
    lines = [HEALTHY] * 30
    lines[25] = HEALTHY | {"reward_accuracy": 0.0, "reward_margin": 100.0}
    assert raised(lines) == []


def test_ranges_of_pairs_are_not_for_conversations() -> None:
    assert raised([{"loss": 1.0, "balance_loss": 1.0, "reward_accuracy": 0.0}] * 50, "sft") == []
    assert raised([{"loss": 1.0, "balance_loss": 3.0}] * 50, "sft") == [(WINDOW - 1, "collapse")]


def test_the_chosen_answer_is_compared_per_token_whatever_the_rewards_are_of() -> None:
    falls = HEALTHY | {"reward_chosen": -5.0 * 0.5}
    assert raised([falls] * WINDOW, dpo={"loss": "sigmoid_norm", "beta": 5.0}) == [(WINDOW - 1, "chosen_falls")]
    assert raised([HEALTHY | {"reward_chosen": -5.0 * 0.1}] * WINDOW, dpo={"loss": "sigmoid_norm", "beta": 5.0}) == []


def test_without_a_reference_nothing_is_compared_with_it() -> None:
    line = {name: value for name, value in (HEALTHY | {"reward_chosen": -50.0}).items() if name != "kl_estimate"}
    assert raised([line] * 50, dpo={"loss": "simpo", "beta": 2.0}) == []


def test_an_alarm_stands_in_the_log_and_is_not_repeated_after_a_restart(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is out of range, so that one alarm is due at the third step."""
    monkeypatch.setattr("keural.train.stage.alarms.WINDOW", 3)
    broken = RANGES["collapse"].__class__("balance_loss", lambda value: True, "balance is {value:.2f}; look at it")
    monkeypatch.setitem(RANGES, "collapse", broken)
    job = small_job(tmp_path, "sft", train={"steps": 4, "save_every": 4, "warmup_steps": 0, "lr": 1e-3, "min_lr": 1e-3})
    train_stage(job)
    longer = small_job(tmp_path, "sft", train={"steps": 8, "save_every": 4, "warmup_steps": 0, "lr": 1e-3, "min_lr": 1e-3})
    train_stage(longer)
    (alarm,) = [line for line in metrics_of(job) if "alarm" in line]
    assert (alarm["step"], alarm["alarm"]) == (2, "collapse")
    said = [line for line in capfd.readouterr().err.splitlines() if "look at it" in line]
    assert said == [f"small: step 3: {alarm['message']}"]
    assert len(losses_of(job)) == 8
    lines, damaged = read_metrics(job.run_dir / "metrics.jsonl")
    assert damaged == 0
    assert (job.run_dir / "metrics.jsonl").read_text() == "".join(map(line_text, lines))
