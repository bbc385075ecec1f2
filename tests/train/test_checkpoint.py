"""Checkpoints are whole or absent, and a damaged one is named."""

import contextlib
import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from keural.errors import UserError
from keural.files import fingerprint, read_json, sha256_file, write_json
from keural.train.stage.job import StageJob
from tests.helpers.train_small import losses_of, open_run, small_job, start, train_stage, weights_of


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


def rewritten(directory: Path, **changes: object) -> None:
    """Write the manifest anew so that it fits what lies there, as somebody would who wants it to be believed."""
    manifest = read_json(directory / "manifest.json") | changes
    manifest["files"] = {path.name: sha256_file(path) for path in directory.iterdir() if path.name != "manifest.json"}
    del manifest["checksum"]
    write_json(directory / "manifest.json", manifest | {"checksum": fingerprint(manifest)})


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "shard-00001-model-00001-of-00001.safetensors", "manifest.json"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_pickle_in_any_file_is_never_read(trained: StageJob, tmp_path: Path, name: str, listed: bool) -> None:
    mark = tmp_path / "ran"
    with (newest(trained) / name).open("wb") as file:
        pickle.dump(Payload(mark), file)
    if listed and name != "manifest.json":
        rewritten(newest(trained))
    unread = listed and name in {".metadata", "__0_0.distcp"}  # a file that the manifest lists and nothing looks at
    with contextlib.nullcontext() if unread else pytest.raises(UserError, match="step-00000012"):
        train_stage(trained)
    assert not mark.exists()


def test_a_checkpoint_holds_no_pickles(trained: StageJob) -> None:
    assert {path.suffix for path in newest(trained).iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_an_earlier_version_is_refused_with_the_reason(trained: StageJob) -> None:
    shutil.rmtree(newest(trained))
    newest(trained).mkdir()
    dcp.save({"x": torch.zeros(2)}, storage_writer=dcp.FileSystemWriter(newest(trained)), no_dist=True)
    shutil.copy(newest(trained).with_name("step-00000008") / "manifest.json", newest(trained))
    rewritten(newest(trained), format=1)
    with pytest.raises(UserError, match=r"an earlier version of keural.*could run code.*delete .*checkpoints to start it again"):
        train_stage(trained)


MISSHAPED: dict[str, object] = {
    "progress": {"step": "12"},
    "world": "1",
    "stage": [],
    "format": 3,
    "fingerprint": None,
    "more": 1,
}


@pytest.mark.parametrize("key", MISSHAPED)
def test_a_manifest_of_other_types_is_refused_in_one_line(trained: StageJob, key: str) -> None:
    rewritten(newest(trained), **{key: MISSHAPED[key]})
    with pytest.raises(UserError, match="step-00000012: ") as error:
        train_stage(trained)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "of another stage", "of another shape", "of another type", "too many"])
def test_tensors_that_are_not_the_stages_are_refused(trained: StageJob, kind: str) -> None:
    (file,) = newest(trained).glob("*.safetensors")
    tensors = load_file(file)
    name = "model.model.norm.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "of another stage":
        tensors["model.more"] = torch.zeros(2)
    elif kind == "of another shape":
        tensors[name] = tensors[name][:-1]
    elif kind == "of another type":
        tensors[name] = tensors[name].double()
    elif kind == "too many":
        save_file({"model.more": torch.zeros(2)}, file.with_name("other.safetensors"))
    save_file(tensors, file)
    rewritten(newest(trained))
    with pytest.raises(
        UserError, match=r"step-00000012: a checkpoint of another version .*\(tensor model.*delete .*/checkpoints to"
    ):
        train_stage(trained)


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
        r".*step-00000008: the checkpoint cannot be written \(.+\); earlier checkpoints are intact: raise `ulimit -f` .*", message
    )
    assert names(job) == ["step-00000004"]
    assert train_stage(job).steps == 8
    assert losses_of(job) == losses_of_uninterrupted(tmp_path)


def losses_of_uninterrupted(directory: Path) -> list[float]:
    job = small_job(directory, run="uninterrupted", train={"steps": 8, "save_every": 4})
    train_stage(job)
    return losses_of(job)
