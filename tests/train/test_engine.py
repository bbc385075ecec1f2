"""A policy computed by the training engine is the one computed by the model's layers, and `split` trains, saves and resumes."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from keural.errors import UserError
from keural.train.micro_batches import micro_batches
from keural.train.network.engine import Engine, engine_for
from keural.train.network.policy import Policy, needs_engine
from keural.train.optimization.split import SplitAdamW
from keural.train.processes.ranks import Ranks
from keural.train.stage.job import StageJob
from keural.train.trainer import Trainer
from tests.helpers.train_small import (
    LENGTH,
    kill_before_step,
    losses_of,
    metrics_of,
    open_run,
    small_job,
    small_stage,
    step_gradients,
    train_stage,
    weights_of,
)

CPU = torch.device("cpu")
OBJECTIVES = ("next_token", "sft", "dpo")
SPLIT: dict[str, Any] = {"precision": "split"}


def by_engine(trainer: Trainer, **changes: Any) -> Trainer:
    """The same weights, computed by the engine."""
    spec = trainer.stage.train
    engine = engine_for(spec, trainer.policy.model.config, CPU, trainer.objective.uniform)
    policy = Policy(trainer.policy.model, trainer.policy.compute_dtype, dataclasses.replace(engine, **changes)).train()
    return dataclasses.replace(trainer, policy=policy)


def move_away_from_reference(trainer: Trainer) -> None:
    """A policy that equals its reference has margins of zero, whose signs, which `reward_accuracy` counts, are rounding."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_engine_and_model_give_the_same_losses_and_gradients(tmp_path: Path, objective: str, recompute: str) -> None:
    router = {"balance_coef": 0.5, "z_coef": 0.1}
    train = {"micro_batch_tokens": 2 * LENGTH}
    trainer = open_run(small_job(tmp_path, objective, router=router, train=train)).trainer
    assert trainer.policy.engine is None
    move_away_from_reference(trainer)
    losses, gradients = step_gradients(trainer)
    found_losses, found = step_gradients(by_engine(trainer, recompute=recompute))
    torch.testing.assert_close(found_losses, losses, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("experts", ["loop", "grouped_mm"])
def test_engine_in_bfloat16_over_float32_weights_is_as_close_to_float32_as_autocast(tmp_path: Path, experts: str) -> None:
    def distance(gradients: dict[str, torch.Tensor]) -> float:
        return max(float((gradients[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    # of these conversations no token is so near a tie of two experts that rounding sends it to another one
    exact = step_gradients(open_run(small_job(tmp_path, "sft", number=50, run="exact")).trainer)[1]
    trainer = open_run(small_job(tmp_path, "sft", run="rounded", train={"compute_dtype": "bfloat16"})).trainer
    autocast = distance(step_gradients(trainer)[1])
    assert 0 < distance(step_gradients(by_engine(trainer, experts=experts))[1]) < 2 * autocast


def test_a_loss_that_weighs_labels_differently_takes_the_second_pass_over_the_head(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, "dpo")).trainer
    right, wrong = step_gradients(by_engine(trainer))[1], step_gradients(by_engine(trainer, uniform=True))[1]
    name = "model.embed_tokens.weight"
    assert not torch.allclose(right[name], wrong[name], rtol=0.1), "the test above can tell"


def test_who_computes() -> None:
    def engine(device: str, **train: Any) -> bool:
        return needs_engine(small_stage(train=train).train, Ranks(0, 1, torch.device(device)))

    assert not engine("cpu")
    assert not engine("cpu", compute_dtype="bfloat16", recompute="full")
    assert engine("cpu", recompute="selective")
    assert engine("cpu", precision="split")
    assert not engine("cuda")
    assert engine("cuda", compute_dtype="bfloat16")


def test_the_recipe_says_how_the_engine_computes(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, train={"recompute": "selective"})).trainer
    assert trainer.policy.engine == Engine(torch.float32, "selective", False, "documents", "loop", uniform=True)
    (tmp_path / "dpo").mkdir()
    trainer = open_run(small_job(tmp_path / "dpo", "dpo", train=SPLIT)).trainer
    assert trainer.policy.engine == Engine(torch.bfloat16, "none", False, "documents", "loop", uniform=False)


def test_matrices_are_stored_in_bfloat16_norms_and_routers_in_float32_and_masters_are_the_initial_weights(tmp_path: Path) -> None:
    whole = open_run(small_job(tmp_path, run="whole")).trainer
    trainer = open_run(small_job(tmp_path, train=SPLIT)).trainer
    assert isinstance(trainer.optimizer, SplitAdamW)
    for (name, parameter), expected in zip(trainer.policy.model.named_parameters(), whole.policy.model.parameters(), strict=True):
        wide = "norm" in name or name.endswith("gate.weight")
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert torch.equal(trainer.optimizer.master(parameter), expected)
    decayed = {id(chunk.parameter) for chunk in trainer.optimizer.chunks if chunk.decayed}
    assert decayed == {id(p) for name, p in trainer.policy.model.named_parameters() if "norm" not in name}


@pytest.mark.parametrize("objective", ["next_token", pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_split_learns_as_float32_does(tmp_path: Path, objective: str) -> None:
    results = []
    for precision in ("fp32", "split"):
        train = {"steps": 40, "lr": 5e-3, "save_every": None, "precision": precision}
        results.append(train_stage(small_job(tmp_path, objective, run=precision, heldout=True, train=train)))
    assert results[1].loss_last < 0.9 * results[1].loss_first
    assert results[1].loss_last == pytest.approx(results[0].loss_last, rel=0.03)
    assert results[1].heldout["loss"] == pytest.approx(results[0].heldout["loss"], rel=0.03)


def test_the_result_has_the_float32_masters(tmp_path: Path) -> None:
    result = train_stage(small_job(tmp_path, train=SPLIT))
    weights = weights_of(result)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


SETTINGS: dict[str, Any] = {
    "train": {"steps": 10, "save_every": 3, "recompute": "selective", "micro_batch_tokens": 4 * LENGTH, **SPLIT},
    "router": {"load": "lagged", "balance_coef": 0.5},
    "heldout": True,
}


@pytest.mark.parametrize("objective", ["next_token", pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_split_killed_and_resumed_gives_the_same_bits(
    tmp_path: Path, objective: str, killed: Callable[[Path, dict[str, Any]], None]
) -> None:
    killed(tmp_path, {"objective": objective, **SETTINGS})
    job = small_job(tmp_path, objective, **SETTINGS)
    weights = weights_of(train_stage(job))
    whole = small_job(tmp_path, objective, run="whole", **SETTINGS)
    expected = weights_of(train_stage(whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert losses_of(job) == losses_of(whole)
    assert metrics_of(job)[-1]["heldout"] == metrics_of(whole)[-1]["heldout"]


@pytest.fixture
def killed() -> Callable[[Path, dict[str, Any]], None]:
    """Trains a job in a process of its own and kills that by SIGKILL after its fifth step."""

    return lambda directory, spec: kill_before_step(directory, 5, spec)


def test_a_checkpoint_of_split_holds_remainders_and_8_bit_moments(tmp_path: Path) -> None:
    job = small_job(tmp_path, train={"keep_checkpoints": 3, **SPLIT})
    train_stage(job)
    shutil.rmtree(job.run_dir / "checkpoints" / "step-00000012")
    run = open_run(job)
    optimizer = run.trainer.optimizer
    assert isinstance(optimizer, SplitAdamW)
    assert run.progress.step == optimizer.steps == 8
    kinds = {"remainder": torch.int16, "moment": torch.int8, "square": torch.uint8, "moment_scale": torch.float32}
    for chunk in optimizer.chunks:
        for kind, dtype in kinds.items():
            tensor = getattr(chunk.state, kind)
            if tensor is not None:
                assert tensor.dtype == dtype
                assert tensor.any()


def test_a_flipped_bit_in_a_remainder_is_found(tmp_path: Path) -> None:
    job = small_job(tmp_path, train=SPLIT)
    train_stage(job)
    path = next((job.run_dir / "checkpoints" / "step-00000012").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="differs from its checksum"):
        train_stage(job)


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    train = {"steps": None, "budget_share": 0.5, "save_every": None, **SPLIT}
    job = small_job(tmp_path, train=train, budget_seconds=2.0)
    run = open_run(job)
    fresh = open_run(small_job(tmp_path, run="fresh", train=SPLIT))
    ours, theirs = run.trainer.optimizer, fresh.trainer.optimizer
    assert isinstance(ours, SplitAdamW)
    assert isinstance(theirs, SplitAdamW)
    assert ours.steps == 0
    for chunk, expected in zip(ours.chunks, theirs.chunks, strict=True):
        assert torch.equal(chunk.weight, expected.weight)
        assert all(torch.equal(a, b) for a, b in zip(chunk.state.tensors(), expected.state.tensors(), strict=True))


def test_split_host_is_split_on_a_cpu(tmp_path: Path) -> None:
    results = []
    for precision in ("split", "split-host"):
        results.append(weights_of(train_stage(small_job(tmp_path, run=precision, train={"precision": precision}))))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_selective_recomputation_of_the_recipe_gives_the_same_bits(tmp_path: Path) -> None:
    results = [
        weights_of(train_stage(small_job(tmp_path, run=mode, train={"recompute": mode, **SPLIT})))
        for mode in ("none", "selective", "full")
    ]
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("train", "why"),
    [
        ({"precision": "split", "compute_dtype": "float32"}, "precision split computes in bfloat16; leave compute_dtype out"),
        ({"recompute": "selective", "compile": True}, "recompute selective with compile needs compute_dtype bfloat16"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is called recompute now: full instead of true"),
        ({"precision": "bf16"}, "Input should be 'fp32', 'fp32-bf16m', 'split', 'split-host' or 'published'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(train: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        small_stage(train=train)


def test_a_lagged_load_without_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match="load lagged has no effect with scope micro_batch"):
        small_stage(router={"load": "lagged", "scope": "micro_batch"})


def test_a_resolved_recipe_is_read_again() -> None:
    stage = small_stage(train=SPLIT)
    assert stage.train.compute_dtype == "bfloat16"
    assert type(stage).model_validate(stage.model_dump(exclude={"dpo": True, "kto": True, "sft": True, "train": {"muon"}})) == stage


def test_split_host_on_several_processes_is_refused(tmp_path: Path) -> None:
    job: StageJob = small_job(tmp_path, train=SPLIT | {"precision": "split-host"})
    with pytest.raises(UserError, match="split-host is for one process, and there are 2; set "):
        train_stage(job, Ranks(0, 2, CPU))


def test_micro_batches_know_their_positions_on_the_cpu(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path)).trainer
    for micro in micro_batches(trainer.stream.batch(0), 2 * LENGTH, CPU):
        assert torch.equal(torch.from_numpy(micro.positions), micro.position_ids)
