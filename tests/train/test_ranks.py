"""Any number of ranks trains the same model; checkpoints move between them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keural.train.reference.records import RECORD, RECORDS
from keural.train.stage.item_losses import AFTER, BEFORE, ItemLosses
from tests.helpers.rendezvous import rendezvous
from tests.helpers.train_small import losses_of, metrics_of, small_job, start, train_stage, weights_of

ROOT = Path(__file__).resolve().parents[2]


def train_on_ranks(directory: Path, world: int, objective: str, run: str, **changes: Any) -> dict[str, Any]:
    """Train on `world` gloo ranks with torchrun's environment; returns what rank 0 saved."""
    spec = {"directory": str(directory), "objective": objective, "run": run, **changes}
    with rendezvous(world) as environments:
        processes = [start(spec, **environment) for environment in environments]
        for process in processes:
            process.join(280)
    assert [process.exitcode for process in processes] == [0] * world
    return dict(torch.load(directory / f"{run}.pt", weights_only=True))


def compare(tmp_path: Path, objective: str, world: int, **changes: Any) -> None:
    """Train with one process and with `world` ranks; every loss within 1e-5."""
    one = small_job(tmp_path, objective, run="one", **changes)
    expected = weights_of(train_stage(one))
    outcome = train_on_ranks(tmp_path, world, objective, "many", **changes)
    many = small_job(tmp_path, objective, run="many", **changes)
    assert losses_of(many) == pytest.approx(losses_of(one), abs=1e-5)
    for ours, theirs in zip(metrics_of(many), metrics_of(one), strict=True):
        names = {"gradient_norm", "balance_loss", "z_loss", "reward_margin"}
        if theirs.get("step", 0) > 1:  # the first step's policy is its reference: margins of zero, whose signs are rounding
            names.add("reward_accuracy")
        for name in set(ours) & names:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    if objective == "sft" and changes.get("heldout"):
        for name in (BEFORE, AFTER):
            ours, theirs = (ItemLosses.read(job.run_dir / name) for job in (many, one))
            assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
            assert ours.labels == theirs.labels
    for name, value in expected.items():
        torch.testing.assert_close(outcome["weights"][name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_two_ranks_give_the_losses_of_one_clipped_at_the_global_norm(tmp_path: Path, steps: int) -> None:
    train = {"steps": steps, "save_every": None, "clip_norm": 0.5, "micro_batch_tokens": 64}
    compare(tmp_path, "next_token", 2, train=train)
    norms = [line["gradient_norm"] for line in metrics_of(small_job(tmp_path, run="many", train=train))]
    assert min(norms[:5]) > 0.5


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_two_ranks_give_the_losses_of_one_with_every_objective(tmp_path: Path, objective: str) -> None:
    compare(tmp_path, objective, 2, train={"steps": 6, "evaluate_every": 3, "save_every": None}, heldout=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
@pytest.mark.parametrize("world", [2, 4])
def test_two_and_four_ranks_give_the_losses_of_one_over_50_steps(tmp_path: Path, objective: str, world: int) -> None:
    changes = {"train": {"steps": 50, "save_every": None, "micro_batch_tokens": 64, "evaluate_every": 20}, "heldout": True}
    compare(tmp_path, objective, world, **changes)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_ranks_with_checkpointing_and_bfloat16_come_close_to_one(tmp_path: Path, world: int) -> None:
    train = {"steps": 8, "save_every": None, "compute_dtype": "bfloat16", "recompute": "full"}
    one = small_job(tmp_path, run="one", train=train)
    train_stage(one)
    train_on_ranks(tmp_path, world, "next_token", "many", train=train)
    assert losses_of(small_job(tmp_path, run="many")) == pytest.approx(losses_of(one), abs=0.02)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_the_other_way_round(tmp_path: Path) -> None:
    settings = {"train": {"steps": 12, "save_every": 6, "keep_checkpoints": 2}}
    one, two = (small_job(tmp_path, run=run, **settings) for run in ("one", "two"))
    train_stage(one)
    expected = losses_of(one)
    train_on_ranks(tmp_path, 2, "next_token", "two", **settings)
    for job in (one, two):
        last = job.run_dir / "checkpoints" / "step-00000012"
        last.rename(last.with_name("moved-away"))
    train_stage(two)
    train_on_ranks(tmp_path, 2, "next_token", "one", **settings)
    assert losses_of(two) == pytest.approx(expected, abs=1e-5)
    assert losses_of(one) == pytest.approx(expected, abs=1e-5)


def torchrun(directory: Path, objective: str, **changes: Any) -> subprocess.Popen[bytes]:
    spec = directory / "spec.json"
    spec.write_text(json.dumps({"directory": str(directory), "objective": objective, **changes}))
    program = ["-m", "tests.helpers.train_small", str(spec)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    small_job(tmp_path, "sft")
    assert torchrun(tmp_path, "sft").wait(240) == 0
    assert torch.load(tmp_path / "run.pt", weights_only=True)["steps"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True], ids=["sigterm-to-torchrun", "ctrl-c-to-the-whole-group"])
def test_a_signal_under_torchrun_saves_on_all_ranks(tmp_path: Path, everyone: bool) -> None:
    job = small_job(tmp_path)
    process = torchrun(tmp_path, "next_token", pause=0.3, train={"save_every": None})
    while not (job.run_dir / "metrics.jsonl").exists() or len(metrics_of(job)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    if everyone:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    process.wait(120)
    outcome = torch.load(tmp_path / "run.pt", weights_only=True)
    assert outcome["interrupted"]
    assert (job.run_dir / "checkpoints" / f"step-{outcome['steps']:08d}" / "manifest.json").is_file()
    assert 3 <= outcome["steps"] < 12


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_reference_values_of_one_process_are_used_by_many_and_the_other_way_round(
    tmp_path: Path, world: int, objective: str
) -> None:
    settings: dict[str, Any] = {"train": {"steps": 4, "save_every": None}, "number": 16, "heldout": True}
    one, many = (small_job(tmp_path, objective, run=run, **settings) for run in ("one", "many"))
    train_stage(one)
    train_on_ranks(tmp_path, world, objective, "many", **settings)
    kept = {job.run_dir: values_of(job.run_dir) for job in (one, many)}
    for pair, values in kept[one.run_dir].items():
        assert kept[many.run_dir][pair] == pytest.approx(values, rel=1e-5)
    for job in (one, many):
        shutil.rmtree(job.run_dir / "checkpoints")
        (job.run_dir / "reference").rename(job.run_dir / "moved")
    (one.run_dir / "moved").rename(many.run_dir / "reference")
    (many.run_dir / "moved").rename(one.run_dir / "reference")
    train_on_ranks(tmp_path, world, objective, "many", **settings)
    train_stage(one)
    assert values_of(many.run_dir) == kept[one.run_dir]
    assert values_of(one.run_dir) == kept[many.run_dir]
    assert losses_of(many)[-4:] == pytest.approx(losses_of(one)[-4:], abs=1e-5)


def values_of(run: Path) -> dict[bytes, list[float]]:
    """Reference values by the digest of their pair; more would be there if any had been computed again."""
    (path,) = (run / "reference").glob(f"*/{RECORDS}")
    records = np.frombuffer(path.read_bytes(), dtype=RECORD)
    assert len({record["pair"].tobytes() for record in records}) == len(records)
    return {record["pair"].tobytes(): record["values"].tolist() for record in records}
