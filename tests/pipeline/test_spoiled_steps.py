"""A run in which one step is a spike and another is no number: what is said, what goes on, what the report shows."""

import math
import re
from typing import Any

import pytest

from keural.train.stage.metrics import read_metrics
from keural.train.stage.run import StageRun
from tests.train.test_health import planted

STEPS, SPIKE, SPOILED = 100, 80, 90
SETTINGS = ("steady.train.skip_spikes=6", f"steady.train.steps={STEPS}", "steady.train.save_every=20")


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stage `steady`, which compares each step with those before as every stage does."""
    train = StageRun.train

    def spoil(run: StageRun, *arguments: Any) -> bool:
        return train(planted(run, {SPIKE: 50.0, SPOILED: math.nan} if run.job.stage.name == "steady" else {}), *arguments)

    monkeypatch.setattr(StageRun, "train", spoil)


@pytest.mark.slow
def test_of_100_steps_a_spike_is_left_out_and_a_nan_stops_until_it_is_left_out_and_the_report_tells_both(
    place: Any, spoiled: None
) -> None:
    code, _, error = place(*SETTINGS, out=place.root / "spoiled")
    assert code == 2
    assert f"step {SPIKE} is left out: loss" in error
    (line,) = [line for line in error.splitlines() if line.startswith("keural: error: ")]
    assert f"steady: loss is nan at step {SPOILED}; no weights were changed by it" in line

    code, _, error = place(*SETTINGS, f"steady.train.steps_to_skip=[{SPOILED}]", out=place.root / "spoiled")

    assert code == 0, error
    lines, damaged = read_metrics(place.root / "spoiled" / "steady" / "metrics.jsonl")
    steps = [line for line in lines if "learning_rate" in line]
    assert (damaged, [line["step"] for line in steps]) == (0, list(range(STEPS)))
    assert {line["step"]: line["skipped"][:5] for line in steps if "skipped" in line} == {SPIKE: "loss ", SPOILED: "asked"}
    report = (place.root / "spoiled" / "report.html").read_text(encoding="utf-8")
    assert "100 (2 left out)" in report
    assert re.search(rf"Left out were the steps steady {SPIKE} \(loss [\d.]+ where .*\), steady {SPOILED} \(asked for\)\.", report)
    assert "bits per byte" in report
