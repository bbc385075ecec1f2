"""The training engine on several ranks computes what it computes on one."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from keural.errors import UserError
from keural.train.network.recompute import RECOMPUTE
from keural.train.optimization.split import wide_norm
from keural.train.processes.modes import shards_of
from keural.train.processes.ranks import Ranks, session
from tests.helpers.shapes import SMALL
from tests.helpers.sharded_steps import Ways, gradients_by, on_ranks, open_ways, save_gradients
from tests.helpers.train_small import LENGTH, losses_of, small_job, small_stage, step_gradients, train_stage
from tests.train.test_ranks import train_on_ranks

CPU = torch.device("cpu")
ROUTER = {"balance_coef": 0.5, "z_coef": 0.1}
WAYS: Ways = {
    f"{recompute}-{accumulation}": {"recompute": recompute, "micro_batch_tokens": 8 * LENGTH // accumulation}
    for recompute in RECOMPUTE
    for accumulation in (1, 8)
}
"""Every mode of recomputation; one forward pass of a rank, and as many as there are rows."""


def compare(directory: Path, world: int, ways: Ways, save: Callable[..., None] = save_gradients, **changes: Any) -> None:
    """Losses, every gradient and their norm on `world` ranks within 1e-5 of those of one process, where nothing is compiled."""
    changes = {"router": ROUTER, **changes}
    alone: Ways = {name: way | {"expert_parallel": 1, "compile": False} for name, way in ways.items()}
    expected = gradients_by(directory, Ranks(0, 1, CPU), alone, **changes)
    out = directory / f"{world}.pt"
    on_ranks(world, save, str(directory), str(out), ways, changes)
    for way, found in torch.load(out, weights_only=True).items():
        assert found.keys() == expected[way].keys()
        for name, value in expected[way].items():
            largest = float(value.abs().max())
            torch.testing.assert_close(
                found[name], value, atol=1e-5 * max(largest, 1e-3), rtol=1e-5, msg=lambda text, at=(way, name): f"{at}: {text}"
            )


def test_two_ranks_give_the_gradients_of_one_in_every_mode_of_recomputation_and_cut(tmp_path: Path) -> None:
    experts = {"recompute": "full", "micro_batch_tokens": LENGTH, "expert_parallel": 2}
    compare(tmp_path, 2, WAYS | {"divided experts": experts})


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo"])
@pytest.mark.parametrize("world", [2, 4])
def test_two_and_four_ranks_give_the_gradients_of_one_with_every_objective(tmp_path: Path, objective: str, world: int) -> None:
    ways = WAYS | {"pairs": {"recompute": "selective", "shard_over": 2}}
    compare(tmp_path, world, {name: way | {"micro_batch_tokens": 2 * LENGTH} for name, way in ways.items()}, objective=objective)


@pytest.mark.slow
def test_copies_of_the_weights_on_two_ranks_each_give_the_gradients_of_one(tmp_path: Path) -> None:
    compare(tmp_path, 4, {name: way | {"shard_over": 2} for name, way in WAYS.items()})


def save_without_choice(directory: str, out: str, ways: Ways, changes: dict[str, Any]) -> None:
    """`save_gradients` of a network whose tokens go to all experts: with a choice, two of 500 tokens whose experts are nearly tied
    go elsewhere when a product is rounded otherwise, and an expert's gradient is another by up to 15%.
    """
    SMALL["num_experts_per_tok"] = SMALL["num_local_experts"]
    save_gradients(directory, out, ways, changes)


@pytest.mark.slow
def test_compiled_layers_on_two_ranks_come_as_close_as_bfloat16_allows(tmp_path: Path) -> None:
    way = {"compute_dtype": "bfloat16", "recompute": "selective"}
    ways: Ways = {"eager": way, "compiled": way | {"compile": True}}
    changes = {"router": ROUTER | {"balance_coef": 0.0}}  # which has no effect without a choice
    on_ranks(2, save_without_choice, str(tmp_path), str(tmp_path / "two.pt"), ways, changes)
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    assert torch.equal(found["eager"]["counts"], found["compiled"]["counts"])
    for name, value in found["eager"].items():
        distance = float((found["compiled"][name].float() - value.float()).norm()) / max(float(value.float().norm()), 1e-6)
        assert distance <= 0.02, name


def watch_layers(directory: str) -> None:
    """In the backward pass the weights of two layers are there at a time: of the one that runs and of the next."""
    way = {"recompute": "selective", "compute_dtype": "bfloat16"}
    with session() as ranks, warnings.catch_warnings(action="error", category=UserWarning):
        for _, trainer in open_ways(Path(directory), ranks, {"way": way}, layers=5):
            layers: list[Any] = list(trainer.policy.model.model.layers)
            assert all(isinstance(layer, FSDPModule) for layer in layers)
            most = [0]

            def count(most: list[int] = most, layers: list[Any] = layers) -> None:
                whole = [layer for layer in layers if not hasattr(layer.self_attn.q_proj.weight, "to_local")]
                most[0] = max(most[0], len(whole))

            for layer in layers:
                layer.register_forward_pre_hook(lambda *_, count=count: count())
                layer.register_full_backward_hook(lambda *_, count=count: count())
            step_gradients(trainer)
            assert 1 <= most[0] <= 2, most


def test_no_more_than_two_layers_are_whole_at_a_time(tmp_path: Path) -> None:
    on_ranks(2, watch_layers, str(tmp_path))


def keep_router_logits(directory: str, out: str) -> None:
    way = {"compute_dtype": "bfloat16", "recompute": "full"}
    with session() as ranks:
        found = gradients_by(Path(directory), ranks, {"way": way})
        if ranks.is_main:
            torch.save(found["way"], out)


@pytest.mark.slow
def test_routing_in_bfloat16_is_that_of_one_process(tmp_path: Path) -> None:
    """Norms and routers are gathered in float32: rounded to bfloat16 they sent tokens to other experts."""
    way = {"compute_dtype": "bfloat16", "recompute": "full"}
    one = gradients_by(tmp_path, Ranks(0, 1, CPU), {"way": way})["way"]
    on_ranks(2, keep_router_logits, str(tmp_path), str(tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert torch.equal(one["counts"], two["counts"])
    torch.testing.assert_close(one["probabilities"], two["probabilities"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_four_ranks_in_two_groups_train_as_one_process_and_go_on_with_two(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "save_every": 4, "keep_checkpoints": 2, "recompute": "selective"}
    one = small_job(tmp_path, run="one", train=settings)
    train_stage(one)
    train_on_ranks(tmp_path, 4, "next_token", "four", train=settings | {"shard_over": 2})
    four = small_job(tmp_path, run="four", train=settings)
    assert losses_of(four) == pytest.approx(losses_of(one), abs=1e-5)
    last = four.run_dir / "checkpoints" / "step-00000008"
    last.rename(last.with_name("moved-away"))
    train_on_ranks(tmp_path, 2, "next_token", "four", train=settings)
    assert losses_of(four) == pytest.approx(losses_of(one), abs=1e-5)


def test_groups_that_do_not_divide_the_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.shard_over 2 does not divide the 3 processes"):
        train_stage(small_job(tmp_path, train={"shard_over": 2}), Ranks(0, 3, CPU))
    assert shards_of(small_stage(train={"shard_over": 8}).train, 4) == 4


def test_the_norm_of_gradients_in_bfloat16_is_summed_in_float32() -> None:
    gradient = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    assert float(wide_norm([gradient])) == 64
