"""Experts that are divided among ranks train the model that one process trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from keural.errors import UserError
from keural.train.checkpoints.pieces import pieces_of
from keural.train.initial.weights import initial_model
from keural.train.network.experts import mixture, route
from keural.train.network.layers import COMPILED, graphs
from keural.train.network.parallel_experts import parallel_mixture
from keural.train.network.recompute import RECOMPUTE
from keural.train.processes.modes import processes_started, share_of
from keural.train.processes.parallel import check_ranks
from keural.train.processes.ranks import Ranks, session
from keural.train.stage.building import policy_of
from tests.helpers.shapes import SMALL
from tests.helpers.sharded_steps import Ways, on_ranks, save_gradients
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


def mix_on_ranks(directory: str, dtype: torch.dtype, backend: str) -> None:
    """Compare with the mixture of all experts: tokens of all kinds, of one expert alone, and none on some ranks."""
    with session() as ranks:
        group, number = dist.group.WORLD, 2 * ranks.world
        assert group is not None
        own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        gate_up, down = (normal(shape, 1, dtype) for shape in ((number, 2 * 24, 16), (number, 16, 24)))
        for kind in ("random", "one", "some have none"):
            tokens, weights, experts = tokens_of(kind, ranks, dtype, number)
            whole = [each.clone().requires_grad_() for each in (tokens, weights, gate_up, down)]
            parts = [each.clone().requires_grad_() for each in (tokens, weights, gate_up[own], down[own])]
            expected = mixture(whole[0], whole[1], experts, whole[2], whole[3], "loop")
            found = parallel_mixture(parts[0], parts[1], experts, parts[2], parts[3], group, backend)
            upstream = normal(found.shape, 9 + ranks.rank, dtype)
            expected.backward(upstream)
            found.backward(upstream)
            for matrices in whole[2:]:
                dist.all_reduce(matrices.grad)
            near = [(found, expected), *((part.grad, each.grad) for part, each in zip(parts[:2], whole[:2], strict=True))]
            near += [(part.grad, each.grad[own]) for part, each in zip(parts[2:], whole[2:], strict=True)]  # type: ignore[index]
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            for place, (ours, theirs) in enumerate(near):
                assert ours is not None
                assert theirs is not None
                close(ours, theirs, tolerance, f"{kind}, tensor {place}")


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, atol=tolerance * largest, rtol=tolerance, msg=lambda text: f"{what}: {text}")


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_of(kind: str, ranks: Ranks, dtype: torch.dtype, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of a rank, their weights and their two experts: any, always the last two, or any on the last rank alone."""
    size = 0 if kind == "some have none" and ranks.rank < ranks.world - 1 else 11 + ranks.rank
    logits = normal((size, number), 5 + ranks.rank, torch.float32)
    if kind == "one":
        logits[:, :-2] = -20
    weights, experts = route(logits, 2)
    return normal((size, 16), 3 + ranks.rank, dtype), weights, experts


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "loop"), (torch.bfloat16, "loop"), (torch.bfloat16, "grouped_mm")])
def test_tokens_that_travel_are_mixed_as_those_that_stay(tmp_path: Path, dtype: torch.dtype, backend: str) -> None:
    on_ranks(2, mix_on_ranks, str(tmp_path), dtype, backend)


@pytest.mark.slow
def test_divided_experts_in_bfloat16_come_as_close_as_it_allows(tmp_path: Path) -> None:
    way = {"compute_dtype": "bfloat16", "recompute": "full"}
    compared: Ways = {"whole": way | {"expert_parallel": 1}, "divided": way | {"expert_parallel": 2}}
    on_ranks(
        4, save_gradients, str(tmp_path), str(tmp_path / "four.pt"), compared, {"router": {"balance_coef": 0.5, "z_coef": 0.1}}
    )
    found = torch.load(tmp_path / "four.pt", weights_only=True)
    assert torch.equal(found["divided"]["counts"], found["whole"]["counts"])
    for name, value in found["whole"].items():
        distance = float((found["divided"][name].float() - value.float()).norm())
        assert distance <= 0.02 * float(value.float().norm()) + 1e-6, name


def save_compiled(directory: str, out: str, ways: Ways, changes: dict[str, Any]) -> None:
    """`save_gradients` with graphs for which no code is generated, which would take minutes."""
    COMPILED.update(graphs("aot_eager"))
    save_gradients(directory, out, ways, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "train"), [(2, {}), (4, {}), (4, {"shard_over": 2})], ids=["all", "sharded", "copies"])
def test_compiled_layers_with_divided_experts_give_the_gradients_of_one_process(
    tmp_path: Path, world: int, train: Mapping[str, Any]
) -> None:
    """In float32, where the products of experts are not compiled."""
    compared = {name: way | {"compile": True} for name, way in ways(2, (1, 8), **train).items() if way["recompute"] != "selective"}
    compare(tmp_path, world, compared, save_compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        {"compute_dtype": "bfloat16", "expert_parallel": 2},
        {"compute_dtype": "bfloat16", "precision": "split", "expert_parallel": 2, "shard_over": 2},
        {"compute_dtype": "bfloat16", "precision": "split", "shard_over": 2},
    ],
    ids=["experts", "split, copies", "split, no experts"],
)
def test_compiled_layers_in_bfloat16_come_as_close_as_it_allows(tmp_path: Path, train: Mapping[str, Any]) -> None:
    """Every token goes to all experts: a choice that is nearly tied falls otherwise when a product is rounded otherwise."""
    compared: Ways = {
        f"{recompute} {compiled}": {**train, "recompute": recompute, "compile": compiled}
        for recompute in RECOMPUTE
        for compiled in (False, True)
    }
    on_ranks(4, save_compiled_of_all_experts, str(tmp_path), str(tmp_path / "four.pt"), compared, {"router": {"balance_coef": 0.0}})
    found = torch.load(tmp_path / "four.pt", weights_only=True)
    for recompute in RECOMPUTE:
        compiled = found[f"{recompute} True"]
        for name, value in found["none False"].items():
            distance = float((compiled[name].float() - value.float()).norm())
            assert distance <= 0.02 * float(value.float().norm()) + 1e-6, (recompute, name)


def save_compiled_of_all_experts(directory: str, out: str, ways: Ways, changes: dict[str, Any]) -> None:
    SMALL["num_experts_per_tok"] = SMALL["num_local_experts"]
    save_compiled(directory, out, ways, changes)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_divided_experts_give_the_gradients_of_one_process_with_every_objective(tmp_path: Path, objective: str) -> None:
    changes = {"dpo": {"reference": "online"}} if objective == "dpo" else {}
    compare(tmp_path, 4, ways(2, (4,)), objective=objective, **changes)


@pytest.mark.slow
def test_a_run_goes_on_with_the_experts_divided_otherwise(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 12, "save_every": 4, "keep_checkpoints": 3, "clip_norm": 0.5}
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
    again(4, 2, 4, shard_over=2)
    again(2, 2, 8)


@pytest.mark.slow
def test_muon_steps_along_whole_experts_that_are_divided(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "save_every": None, "optimizer": "muon"}
    one = small_job(tmp_path, run="one", train=settings)
    train_stage(one)
    train_on_ranks(tmp_path, 4, "next_token", "four", train=settings | {"expert_parallel": 2})
    assert losses_of(small_job(tmp_path, run="four", train=settings)) == pytest.approx(losses_of(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp32-bf16m", "split", "published"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    settings: dict[str, Any] = {
        "steps": 8, "save_every": 4, "keep_checkpoints": 2, "expert_parallel": 2, "precision": precision, "recompute": "selective"
    }  # fmt: skip
    small_job(tmp_path, train=settings)
    whole = train_on_ranks(tmp_path, 4, "next_token", "run", train=settings)["weights"]
    last = tmp_path / "run" / "checkpoints" / "step-00000008"
    last.rename(last.with_name("away"))
    again = train_on_ranks(tmp_path, 4, "next_token", "run", train=settings)["weights"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert again["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 48, 32)


@pytest.mark.parametrize(("rank", "number", "shard_over"), [(2, 2, None), (3, 4, None), (3, 2, 2)])
def test_a_rank_has_the_parts_of_its_experts_alone(tmp_path: Path, rank: int, number: int, shard_over: int | None) -> None:
    job = small_job(tmp_path, "sft", train={"expert_parallel": number, "shard_over": shard_over})
    whole = dict(initial_model(job.model_config, job.init, job.seed, CPU, False, SHA).named_parameters())
    shards = shard_over or 4
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        policy, _, _ = policy_of(job, True, Ranks(rank, 4, CPU))
        written = {piece.name: piece.offsets for piece in pieces_of(dict(policy.model.named_parameters()), is_main=False)}
        assert len(written) == len(whole) // (4 // shards)
        for name, parameter in policy.model.named_parameters():
            region = share_of(parameter.shape, rank % shards, shards, number)
            assert isinstance(parameter, DTensor)
            assert parameter.shape == whole[name].shape
            assert torch.equal(parameter.to_local(), whole[name][region]), name
            assert written.get(name) in (None, tuple(part.start for part in region)), name
            if ".experts." in name:
                first = (rank % number) * 4 // number
                assert region[0] == slice(first, first + 4 // number)
                assert parameter.to_local().numel() * shards == parameter.numel()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("train", "processes", "model", "reason"),
    [
        ({"expert_parallel": 4}, 4, {"num_local_experts": 6}, "4 does not divide the model's 6 experts; give one that does, or 1"),
        ({"expert_parallel": 2}, 1, {}, "2 needs a multiple of 2 processes .* there is 1; start so many, or give 1"),
        ({"expert_parallel": 4}, 6, {}, "4 needs a multiple of 4 processes .* there are 6; start so many, or give 1"),
        ({"expert_parallel": 4, "shard_over": 2}, 4, {}, "4 needs a multiple of 4 .* there are 2; start so many, or give 1"),
        ({"expert_parallel": 2}, 14, {}, "2 leaves 7 processes to share each expert, and neither its width 24 nor the model's 32"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_made(
    train: dict[str, Any], processes: int, model: dict[str, Any], reason: str
) -> None:
    stage, config = small_stage(train=train), small_config(**model)
    with pytest.raises(UserError, match=f"^small: train.expert_parallel {reason}"):
        check_ranks(stage, processes, config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": {"precision": "split-host"}}, "split-host is for one process, and expert_parallel for several; give split"),
        ({"train": {"expert_parallel": 3}}, "Input should be 1, 2, 4 or 8"),
        ({"train": {"expert_parallel": True}}, "Input should be 1, 2, 4 or 8"),
        ({"lora": {}}, "lora is for one process, and train.expert_parallel for several"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_the_recipe(changes: dict[str, Any], reason: str) -> None:
    changes = {**changes, "train": {"expert_parallel": 2, **changes.get("train", {})}}
    with pytest.raises(ValueError, match=reason):
        small_stage(**changes)


@pytest.mark.parametrize("stated", ["x", "0", "-1", "", "²", "2.0", "9" * 30, "9" * 5000])
def test_a_launcher_that_states_no_number_of_processes_is_named(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", stated)
    with pytest.raises(UserError, match=r"WORLD_SIZE .* is no number of processes; unset it"):
        processes_started()


def test_a_number_of_processes_without_the_rest_of_what_a_launcher_says_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"WORLD_SIZE 2 is set without RANK, MASTER_PORT: processes cannot meet; unset it"):
        processes_started()
