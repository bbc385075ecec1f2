"""A stage keeps the loss of each held-out conversation from before its first step and from after its last."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from keural.errors import UserError
from keural.train.stage.item_losses import AFTER, BEFORE, ItemLosses
from keural.train.stage.job import StageJob
from tests.helpers.train_small import metrics_of, open_run, small_job, train_stage
from tests.train.test_heldout import LANGUAGES, SIZES, figures_of, write_sources


def sft_job(directory: Path, run: str = "run", **train: int) -> StageJob:
    """A job on conversations whose held-out store has three sources."""
    settings = {"steps": 6, "warmup_steps": 1, "save_every": 2, "keep_checkpoints": 3} | train
    job = small_job(directory, "sft", run=run, train=settings)
    return dataclasses.replace(job, heldout_store=write_sources(directory / f"stores-{run}", "sft")["all"])


def test_those_before_are_of_the_weights_that_it_starts_from_and_those_after_of_what_it_made(tmp_path: Path) -> None:
    job = sft_job(tmp_path)
    assert job.heldout_store is not None
    begun = figures_of(open_run(sft_job(tmp_path, "untouched")).trainer, job.heldout_store)
    result = train_stage(job)
    for name, figures in ((BEFORE, begun), (AFTER, result.heldout)):
        found = ItemLosses.read(job.run_dir / name)
        assert sum(found.losses) / sum(found.labels) == pytest.approx(figures["loss"], rel=1e-6)
        for source, (first, stop) in found.sources.items():
            mean = sum(found.losses[first:stop]) / sum(found.labels[first:stop])
            assert mean == pytest.approx(figures[f"source/{source}/loss"], rel=1e-6)
        assert {source: stop - first for source, (first, stop) in found.sources.items()} == SIZES
        assert found.languages == LANGUAGES
    assert begun["loss"] != pytest.approx(result.heldout["loss"], rel=1e-3)


def test_groups_are_all_the_sources_and_the_languages() -> None:
    sources = {"a": [0, 2], "b": [2, 3], "c": [3, 4]}
    found = ItemLosses(fingerprint="f", losses=[1.0] * 4, labels=[1] * 4, sources=sources, languages={"a": "ko", "c": "ko"})
    assert {name: chosen.tolist() for name, chosen in found.groups()} == {
        "all": [True] * 4,
        "source/a": [True, True, False, False],
        "source/b": [False, False, True, False],
        "source/c": [False, False, False, True],
        "language/ko": [True, True, False, True],
    }


def test_a_stage_that_is_started_again_keeps_those_before_and_measures_those_after(tmp_path: Path) -> None:
    job = sft_job(tmp_path)
    train_stage(job)
    before, after = ((job.run_dir / name).read_bytes() for name in (BEFORE, AFTER))
    (job.run_dir / AFTER).unlink()
    shutil.rmtree(job.run_dir / "checkpoints" / "step-00000006")

    train_stage(job)

    assert (job.run_dir / BEFORE).read_bytes() == before
    assert (job.run_dir / AFTER).read_bytes() == after


@pytest.mark.parametrize("objective", ["sft", "next_token"])
def test_a_stage_that_is_ended_at_steps_that_are_done_has_the_figures_of_that_step(tmp_path: Path, objective: str) -> None:
    """Not those of a step before, when it was to end there, nor of one behind, which it had come to."""

    def job(steps: int, run: str = "run") -> StageJob:
        settings = {"steps": steps, "warmup_steps": 1, "min_lr": 1e-3, "save_every": 2, "keep_checkpoints": 4}
        return small_job(tmp_path, objective, run=run, heldout=True, train=settings)

    for steps in (2, 6):
        train_stage(job(steps))
    shutil.rmtree(job(4).run_dir / "checkpoints" / "step-00000006")
    ended, expected = train_stage(job(4)), train_stage(job(4, "direct"))
    assert ended.heldout == expected.heldout
    assert metrics_of(job(4))[-1]["heldout"] == expected.heldout
    if objective == "sft":
        assert (job(4).run_dir / AFTER).read_bytes() == (job(4, "direct").run_dir / AFTER).read_bytes()


def test_those_after_that_are_gone_are_measured_again_without_a_step(tmp_path: Path) -> None:
    job = sft_job(tmp_path, steps=2)
    train_stage(job)
    after = (job.run_dir / AFTER).read_bytes()
    (job.run_dir / AFTER).write_text("{")
    with pytest.raises(UserError, match=r"heldout-after\.json: damaged; delete it and run the same command again"):
        train_stage(job)
    (job.run_dir / AFTER).unlink()
    train_stage(job)
    assert (job.run_dir / AFTER).read_bytes() == after


def test_those_of_this_stage_are_not_measured_again_and_anothers_are(tmp_path: Path) -> None:
    job = sft_job(tmp_path, steps=2)
    train_stage(job)
    right = ItemLosses.read(job.run_dir / BEFORE)
    planted = right.model_copy(update={"losses": [7.0] * len(right.losses)})

    shutil.rmtree(job.run_dir / "checkpoints")
    planted.write(job.run_dir / BEFORE)
    train_stage(job)
    assert ItemLosses.read(job.run_dir / BEFORE) == planted

    shutil.rmtree(job.run_dir / "checkpoints")
    planted.model_copy(update={"fingerprint": "another stage's"}).write(job.run_dir / BEFORE)
    train_stage(job)
    assert ItemLosses.read(job.run_dir / BEFORE) == right


def test_a_damaged_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    job = sft_job(tmp_path)
    (job.run_dir / BEFORE).write_text("{")
    with pytest.raises(UserError, match=r"heldout-before\.json: damaged; delete it and run the same command again"):
        train_stage(job)
    assert metrics_of(job) == []
    (job.run_dir / BEFORE).unlink()
    train_stage(job)


@pytest.mark.parametrize("objective", ["next_token", "dpo", "kto"])
def test_a_stage_on_anything_but_conversations_has_none(tmp_path: Path, objective: str) -> None:
    job = small_job(tmp_path, objective, heldout=True, train={"steps": 1, "warmup_steps": 0})
    train_stage(job)
    assert not (job.run_dir / BEFORE).exists()
    assert not (job.run_dir / AFTER).exists()
