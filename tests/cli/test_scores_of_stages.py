"""What a run's last lines say of its stages' scores."""

from typing import Any

import pytest

from keural.cli.printing import _show_scores


def stage(score: float, better: bool | None) -> dict[str, Any]:
    return {"tasks": {"toy_arithmetic_ko": {"score": score, "change": {"better": better}}}}


def test_every_stage_has_a_column_and_a_sign_only_where_it_changed_something(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"tasks": {"toy_arithmetic_ko": {"score": 0.0}}}
    after = {"pretrain-1": stage(0.9, True), "sft-1": stage(0.2, False), "dpo-1": stage(0.25, None), "sft-2": {"tasks": {}}}
    _show_scores({"untrained": before, **after})
    _, heading, names, scores = capsys.readouterr().out.rstrip().split("\n")

    assert heading.startswith("right answers")
    assert names.split() == ["start", "pretrain-1", "sft-1", "dpo-1", "sft-2"]
    assert scores.split() == ["arithmetic", "ko", "0", "90+", "20-", "25"]


def test_seven_stages_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("untrained", "pretrain-1", "pretrain-2", "sft-1", "dpo-1", "sft-2", "sft-3", "dpo-2")
    _show_scores({name: {"tasks": {"toy_translation_ko": {"score": 1.0}}} for name in names})

    _, _, *table = capsys.readouterr().out.split("\n")
    assert max(len(line.rstrip()) for line in table) <= 80


def test_nothing_is_said_where_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    _show_scores({})

    assert capsys.readouterr().out == ""
