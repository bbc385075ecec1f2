"""`--dry-run`: every stage takes its largest step twice, and nothing of it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keural.train.processes.ranks import session
from keural.train.stage import dry_run as module
from keural.train.stage.building import stream_of
from keural.train.stage.dry_run import dry_run
from tests.helpers.train_small import small_job


def contents(directory: Path) -> dict[Path, bytes]:
    """Of every file but a cache that the preparing of data keeps for itself."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path: path.read_bytes() for path in files if path.name != "file-hashes.json"}


def test_a_finished_run_stays_as_it_is(place: Any) -> None:
    before = contents(place.run)
    said = place.again("--dry-run")
    assert said.count("its own start, the largest batch") == 3
    after = contents(place.run)
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()


def test_a_run_that_has_not_begun_is_tried_with_random_weights(place: Any, tmp_path: Path) -> None:
    code, said, error = place("--dry-run", out=tmp_path / "fresh")
    assert code == 0, error
    assert "steady: its own start" in said + error
    assert "chat: random weights" in said + error
    assert "align: random weights" in said + error
    assert not {"steady", "chat", "align", "reference", "final"} & {path.name for path in (tmp_path / "fresh").iterdir()}


def test_reference_values_are_kept_by_no_dry_run(place: Any) -> None:
    assert "--dry-run and --reference-only: give one of them" in place.refused("--dry-run", "--reference-only")
    assert "shows steps that are trained, and --dry-run trains none" in place.refused("--dry-run", "--tensorboard")
    assert "and --reference-only trains none" in place.refused("--reference-only", "--tensorboard")


def test_figures_that_are_not_finite_are_found(place: Any) -> None:
    said = place.refused("--dry-run", "--until", "steady", "steady.train.lr=1e30", "steady.train.min_lr=0")
    assert "is nan at step" in said or "is inf at step" in said


def test_it_is_the_step_with_the_most_work(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo")
    with session() as ranks:
        stream = stream_of(job, job.train_store, ranks)
        steps = range(stream.steps_per_epoch)
        tokens = [stream.batch(step).labels.size for step in steps]
        tried = dry_run(job, ranks)
    assert len(set(tokens)) > 1, "nothing would be shown"
    assert tokens[tried.batch] == max(tokens)
    assert tried.batch == int(np.argmax([stream.work(step) for step in steps]))
    assert 0 < tried.peak_gib < 64
    assert not list(job.run_dir.iterdir())


def test_its_figures_are_of_the_second_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one makes the optimizer's moments, which takes its own time and memory."""
    losses: list[float] = []
    original = module.train_step

    def step(*arguments: Any) -> Any:
        report = original(*arguments)
        losses.append(report.loss)
        return report

    monkeypatch.setattr(module, "train_step", step)
    with session() as ranks:
        tried = dry_run(small_job(tmp_path), ranks)
    assert len(losses) == 2
    assert tried.loss == losses[1] < losses[0]
