"""`split` on several ranks: the same bits as on one, given the same gradients; checkpoints move between numbers of ranks."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from keural.train.checkpoints.checkpoints import tensors
from keural.train.checkpoints.pieces import pieces_of
from keural.train.loop import train_step
from keural.train.memory.network import network_of_config
from keural.train.memory.parts import stored
from keural.train.optimization.half_moments import part
from keural.train.optimization.optimizer import gradient_norm, is_decayed, stored_in_halves
from keural.train.optimization.split import SplitAdamW, split
from keural.train.processes.modes import scale_block
from keural.train.processes.ranks import Ranks, session
from keural.train.stage.run import StageRun
from keural.train.stage.signals import StopSignals
from keural.train.stage.training import open_stage
from tests.helpers.sharded_steps import on_ranks
from tests.helpers.train_small import LENGTH, losses_of, open_run, small_job, step_gradients, train_stage
from tests.train.test_ranks import train_on_ranks

TRAIN: dict[str, Any] = {
    "precision": "split", "recompute": "selective", "micro_batch_tokens": 4 * LENGTH, "steps": 8, "save_every": 4, "lr": 3e-3,
}  # fmt: skip
CPU = torch.device("cpu")


def opened(directory: str, ranks: Ranks, run: str, **train: Any) -> StageRun:
    """A stage before its next step, on these ranks."""
    settings = {"run": run, "train": TRAIN | train}
    if ranks.is_main:
        small_job(Path(directory), **settings)
    ranks.barrier()
    return open_stage(small_job(Path(directory), **settings), ranks, StopSignals(ranks.world), time.monotonic())


def whole(state: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint put together from the parts of all ranks."""
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    for pieces in ranks.gather([(piece.name, piece.offsets, piece.values.cpu()) for piece in pieces_of(state, ranks.is_main)]):
        for name, offsets, values in pieces:
            region = tuple(slice(start, start + size) for start, size in zip(offsets, values.shape, strict=True))
            found[name][region] = values
    return found


def state_of(run: StageRun, ranks: Ranks) -> dict[str, torch.Tensor]:
    return whole(tensors(run.trainer.policy.model, run.trainer.optimizer), ranks)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step_beside_one(directory: str, shard_over: int | None, expert_parallel: int = 1) -> None:
    """Three steps by parts and by whole tensors with the same gradients: masters, codes and scales are the same bits."""
    with session() as ranks:
        run = opened(directory, ranks, f"beside-{ranks.world}", shard_over=shard_over, expert_parallel=expert_parallel)
        ours, model = run.trainer.optimizer, run.trainer.policy.model
        assert isinstance(ours, SplitAdamW)
        named = dict(model.named_parameters())
        halves = stored_in_halves(model)
        masters = {name: full(ours.master(parameter)).clone() for name, parameter in named.items()}
        wholes = {name: nn.Parameter(split(master)[0] if name in halves else master.clone()) for name, master in masters.items()}
        theirs = SplitAdamW(
            wholes.values(), masters=list(masters.values()), is_decayed=is_decayed,
            block_of=lambda parameter: scale_block(parameter.shape) if parameter.dtype == torch.bfloat16 else 1,
        )  # fmt: skip
        for step in range(3):
            step_gradients(run.trainer, step)
            norm = gradient_norm(named.values())
            for name, parameter in named.items():
                assert parameter.grad is not None
                assert parameter.grad.dtype == parameter.dtype
                wholes[name].grad = full(parameter.grad).clone()
            ours.step(3e-3, 0.05, norm)
            theirs.step(3e-3, 0.05, norm)
        found = state_of(run, ranks)
        expected = theirs.state_tensors({parameter: name for name, parameter in wholes.items()})
        expected |= {f"model.{name}": parameter.detach() for name, parameter in wholes.items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        planned = stored(network_of_config(model.config), "split", shard_over or ranks.world)
        taken = sum(
            part(tensor).nbytes for tensor in ours.state_tensors({parameter: name for name, parameter in named.items()}).values()
        )
        assert max(ranks.gather(taken)) == planned["master"] + planned["moments"]


def test_two_ranks_step_bit_for_bit_as_one_with_the_same_gradients(tmp_path: Path) -> None:
    on_ranks(2, step_beside_one, str(tmp_path), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "shard_over", "experts"), [(4, None, 1), (4, 2, 1), (3, None, 1), (2, None, 2), (4, None, 2), (4, 2, 2), (4, None, 4)]
)
def test_any_number_of_ranks_steps_bit_for_bit_as_one(tmp_path: Path, world: int, shard_over: int | None, experts: int) -> None:
    on_ranks(world, step_beside_one, str(tmp_path), shard_over, experts)


def take_over(directory: str, out: str, written_by_one: str, experts: int) -> None:
    """Two steps and a checkpoint on these ranks; and what they load of a checkpoint that one process wrote."""
    with session() as ranks:
        run = opened(directory, ranks, "many", expert_parallel=experts)
        for step in range(2):
            train_step(run.trainer, step)
        run.progress.step = 2
        run.checkpoints.save(run.trainer.policy.model, run.trainer.optimizer, run.progress)
        written = state_of(run, ranks)
        loaded = state_of(opened(directory, ranks, written_by_one, expert_parallel=experts), ranks)
        if ranks.is_main:
            torch.save({"written": written, "loaded": loaded}, out)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "experts"), [(2, 1), (2, 2), (4, 2)])
def test_a_checkpoint_goes_from_one_process_to_several_and_back_with_every_bit(tmp_path: Path, world: int, experts: int) -> None:
    alone = Ranks(0, 1, CPU)
    one = opened(str(tmp_path), alone, "one")
    for step in range(2):
        train_step(one.trainer, step)
    one.progress.step = 2
    one.checkpoints.save(one.trainer.policy.model, one.trainer.optimizer, one.progress)
    on_ranks(world, take_over, str(tmp_path), str(tmp_path / "two.pt"), "one", experts)
    two = torch.load(tmp_path / "two.pt", weights_only=True)

    back = open_run(small_job(tmp_path, run="many", train=TRAIN))

    for found, expected in ((two["loaded"], state_of(one, alone)), (state_of(back, alone), two["written"])):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert back.trainer.optimizer.steps == back.progress.step == 2  # type: ignore[union-attr]
    assert any(value.any() for name, value in two["written"].items() if name.startswith("moment."))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "experts"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_train_what_one_does_as_near_as_bfloat16_allows(tmp_path: Path, world: int, experts: int) -> None:
    one = small_job(tmp_path, run="one", train=TRAIN)
    train_stage(one)
    outcome = train_on_ranks(tmp_path, world, "next_token", "two", train=TRAIN | {"expert_parallel": experts})
    two = small_job(tmp_path, run="two", train=TRAIN)

    assert losses_of(two) == pytest.approx(losses_of(one), rel=2e-3)
    back = open_run(small_job(tmp_path, run="two", train=TRAIN)).trainer
    assert isinstance(back.optimizer, SplitAdamW)
    for name, parameter in back.policy.model.named_parameters():
        assert torch.equal(outcome["weights"][name], back.optimizer.master(parameter)), name
