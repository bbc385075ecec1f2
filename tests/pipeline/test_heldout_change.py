"""What a stage changed of its held-out conversations, told item by item."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keural.files import read_json
from keural.pipeline.heldout_change import heldout_change
from keural.train.stage.item_losses import AFTER, BEFORE, ItemLosses

SIZE = 40
SOURCES = {"falls": [0, SIZE], "stays": [SIZE, 2 * SIZE], "rises": [2 * SIZE, 3 * SIZE]}


def write_losses(directory: Path, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses of three sources: of one they fall, of one they only scatter, of one they rise; each far less than items differ."""
    draw = np.random.default_rng(3)
    before = labels * draw.uniform(1, 5, len(labels))
    moved = np.repeat([-0.1, 0.0, 0.1], SIZE) + draw.normal(0, 0.1, len(labels))
    after = before + labels * moved
    for name, losses in ((BEFORE, before), (AFTER, after)):
        ItemLosses(
            fingerprint="f", losses=losses.tolist(), labels=labels.tolist(), sources=SOURCES, languages={"falls": "ko"}
        ).write(directory / name)
    return before, after


def test_it_is_of_the_same_items_by_labels_with_the_error_of_their_differences(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(1, 30, 3 * SIZE)
    before, after = write_losses(tmp_path, labels)
    found = heldout_change(tmp_path)
    for name, (first, stop) in SOURCES.items():
        one, other, size = before[first:stop], after[first:stop], labels[first:stop]
        figures = found[f"source/{name}"]
        assert figures["before"] == pytest.approx(one.sum() / size.sum())
        assert figures["after"] == pytest.approx(other.sum() / size.sum())
        assert figures["difference"] == pytest.approx(figures["after"] - figures["before"])
        rest = other - one - figures["difference"] * size
        assert figures["error"] == pytest.approx(math.sqrt((rest**2).sum() * SIZE / (SIZE - 1)) / size.sum())
        assert figures["low"] < figures["difference"] < figures["high"]
        assert figures["items"] == SIZE
    assert found["all"]["items"] == 3 * SIZE
    assert found["language/ko"]["difference"] == found["source/falls"]["difference"]


def test_only_significant_changes_are_called_better_or_worse(tmp_path: Path) -> None:
    write_losses(tmp_path, np.full(3 * SIZE, 10))
    found = heldout_change(tmp_path)
    assert {name: found[f"source/{name}"]["better"] for name in SOURCES} == {"falls": True, "stays": None, "rises": False}
    assert found["source/stays"]["p_holm"] > 0.05


def test_p_is_adjusted_for_the_number_of_groups(tmp_path: Path) -> None:
    """Of six conversations that all fell p is 1/32: significant alone, not as the second of four groups, behind all."""
    sources: dict[str, list[int]] = {"a": [0, 6], "b": [6, 12], "c": [12, 18]}
    after = [1.0] * 6 + [1.9, 2.1] * 6
    for name, losses in ((BEFORE, [2.0] * 18), (AFTER, after)):
        ItemLosses(fingerprint="f", losses=losses, labels=[1] * 18, sources=sources, languages={}).write(tmp_path / name)
    one = heldout_change(tmp_path)["source/a"]
    assert one["p_holm"] == pytest.approx(3 / 32)
    assert one["better"] is None


def test_conversations_without_a_label_and_sources_of_such_alone_are_left_out(tmp_path: Path) -> None:
    labels = np.full(3 * SIZE, 10)
    labels[:SIZE] = 0
    labels[SIZE] = 0
    write_losses(tmp_path, labels)
    found = heldout_change(tmp_path)
    assert found.keys() == {"all", "source/stays", "source/rises"}
    assert found["source/stays"]["items"] == SIZE - 1


@pytest.mark.parametrize("missing", [BEFORE, AFTER, "the same stage"])
def test_what_is_not_known_on_both_sides_is_not_compared(tmp_path: Path, missing: str) -> None:
    write_losses(tmp_path, np.full(3 * SIZE, 10))
    if missing in (BEFORE, AFTER):
        (tmp_path / missing).unlink()
    else:
        ItemLosses.read(tmp_path / AFTER).model_copy(update={"fingerprint": "g"}).write(tmp_path / AFTER)
    assert heldout_change(tmp_path) == {}


def test_a_loss_that_is_no_number_is_not_compared(tmp_path: Path) -> None:
    write_losses(tmp_path, np.full(3 * SIZE, 10))
    known = ItemLosses.read(tmp_path / AFTER)
    known.model_copy(update={"losses": [math.nan, *known.losses[1:]]}).write(tmp_path / AFTER)
    assert heldout_change(tmp_path) == {}


def test_a_run_has_it_in_its_summary_and_report(place: Any) -> None:
    base, chat, align = read_json(place.run / "summary.json")["stages"]
    assert base["heldout_change"] == align["heldout_change"] == {}
    change = chat["heldout_change"]["all"]
    assert change["after"] == pytest.approx(chat["heldout"]["loss"], rel=1e-6)
    assert change["before"] > change["after"]
    page = (place.run / "report.html").read_text(encoding="utf-8")
    assert f"{change['before']:.4g} → {change['after']:.4g}" in page


def test_a_stage_that_was_killed_has_the_same(interrupted: Any, finished: Path) -> None:
    (interrupted.run / "chat" / AFTER).unlink()
    interrupted.again()
    found, expected = (read_json(run / "chat" / "done.json") for run in (interrupted.run, finished / "run"))
    assert found["heldout_change"] == expected["heldout_change"]


def test_a_stage_that_an_earlier_version_began_goes_on_without_and_says_so(interrupted: Any) -> None:
    (interrupted.run / "chat" / BEFORE).unlink()
    code, _, err = interrupted()
    assert code == 0, err
    assert "chat: what it changes of its held-out data is not known" in err
    assert read_json(interrupted.run / "chat" / "done.json")["heldout_change"] == {}
