"""Checkpoints are written while training goes on: what they hold, what stops them, and what is left whatever happens."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from keural.errors import UserError
from keural.train.checkpoints import checkpoints, writing
from keural.train.checkpoints.pieces import Piece
from keural.train.checkpoints.writing import Buffers
from keural.train.stage.job import StageJob
from tests.helpers.kill_points import POINTS, train_killed
from tests.helpers.rendezvous import rendezvous
from tests.helpers.train_small import calling_before_each_step, losses_of, small_job, small_stage, start, train_stage, weights_of
from tests.train.test_ranks import train_on_ranks

SETTINGS: dict[str, Any] = {"train": {"steps": 8, "save_every": 2, "keep_checkpoints": 9}}


def tensors_at(job: StageJob, step: int) -> dict[str, torch.Tensor]:
    directory = job.run_dir / "checkpoints" / f"step-{step:08d}"
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def names(job: StageJob) -> list[str]:
    return sorted(path.name for path in (job.run_dir / "checkpoints").iterdir())


@pytest.fixture
def plain(tmp_path: Path) -> StageJob:
    """A run that nothing disturbed."""
    job = small_job(tmp_path, run="plain", **SETTINGS)
    train_stage(job)
    return job


def test_steps_are_done_while_a_checkpoint_is_written(tmp_path: Path, plain: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is held back until two more steps are done; it holds the weights of its own step."""
    reached, write = threading.Event(), writing.write_file

    def held_back(path: Path, *rest: Any) -> str:
        assert reached.wait(60)
        return write(path, *rest)

    monkeypatch.setattr(writing, "write_file", held_back)
    job = small_job(tmp_path, **SETTINGS)
    with calling_before_each_step(lambda step: reached.set() if step == 3 else None):
        train_stage(job)
    assert names(job) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    for step in (2, 4, 6, 8):
        found, expected = tensors_at(job, step), tensors_at(plain, step)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_weights_are_changed_only_after_they_are_copied(tmp_path: Path, plain: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Buffers.copy

    def slowly(self: Buffers, *arguments: Any) -> list[Piece]:
        time.sleep(0.3)
        return copy(self, *arguments)

    monkeypatch.setattr(Buffers, "copy", slowly)
    job = small_job(tmp_path, **SETTINGS)
    train_stage(job)
    for step in (2, 8):
        assert all(torch.equal(tensors_at(job, step)[name], value) for name, value in tensors_at(plain, step).items())


@pytest.mark.parametrize(
    ("error", "reason", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", "free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", "give this user the right to write there"),
        (MemoryError("nothing left"), "nothing left", "close other programs, raise `ulimit -v`, or choose smaller sizes"),
        (RuntimeError("odd\nlines"), r"RuntimeError('odd\nlines')", "mend that"),
    ],
)
def test_a_failure_of_the_writing_thread_stops_the_run_with_one_line_that_says_what_to_do_about_it(
    tmp_path: Path, error: Exception, reason: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, write = [0], writing.write_file

    def failing(*arguments: Any) -> str:
        number[0] += 1
        if number[0] == 2:
            raise error
        return write(*arguments)

    monkeypatch.setattr(writing, "write_file", failing)
    job = small_job(tmp_path, **SETTINGS)
    with pytest.raises(UserError) as raised:
        train_stage(job)
    said = f"step-00000004: the checkpoint cannot be written ({reason}); earlier checkpoints are intact: {advice} and run the same"
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert names(job) == ["step-00000002"]
    assert len(losses_of(job)) < 8
    monkeypatch.undo()
    assert train_stage(job).steps == 8


def test_a_thread_that_cannot_be_started_is_a_refused_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, number = threading.Thread.start, [0]

    def start(self: threading.Thread) -> None:
        number[0] += self.name == "checkpoint"
        if self.name == "checkpoint" and number[0] == 2:
            raise RuntimeError("can't start new thread")
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    job = small_job(tmp_path, **SETTINGS)
    with pytest.raises(UserError, match=r"step-00000004: .* \(can't start new thread\); earlier .* raise `ulimit -u`"):
        train_stage(job)
    assert names(job) == ["step-00000002"]
    assert train_stage(job).steps == 8


class TestAnOldCheckpointThatCannotBeDeleted:
    """It is said to be there, once; the new one is whole, and training goes on."""

    @pytest.fixture(params=["its files", "its name"])
    def job(self, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StageJob:
        delete, rename = shutil.rmtree, Path.rename

        def refuse(directory: Any, *rest: Any, **more: Any) -> Any:
            if "step-00000002" in str(directory):
                raise PermissionError(errno.EACCES, "Permission denied", str(directory))
            return delete(directory, *rest, **more)

        def keep(path: Path, target: Any) -> Any:
            if path.name == "step-00000002":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return rename(path, target)

        if request.param == "its files":
            monkeypatch.setattr(shutil, "rmtree", refuse)
        else:
            monkeypatch.setattr(Path, "rename", keep)
        return small_job(tmp_path, train={"steps": 8, "save_every": 2, "keep_checkpoints": 1})

    def test_is_said_once_and_costs_nothing_else(
        self, job: StageJob, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert train_stage(job).steps == 8
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("is needed no longer and cannot be deleted (Permission denied)") == 1
        assert "step-00000002" in said
        assert [name for name in names(job) if "00000002" not in name] == ["step-00000008"]
        monkeypatch.undo()
        assert train_stage(job).steps == 8

    def test_is_deleted_when_it_can_be(self, job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
        train_stage(job)
        monkeypatch.undo()
        shutil.rmtree(job.run_dir / "checkpoints" / "step-00000008")
        train_stage(job)
        assert names(job) == ["step-00000008"]


def test_a_leftover_where_the_new_one_is_written_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path, **SETTINGS)
    (job.run_dir / "checkpoints" / ".step-00000002.tmp").mkdir(parents=True)

    def refuse(directory: Any, *rest: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"step-00000002: the checkpoint cannot be written \(Permission denied\)"):
        train_stage(job)


def test_the_checkpoint_on_its_way_is_kept_when_training_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writing.write_file

    def slowly(*arguments: Any) -> str:
        time.sleep(0.3)
        return write(*arguments)

    def fail(step: int) -> None:
        if step == 4:
            raise UserError("not a number")

    monkeypatch.setattr(writing, "write_file", slowly)
    job = small_job(tmp_path, **SETTINGS)
    with calling_before_each_step(fail), pytest.raises(UserError, match="not a number"):
        train_stage(job)
    assert names(job) == ["step-00000002", "step-00000004"]


def test_a_signal_while_one_is_written_saves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.write_file

    def slowly(*arguments: Any) -> str:
        time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr(writing, "write_file", slowly)
    job = small_job(tmp_path, **SETTINGS)

    def stop(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with calling_before_each_step(stop):
        assert train_stage(job).interrupted
    assert names(job) == ["step-00000002", "step-00000003"]


def test_without_room_for_copies_training_waits_and_says_so(
    tmp_path: Path, plain: StageJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "has_room", lambda number: False)
    monkeypatch.setattr(Buffers, "copy", None)
    job = small_job(tmp_path, **SETTINGS)
    train_stage(job)
    assert "training waits while checkpoints are written" in " ".join(capsys.readouterr().out.split())
    assert all(torch.equal(tensors_at(job, 4)[name], value) for name, value in tensors_at(plain, 4).items())


def test_every_so_many_are_kept_for_good(tmp_path: Path) -> None:
    job = small_job(tmp_path, train={"steps": 10, "save_every": 2, "keep_every": 4})
    train_stage(job)
    assert names(job) == ["step-00000004", "step-00000008", "step-00000010"]


@pytest.mark.parametrize("train", [{"save_every": 4, "keep_every": 6}, {"save_every": None, "keep_every": 6}])
def test_steps_without_checkpoints_cannot_be_kept(train: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="keep_every must be a multiple of save_every"):
        small_stage(train=train)


# killed ------------------------------------------------------------------------------------------------------------------

KILLED: dict[str, Any] = {"train": {"steps": 8, "save_every": 2}}


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, torch.Tensor]:
    """What a run that nothing disturbed ends with."""
    return weights_of(train_stage(small_job(tmp_path, run="undisturbed", **KILLED)))


def kill(directory: Path, point: str, occasion: int, world: int = 1, rank: int = 0) -> None:
    """Train on `world` ranks until one is killed; then all are."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.train_small", "tests.helpers.kill_points"])
    spec = {"directory": str(directory), "objective": "next_token", **KILLED}
    with rendezvous(world) as environments:
        processes = [
            context.Process(target=in_environment, args=(environment if world > 1 else {}, point, occasion, spec, rank))
            for environment in environments
        ]
        for process in processes:
            process.start()
        processes[rank].join(240)
        assert processes[rank].exitcode == -signal.SIGKILL
        for process in processes:  # as a launcher does
            process.kill()
            process.join()


def in_environment(environment: dict[str, str], *arguments: Any) -> None:
    os.environ.update(environment)
    train_killed(*arguments)


QUICK = ("in a file", "before the name")


@pytest.mark.parametrize("point", [point if point in QUICK else pytest.param(point, marks=pytest.mark.slow) for point in POINTS])
def test_killed_anywhere_in_a_checkpoint_the_run_goes_on_bit_for_bit(
    tmp_path: Path, point: str, undisturbed: dict[str, torch.Tensor]
) -> None:
    for occasion in (2, 1):  # the second time there is one to go on from
        kill(tmp_path, point, occasion)
        job = small_job(tmp_path, **KILLED)
        whole = [name for name in names(job) if not name.startswith(".")]
        assert whole
    weights = weights_of(train_stage(job))
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    assert losses_of(job) == losses_of(small_job(tmp_path, run="undisturbed", **KILLED))
    assert names(job) == ["step-00000008"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_a_rank_that_is_killed_in_a_checkpoint_leaves_one_that_others_go_on_from(tmp_path: Path, point: str, rank: int) -> None:
    if rank and point in ("before the manifest", "before the name", "after the name", "after old ones are deleted"):
        pytest.skip("what rank 0 does alone")
    one = small_job(tmp_path, run="one", **KILLED)
    train_stage(one)
    kill(tmp_path, point, 2, world=2, rank=rank)
    job = small_job(tmp_path, **KILLED)
    assert [name for name in names(job) if not name.startswith(".")]
    train_on_ranks(tmp_path, 2, "next_token", "run", **KILLED)
    assert losses_of(job) == pytest.approx(losses_of(one), abs=1e-5)
    assert names(job) == ["step-00000008"]


# several ranks -----------------------------------------------------------------------------------------------------------


DIVIDED: dict[str, Any] = {"precision": "split", "expert_parallel": 2}
"""Experts divided among ranks, of which a checkpoint holds remainders, codes and scales, too."""
RANKS = pytest.mark.parametrize(("world", "train"), [(2, {}), (2, DIVIDED), (4, DIVIDED)], ids=["2", "2 divided", "4 divided"])


def refused(directory: Path, world: int, train: dict[str, Any], *own: dict[str, Any]) -> str:
    """What is said by `world` ranks that all end with 2; `own` are further arguments of each."""
    spec = {"directory": str(directory), "objective": "next_token", "train": train}
    with rendezvous(world) as environments:
        each = own or ({},) * world
        processes = [start(spec | more, **environment) for more, environment in zip(each, environments, strict=True)]
        for process in processes:
            process.join(240)
    assert [process.exitcode for process in processes] == [2] * world
    return (directory / "run.error").read_text()


@pytest.mark.slow
@RANKS
def test_each_rank_writes_its_part_and_a_flipped_bit_in_any_is_found_on_any_number_of_ranks(
    tmp_path: Path, world: int, train: dict[str, Any]
) -> None:
    alone = SETTINGS["train"] | {key: value for key, value in train.items() if key != "expert_parallel"}
    job = small_job(tmp_path, train=alone)
    train_on_ranks(tmp_path, world, "next_token", "run", train=alone | train)
    files = sorted((job.run_dir / "checkpoints" / "step-00000008").iterdir())
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert [file.name[:11] for file in shards] == [f"shard-{rank + 1:05d}" for rank in range(world)]
    assert [file.name for file in files if file not in shards] == ["manifest.json"]
    sizes = [file.stat().st_size for file in shards]
    assert max(sizes) < 1.2 * min(sizes)
    for file in files:
        data = bytearray(file.read_bytes())
        data[-5] ^= 4
        file.write_bytes(data)
        said = f"damaged checkpoint: {file.name} (differs from its checksum|was changed|is missing or unreadable); delete this"
        with pytest.raises(UserError, match=said):
            train_stage(job)
        assert re.search(said, refused(tmp_path, world, alone | train))
        data[-5] ^= 4
        file.write_bytes(data)
    assert train_stage(job).steps == 8


@pytest.mark.slow
@RANKS
def test_a_missing_shard_and_another_recipes_checkpoint_end_all_ranks_with_one_line(
    tmp_path: Path, world: int, train: dict[str, Any]
) -> None:
    settings = SETTINGS["train"] | train
    small_job(tmp_path)
    train_on_ranks(tmp_path, world, "next_token", "run", train=settings)
    directory = tmp_path / "run" / "checkpoints" / "step-00000008"
    last = sorted(directory.glob("*.safetensors"))[-1]
    last.rename(tmp_path / last.name)
    assert f"damaged checkpoint: {last.name} is missing; delete this" in refused(tmp_path, world, settings)
    (tmp_path / last.name).rename(last)
    other = refused(tmp_path, world, settings, *({"fingerprint": "0" * 64},) * world)
    assert "step-00000008: made with other settings, data or initial weights" in other
    assert "\n" not in other
    train_on_ranks(tmp_path, world, "next_token", "run", train=settings)


@pytest.mark.slow
def test_checkpoints_of_copies_hold_every_part_once_and_go_on_with_any_number(tmp_path: Path) -> None:
    one = small_job(tmp_path, run="one", **SETTINGS)
    train_stage(one)
    train = SETTINGS["train"] | {"shard_over": 2}
    train_on_ranks(tmp_path, 4, "next_token", "run", train=train)
    job = small_job(tmp_path, **SETTINGS)
    directory = job.run_dir / "checkpoints"
    files = sorted((directory / "step-00000008").glob("*.safetensors"))
    stored = sum(value.numel() for file in files for value in load_file(file).values())
    assert stored == sum(value.numel() for value in tensors_at(one, 8).values())
    assert len(files) == 4
    for world in (1, 2, 4):
        for step in (6, 8):
            last = directory / f"step-{step:08d}"
            last.rename(directory / f"moved-{world}-{step}")
        train_on_ranks(tmp_path, world, "next_token", "run", **SETTINGS)
        assert losses_of(job) == pytest.approx(losses_of(one), abs=1e-5)


@pytest.mark.slow
@RANKS
def test_a_disk_that_refuses_one_rank_stops_all_with_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, world: int, train: dict[str, Any]
) -> None:
    """A limit on the size of files stands for a full disk: the system refuses the same write."""
    settings = SETTINGS["train"] | train
    small_job(tmp_path, run="whole")
    train_on_ranks(tmp_path, world, "next_token", "whole", train=settings)
    limits: list[dict[str, Any]] = [{}] * (world - 1) + [{"refuse_writes_from": 5}]
    said = refused(tmp_path, world, settings, *limits)
    assert "the checkpoint cannot be written (File too large); earlier checkpoints are intact" in said
    assert "\n" not in said
    job = small_job(tmp_path, train=settings)
    assert names(job) == ["step-00000002", "step-00000004"]
    train_on_ranks(tmp_path, world, "next_token", "run", train=settings)
    assert losses_of(job) == losses_of(small_job(tmp_path, run="whole"))
