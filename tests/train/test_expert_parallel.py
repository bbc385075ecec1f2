"""Experts that are divided among ranks train the model that one process trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from keural.errors import UserError
from keural.train.initial.weights import initial_model
from keural.train.network.recompute import RECOMPUTE
from keural.train.processes.modes import share_of
from keural.train.processes.parallel import check_ranks
from keural.train.processes.ranks import Ranks
from keural.train.stage.building import policy_of
from tests.helpers.sharded_steps import Ways
from tests.helpers.train_small import (
    LENGTH,
    SHA,
    losses_of,
    small_config,
    small_job,
    small_stage,
    train_stage,
)
from tests.train.test_ranks import train_on_ranks
from tests.train.test_sharded_engine import compare

CPU = torch.device("cpu")


def ways(number: int, accumulations: tuple[int, ...] = (1, 4), **train: Any) -> Ways:
    """Every mode of recomputation; one forward pass of a rank, and several."""
    return {
        f"{recompute}-{accumulation}": {
            "recompute": recompute, "micro_batch_tokens": 8 * LENGTH // accumulation, "expert_parallel": number, **train
        }
        for recompute in RECOMPUTE
        for accumulation in accumulations
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "number", "train"),
    [(2, 2, {}), (4, 2, {}), (4, 4, {}), (4, 2, {"shard_over": 2}), (4, 2, {"precision": "fp32-bf16m"})],
    ids=["all", "sharded", "four", "copies", "half moments"],
)
def test_divided_experts_give_the_gradients_of_one_process_in_every_mode_and_cut(
    tmp_path: Path, world: int, number: int, train: Mapping[str, Any]
) -> None:
    """Accumulated over so many forward passes as the rank has rows."""
    compare(tmp_path, world, ways(number, (1, 4, 8), **train))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_divided_experts_give_the_gradients_of_one_process_with_every_objective(tmp_path: Path, objective: str) -> None:
    changes = {"dpo": {"reference": "online"}} if objective == "dpo" else {}
    compare(tmp_path, 4, ways(2, (4,)), objective=objective, **changes)


@pytest.mark.slow
def test_a_run_goes_on_with_the_experts_divided_otherwise(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 12, "save_every": 4, "keep_checkpoints": 3}
    one = small_job(tmp_path, run="one", train=settings)
    train_stage(one)
    expected = losses_of(one)
    many = small_job(tmp_path, run="many", train=settings)

    def again(world: int, number: int, done: int, **changes: Any) -> None:
        for path in (many.run_dir / "checkpoints").glob("step-*"):
            if int(path.name.split("-")[1]) > done:
                path.rename(path.with_name(f"away-{world}-{number}-{path.name}"))
        train_on_ranks(tmp_path, world, "next_token", "many", train=settings | {"expert_parallel": number, **changes})
        assert losses_of(many) == pytest.approx(expected, abs=1e-5)

    again(4, 2, 0)
    again(2, 1, 4)
    again(4, 4, 4)
    again(1, 1, 8)
    again(4, 2, 8, shard_over=2)
    again(2, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp32-bf16m", "published"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    settings: dict[str, Any] = {
        "steps": 8, "save_every": 4, "keep_checkpoints": 2, "expert_parallel": 2, "precision": precision, "recompute": "selective"
    }  # fmt: skip
    whole = train_on_ranks(tmp_path, 4, "next_token", "run", train=settings)["weights"]
    last = tmp_path / "run" / "checkpoints" / "step-00000008"
    last.rename(last.with_name("away"))
    again = train_on_ranks(tmp_path, 4, "next_token", "run", train=settings)["weights"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert again["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 48, 32)


@pytest.mark.parametrize(("number", "shard_over"), [(2, None), (4, None), (2, 2)])
def test_a_rank_has_the_parts_of_its_experts_alone(tmp_path: Path, number: int, shard_over: int | None) -> None:
    job = small_job(tmp_path, "sft", train={"expert_parallel": number, "shard_over": shard_over})
    whole = dict(initial_model(job.model_config, job.init, job.seed, CPU, False, SHA).named_parameters())
    shards = shard_over or 4
    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    try:
        policy, _, _ = policy_of(job, True, Ranks(3, 4, CPU))
        for name, parameter in policy.model.named_parameters():
            region = share_of(parameter.shape, 3 % shards, shards, number)
            assert isinstance(parameter, DTensor)
            assert parameter.shape == whole[name].shape
            assert torch.equal(parameter.to_local(), whole[name][region]), name
            if ".experts." in name:
                first = (3 % number) * 4 // number
                assert region[0] == slice(first, first + 4 // number)
                assert parameter.to_local().numel() * shards == parameter.numel()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("train", "processes", "model", "reason"),
    [
        ({"expert_parallel": 4}, 4, {"num_local_experts": 6}, r"expert_parallel 4 does not divide the model's 6 experts"),
        ({"expert_parallel": 2}, 1, {}, r"expert_parallel 2 needs a multiple of 2 processes .* there is 1; give another"),
        ({"expert_parallel": 4}, 6, {}, r"expert_parallel 4 needs a multiple of 4 processes .* there are 6; give another"),
        ({"expert_parallel": 4, "shard_over": 2}, 4, {}, r"expert_parallel 4 needs a multiple of 4 .* there are 2; give another"),
        (
            {"expert_parallel": 2},
            14,
            {},
            r"expert_parallel 2 leaves 7 processes to share each expert, and neither its width 24 nor",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_made(
    train: dict[str, Any], processes: int, model: dict[str, Any], reason: str
) -> None:
    stage, config = small_stage(train=train), small_config(**model)
    with pytest.raises(UserError, match=f"^small: train.{reason}"):
        check_ranks(stage, processes, config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": {"precision": "split"}}, "precision split is for one process"),
        ({"train": {"precision": "split-host"}}, "precision split-host is for one process"),
        ({"train": {"compile": True}}, "expert_parallel cannot be compiled"),
        ({"train": {"expert_parallel": 3}}, "Input should be 1, 2, 4 or 8"),
        ({"lora": {}}, "lora is for one process, and train.expert_parallel for several"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_the_recipe(changes: dict[str, Any], reason: str) -> None:
    changes = {**changes, "train": {"expert_parallel": 2, **changes.get("train", {})}}
    with pytest.raises(ValueError, match=reason):
        small_stage(**changes)
