"""Checkpoints are whole or absent, and a damaged one is named."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from train_small import losses_of, open_run, small_job, start, train_stage, weights_of

from keural.errors import UserError
from keural.files import read_json
from keural.train.stage import StageJob


@pytest.fixture
def trained(tmp_path: Path) -> StageJob:
    """A job whose run has checkpoints at steps 4, 8 and 12."""
    job = small_job(tmp_path, train={"keep_checkpoints": 3})
    train_stage(job)
    return job


def names(job: StageJob) -> list[str]:
    return sorted(path.name for path in (job.run_dir / "checkpoints").iterdir())


def newest(job: StageJob) -> Path:
    return job.run_dir / "checkpoints" / "step-00000012"


def test_the_newest_ones_are_kept_and_the_manifest_says_what_they_are(trained: StageJob, tmp_path: Path) -> None:
    assert names(trained) == ["step-00000004", "step-00000008", "step-00000012"]
    manifest = read_json(newest(trained) / "manifest.json")
    assert manifest["progress"]["step"] == 12
    assert manifest["stage"] == trained.stage.model_dump()
    assert manifest["fingerprint"] == trained.fingerprint
    assert set(manifest["files"]) == {path.name for path in newest(trained).iterdir()} - {"manifest.json"}
    one = small_job(tmp_path, run="one")
    train_stage(one)
    assert names(one) == ["step-00000012"]


def test_newest_means_by_number_not_by_name(trained: StageJob) -> None:
    directory = trained.run_dir / "checkpoints"
    newest(trained).rename(directory / "step-100000000")
    assert open_run(trained).checkpoints.latest() == directory / "step-100000000"


def test_a_finished_stage_gives_the_same_result_again(trained: StageJob) -> None:
    before = train_stage(trained)
    again = train_stage(trained)
    assert dataclasses.replace(again, model=before.model) == before
    assert all(torch.equal(value, weights_of(again)[name]) for name, value in weights_of(before).items())


def test_resuming_restores_weights_moments_and_step(trained: StageJob) -> None:
    shutil.rmtree(newest(trained))
    run = open_run(trained)
    assert run.progress.step == 8
    for parameter in run.trainer.policy.parameters():
        state = run.trainer.optimizer.state[parameter]
        assert state["step"].item() == 8
        assert state["exp_avg_sq"].abs().max() > 0


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "missing", "truncated"])
def test_damage_is_refused_with_the_file_and_what_to_do(trained: StageJob, name: str, damage: str) -> None:
    path = newest(trained) / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=rf"step-00000012: damaged checkpoint: {name} .*delete this directory") as error:
        train_stage(trained)
    assert "\n" not in str(error.value)
    shutil.rmtree(newest(trained))
    assert train_stage(trained).steps == 12


def test_every_single_flipped_bit_of_the_manifest_is_noticed(trained: StageJob) -> None:
    path = newest(trained) / "manifest.json"
    original = path.read_bytes()
    checkpoints = open_run(trained).checkpoints
    for position in range(0, len(original), 13):
        data = bytearray(original)
        data[position] ^= 2
        path.write_bytes(data)
        try:
            same = json.loads(data) == json.loads(original)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(UserError, match="damaged"):
                checkpoints._verified(newest(trained), {})


def test_a_checkpoint_of_other_settings_is_refused(trained: StageJob) -> None:
    other = dataclasses.replace(trained, fingerprint="0" * 64)
    with pytest.raises(UserError, match="other settings"):
        train_stage(other)


def test_what_a_killed_process_left_is_ignored_and_removed(trained: StageJob) -> None:
    shutil.rmtree(newest(trained))
    leftover = trained.run_dir / "checkpoints" / ".step-00000012.tmp"
    leftover.mkdir()
    (leftover / "shard.safetensors").write_bytes(b"half")
    assert train_stage(trained).steps == 12
    assert ".step-00000012.tmp" not in names(trained)


def test_a_refused_write_keeps_the_previous_checkpoint_and_leaves_no_rest(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the system refuses the same write."""
    job = small_job(tmp_path, train={"steps": 8, "save_every": 4})
    process = start(
        {"directory": str(tmp_path), "objective": "next_token", "train": {"steps": 8, "save_every": 4}, "refuse_writes_from": 5}
    )
    process.join(120)
    assert process.exitcode == 2
    message = (tmp_path / "run.error").read_text()
    assert re.fullmatch(
        r".*step-00000008: the checkpoint cannot be written \(.+\); earlier checkpoints are intact: free some .*", message
    )
    assert names(job) == ["step-00000004"]
    assert train_stage(job).steps == 8
    assert losses_of(job) == losses_of_uninterrupted(tmp_path)


def losses_of_uninterrupted(directory: Path) -> list[float]:
    job = small_job(directory, run="uninterrupted", train={"steps": 8, "save_every": 4})
    train_stage(job)
    return losses_of(job)
