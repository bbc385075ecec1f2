"""Reference values of a run: kept beside its stages, found again when one of them is made anew, made ahead and brought along."""

import shutil
from typing import Any

import pytest

from keural.train.reference.records import RECORDS


def test_another_learning_rate_or_beta_computes_no_reference_again(place: Any) -> None:
    values = {path: path.read_bytes() for path in place.run.glob(f"reference/*/{RECORDS}")}
    assert len(values) == 1
    for change in ("align.train.lr=5e-4", "align.dpo.beta=0.3", "align.train.betas=[0.8, 0.9]"):
        said = place.again(change)
        assert "align: it was finished with other settings" in said
        assert "reference log-probabilities" not in said
    assert {path: path.read_bytes() for path in place.run.glob(f"reference/*/{RECORDS}")} == values


def test_another_starting_model_has_other_values(place: Any) -> None:
    said = place.again("chat.train.lr=5e-4")
    assert "align: reference log-probabilities of 6 train batches computed" in said
    assert len(list(place.run.glob(f"reference/*/{RECORDS}"))) == 2


def test_values_made_ahead_are_those_that_training_makes(place: Any, finished: Any) -> None:
    shutil.rmtree(place.run / "align")
    shutil.rmtree(place.run / "reference")
    said = place.again("--reference-only")
    assert "align: the reference values of its pairs are in" in said
    assert not (place.run / "align").exists()
    (made,), (expected,) = (run.glob(f"reference/*/{RECORDS}") for run in (place.run, finished / "run"))
    assert made.read_bytes() == expected.read_bytes()
    brought = place.root / "brought"
    (place.run / "reference").rename(brought)
    said = place.again(f"align.dpo.reference_path={brought}")
    assert "reference log-probabilities" not in said
    assert not (place.run / "reference").exists()
    assert place.weights("align") == (finished / "run" / "align" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("which", ["nowhere", "short", "damaged"])
def test_values_that_cannot_be_used_are_refused_in_one_line(place: Any, which: str) -> None:
    brought = place.root / "brought"
    if which != "nowhere":
        shutil.copytree(place.run / "reference", brought)
        (path,) = brought.glob(f"*/{RECORDS}")
        content = bytearray(path.read_bytes())
        if which == "damaged":
            content[40] ^= 1
        path.write_bytes(content[: -32 if which == "short" else None])
    said = place.refused("align.train.lr=5e-4", f"align.dpo.reference_path={brought}")
    assert {"nowhere": "no such directory", "short": "has no reference values for 1 of", "damaged": "1 records are damaged"}[
        which
    ] in said


def test_what_keeps_no_reference_values_is_refused(place: Any) -> None:
    assert "no stage keeps reference values (steady, chat)" in place.refused("--reference-only", "--until", "chat")
    assert "no stage keeps reference values" in place.refused("--reference-only", "align.dpo.reference=online")
    assert "starts from chat, which is not finished" in place.refused("--reference-only", "chat.train.lr=5e-4")


def test_where_the_values_come_from_makes_no_finished_work_stale(place: Any) -> None:
    assert "align: finished already" in place.again("align.dpo.reference=online")
