"""What each precision stores, that steps of any size count in all but the published one, and the same on several ranks."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from keural.train.memory.network import network_of_config
from keural.train.memory.parts import BYTES, memory, stored
from keural.train.memory.stage import own_layout
from keural.train.optimization import half_moments
from keural.train.optimization.half_moments import HalfMomentAdamW
from keural.train.optimization.optimizer import set_step, state_tensors
from keural.train.optimization.split import SplitAdamW
from keural.train.optimization.trainable import trained_parameters
from keural.train.processes.modes import ALONE, SPLIT
from keural.train.reference.online import OnlineReference
from tests.helpers.sharded_steps import on_ranks, save_gradients
from tests.helpers.train_small import losses_of, open_run, small_job, small_stage, step_gradients, train_stage, weights_of
from tests.train.test_ranks import train_on_ranks

HALF: dict[str, Any] = {"precision": "fp32-bf16m"}
PUBLISHED: dict[str, Any] = {"precision": "published"}


def pair(start: torch.Tensor) -> list[torch.optim.AdamW]:
    """Moments in bfloat16 and in float32 over the same weights."""
    found: list[torch.optim.AdamW] = []
    for kind in (HalfMomentAdamW, torch.optim.AdamW):
        found.append(kind([nn.Parameter(start.clone())], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True))
        set_step(found[-1], 0)
    return found


def weight(optimizer: torch.optim.AdamW) -> torch.Tensor:
    found: torch.Tensor = optimizer.param_groups[0]["params"][0]
    return found


def test_the_first_step_is_that_of_torch_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_moments, "CHUNK", 256)
    start, gradient = torch.randn(2, 4, 600, generator=torch.Generator().manual_seed(1))
    ours, theirs = pair(start)
    for optimizer in (ours, theirs):
        weight(optimizer).grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight(ours), weight(theirs), atol=1e-7, rtol=1e-6)
    assert not torch.equal(weight(ours), start)
    assert float(ours.state[weight(ours)]["step"]) == 1


@pytest.mark.parametrize("steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_steps_at_2e_7_move_weights_as_in_float32(steps: int) -> None:
    """Bfloat16 weights, as published, stay where they are."""
    draw = torch.Generator().manual_seed(0)
    start = (torch.randn(8192, generator=draw) * 0.02).bfloat16()
    drift = torch.randn(8192, generator=draw) * 0.3
    ours, theirs = pair(start.float())
    published = torch.optim.AdamW([nn.Parameter(start.clone())], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(steps):
        gradient = drift + torch.randn(8192, generator=draw)
        for optimizer in (ours, theirs, published):
            optimizer.param_groups[0]["lr"] = 2e-7
            weight(optimizer).grad = gradient.to(weight(optimizer).dtype)
            optimizer.step()
    moves = [weight(optimizer).detach().float() - start.float() for optimizer in (ours, theirs, published)]
    assert float((moves[0] - moves[1]).norm() / moves[1].norm()) < 0.01
    assert float((moves[2] - moves[1]).norm() / moves[1].norm()) > 0.9


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


OPTIMIZED = [(name, "adamw") for name in BYTES if name != "split-host"]  # the host of a CPU is its device


@pytest.mark.parametrize(("precision", "optimizer"), [*OPTIMIZED, ("fp32", "muon")])
def test_what_a_model_takes_is_what_is_planned(tmp_path: Path, precision: str, optimizer: str) -> None:
    trainer = open_run(small_job(tmp_path, train={"precision": precision, "optimizer": optimizer})).trainer
    step_gradients(trainer)
    model = trainer.policy.model
    names = trained_parameters(model)

    planned = stored(network_of_config(model.config), precision, 1, optimizer)

    assert bytes_of(names) == planned["weights"]
    assert bytes_of(parameter.grad for parameter in names if parameter.grad is not None) == planned["gradients"]
    assert bytes_of(state_tensors(trainer.optimizer, names).values()) == planned["master"] + planned["moments"]


@pytest.mark.parametrize("precision", ["fp32", "split"])
def test_a_frozen_copy_takes_its_weights_and_nothing_else(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer of its own would be there for a moment, which on few cards is the height."""
    made: list[object] = []
    for kind in (SplitAdamW, torch.optim.AdamW):
        original: Any = kind.__init__

        def counted(self: object, *settings: Any, original: Any = original, **named: Any) -> None:
            made.append(self)
            original(self, *settings, **named)

        monkeypatch.setattr(kind, "__init__", counted)
    job = small_job(tmp_path, "dpo", train={"precision": precision}, dpo={"reference": "online"})
    trainer = open_run(job).trainer
    assert isinstance(trainer.references, OnlineReference)
    copy = trainer.references.policy.model

    planned = memory(network_of_config(copy.config), own_layout(job.stage, 1))

    assert planned.parts["reference"] == planned.parts["weights"] == bytes_of(copy.parameters())
    assert len(made) == 1
    ours, theirs = dict(trainer.policy.model.named_parameters()), dict(copy.named_parameters())
    assert all(torch.equal(ours[name], parameter) and ours[name] is not parameter for name, parameter in theirs.items())


BFLOAT16 = HALF | {"compute_dtype": "bfloat16"}


@pytest.mark.parametrize("settings", [HALF, pytest.param(BFLOAT16, marks=pytest.mark.slow), PUBLISHED])
def test_it_learns_as_float32_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    results = []
    for run, precision in (("fp32", {}), ("other", settings)):
        train = {"steps": 40, "lr": 5e-3, "save_every": None, **precision}
        results.append(train_stage(small_job(tmp_path, run=run, train=train)))
    assert results[1].loss_last < 0.9 * results[1].loss_first
    assert results[1].loss_last == pytest.approx(results[0].loss_last, rel=0.03)


@pytest.mark.parametrize("settings", [HALF, PUBLISHED])
def test_resumed_it_gives_the_same_bits_and_the_result_is_in_float32(tmp_path: Path, settings: dict[str, Any]) -> None:
    job = small_job(tmp_path, train={"keep_checkpoints": 3, **settings})
    expected = weights_of(train_stage(job))
    shutil.rmtree(job.run_dir / "checkpoints" / "step-00000012")
    again = weights_of(train_stage(job))
    assert all(weight.dtype == torch.float32 for weight in again.values())
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())
    in_bfloat16 = [torch.equal(weight, weight.bfloat16().float()) for weight in again.values()]
    assert all(in_bfloat16) == (settings == PUBLISHED)


@pytest.mark.slow
def test_two_ranks_train_what_one_does_and_one_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"steps": 12, "save_every": 6, "keep_checkpoints": 2, **HALF}}
    one, two = (small_job(tmp_path, run=run, **settings) for run in ("one", "two"))
    train_stage(one)
    train_on_ranks(tmp_path, 2, "next_token", "two", **settings)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)
    last = two.run_dir / "checkpoints" / "step-00000012"
    last.rename(last.with_name("moved-away"))
    train_stage(two)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shard_over", [None, 2])
def test_the_published_way_on_several_ranks_has_weights_and_gradients_in_bfloat16(tmp_path: Path, shard_over: int | None) -> None:
    train = PUBLISHED | {"shard_over": shard_over}
    for world in (2, 4):
        on_ranks(world, save_gradients, str(tmp_path), str(tmp_path / f"{world}.pt"), {"way": train}, {})
    two, four = (torch.load(tmp_path / f"{world}.pt", weights_only=True)["way"] for world in (2, 4))
    for name, value in two.items():
        if name.startswith("model."):
            assert value.dtype == four[name].dtype == torch.bfloat16
    assert float(four["gradient_norm"]) == pytest.approx(float(two["gradient_norm"]), rel=0.02)
    whole = torch.stack([value.float().norm() for name, value in four.items() if name.startswith("model.")]).norm()
    assert float(four["gradient_norm"]) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.slow
def test_a_published_result_of_two_ranks_is_in_float32(tmp_path: Path) -> None:
    found = train_on_ranks(tmp_path, 2, "next_token", "two", train={"steps": 3, "save_every": None, **PUBLISHED})
    assert all(weight.dtype == torch.float32 for weight in found["weights"].values())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train": HALF | {"betas": [0.9, 0.999]}}, "cannot hold a second moment that changes as slowly as .* 0.999"),
        ({"train": PUBLISHED | {"compute_dtype": "float32"}}, "published computes in bfloat16"),
        ({"train": PUBLISHED, "router": {"freeze": True}}, "published rounds all weights"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        small_stage(**changes)


def test_second_moments_at_the_largest_beta_that_is_allowed_do_shrink() -> None:
    value = torch.tensor(1.0 + 127 / 128).bfloat16()
    shrunk = (value.float() * 0.99).bfloat16()
    assert shrunk < value
    assert (value.float() * 0.999).bfloat16() == value


def test_modes_of_one_process_are_known_to_the_plan() -> None:
    assert set(ALONE) < set(SPLIT) < set(BYTES)
