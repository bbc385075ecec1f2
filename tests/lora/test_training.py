"""Adapters in the loop: the engine computes what PEFT's layers compute, trains nothing else, and goes on bit for bit."""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from keural.errors import UserError
from keural.recipe import StageSpec
from keural.train.loop import train_step
from keural.train.micro_batches import micro_batches
from keural.train.network.layers import COMPILED, graphs
from keural.train.network.policy import Policy
from keural.train.processes.parallel import check_ranks
from keural.train.stage.job import StageJob
from keural.train.trainer import Trainer
from tests.helpers.train_small import (
    LENGTH,
    calling_before_each_step,
    losses_of,
    metrics_of,
    open_run,
    random_model,
    small_config,
    small_job,
    small_stage,
    start,
    step_gradients,
    train_stage,
    weights_of,
)

ALL = ["attention", "experts", "router"]
LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "targets": ALL}
ROUTER: dict[str, Any] = {"balance_coef": 0.5, "z_coef": 0.1}


def shake(trainer: Trainer) -> Trainer:
    """Adapters that are not zero, as after some training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def by_peft(trainer: Trainer) -> Trainer:
    """The same weights, computed by transformers' layers inside of PEFT's."""
    old = trainer.policy
    return dataclasses.replace(trainer, policy=Policy(old.model, old.compute_dtype, None, old.adapter).train())


@pytest.mark.parametrize(
    ("objective", "recompute", "targets"),
    [
        ("sft", "none", ALL),
        ("sft", "selective", ["attention", "experts"]),
        ("dpo", "full", ALL),
        ("dpo", "none", ["experts"]),
        ("sft", "none", ["attention"]),
        ("sft", "none", ["router"]),
    ],
)
def test_losses_and_gradients_are_those_of_pefts_own_forward_and_backward(
    tmp_path: Path, objective: str, recompute: str, targets: list[str]
) -> None:
    settings = {"router": ROUTER, "train": {"micro_batch_tokens": 2 * LENGTH, "recompute": recompute}}
    trainer = open_run(small_job(tmp_path, objective, lora={**LORA, "targets": targets}, **settings)).trainer
    base_losses, _ = step_gradients(trainer)
    shake(trainer)
    losses, gradients = step_gradients(trainer)
    expected_losses, expected = step_gradients(by_peft(trainer))
    torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=1e-5)
    assert abs(float(losses["loss"] - base_losses["loss"])) > 1e-4, "the adapters act"
    assert gradients.keys() == expected.keys()
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_the_grouped_product_gives_what_the_loop_gives(tmp_path: Path) -> None:
    lora = {**LORA, "rank": 8}
    trainer = shake(open_run(small_job(tmp_path, "sft", lora=lora, train={"compute_dtype": "bfloat16"})).trainer)
    by_loop = step_gradients(trainer)
    engine = trainer.policy.engine
    assert engine is not None
    assert engine.experts == "loop"  # type: ignore[attr-defined]
    policy = Policy(trainer.policy.model, torch.bfloat16, dataclasses.replace(engine, experts="grouped_mm"))  # type: ignore[type-var]
    losses, gradients = step_gradients(dataclasses.replace(trainer, policy=policy.train()))
    torch.testing.assert_close(losses, by_loop[0], atol=1e-2, rtol=1e-2)
    for name, gradient in by_loop[1].items():
        assert (gradients[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_layers_with_adapters_compile_as_one_graph(tmp_path: Path, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPILED, recompute, graphs("aot_eager")[recompute])
    train = {"compute_dtype": "bfloat16", "recompute": recompute}
    trainer = shake(open_run(small_job(tmp_path, "sft", lora={**LORA, "rank": 8}, train=train)).trainer)
    old = trainer.policy
    found = []
    for compiled in (False, True):
        engine = dataclasses.replace(old.engine, experts="grouped_mm", compiled=compiled)  # type: ignore[type-var]
        policy = Policy(old.model, torch.bfloat16, engine, old.adapter).train()  # type: ignore[arg-type]
        found.append(step_gradients(dataclasses.replace(trainer, policy=policy))[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=0.05 * float(gradient.abs().max()), rtol=0)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_base_in_bfloat16_gives_the_same_bits(tmp_path: Path, objective: str) -> None:
    outcomes = []
    for base in ("float32", "bfloat16"):
        lora = {**LORA, "rank": 8, "base_dtype": base}
        job = small_job(
            tmp_path, objective, run=base, lora=lora, train={"compute_dtype": "bfloat16", "steps": 4, "save_every": None}
        )
        result = train_stage(job)
        stored = {parameter.dtype for name, parameter in result.model.named_parameters() if name.endswith("down_proj")}
        assert stored == {getattr(torch, base)}
        outcomes.append((losses_of(job), {name: value for name, value in weights_of(result).items() if "lora_" in name}))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(value, outcomes[1][1][name]) for name, value in outcomes[0][1].items())


def test_only_adapters_are_trained_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = random_model(seed=7, scale=3.0).state_dict()
    result = train_stage(small_job(tmp_path, "sft", lora=LORA, train={"lr": 1e-2, "weight_decay": 0.5}))
    after = weights_of(result)
    for name, value in before.items():
        if name != "lm_head.weight":
            wrapped = [key for key in after if key.replace(".base_layer", "") == name]
            assert torch.equal(after[wrapped[0]], value), name
    adapters = {name: value for name, value in after.items() if "lora_" in name}
    assert all(value.abs().max() > 0 for value in adapters.values())
    assert result.trained == sum(value.numel() for value in adapters.values())
    assert f"small: trains {result.trained:,} of" in capsys.readouterr().out


def test_first_factors_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        job = dataclasses.replace(small_job(tmp_path, "sft", lora=LORA), seed=seed)
        weights = dict(open_run(job).trainer.policy.model.named_parameters())
        return weights["model.layers.1.mlp.experts.lora_A.default.weight"].detach().clone()

    torch.manual_seed(1)
    found = first(11)
    torch.manual_seed(2)
    assert torch.equal(first(11), found)
    assert not torch.equal(first(12), found)


class Stop(Exception):
    """Ends a stage between two steps; unlike a second Ctrl-C it lets the checkpoint become whole that is being written."""


def interrupted(job: StageJob, step: int) -> None:
    def stop(now: int) -> None:
        if now == step:
            raise Stop

    with calling_before_each_step(stop), pytest.raises(Stop):
        train_stage(job)


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_a_stage_that_was_stopped_ends_with_the_same_adapter_bit_for_bit(tmp_path: Path, objective: str) -> None:
    settings: dict[str, Any] = {"lora": LORA, "train": {"steps": 6, "save_every": 2, "evaluate_every": 3}, "heldout": True}
    whole = small_job(tmp_path, objective, run="whole", **settings)
    expected = weights_of(train_stage(whole))
    job = small_job(tmp_path, objective, **settings)
    interrupted(job, 5)
    found = weights_of(train_stage(job))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses_of(job) == losses_of(whole)
    assert metrics_of(job)[-1]["heldout"] == metrics_of(whole)[-1]["heldout"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_kill_9_at_random_moments_then_the_same_command_gives_the_same_adapter(tmp_path: Path, objective: str) -> None:
    moments = random.Random(5)
    settings: dict[str, Any] = {"lora": LORA, "train": {"steps": 12, "save_every": 2}}
    small_job(tmp_path, objective, **settings)
    for _ in range(8):
        process = start({"directory": str(tmp_path), "objective": objective, "pause": 0.05, **settings})
        time.sleep(moments.uniform(0.5, 4.0))
        process.kill()
        process.join()
    found = weights_of(train_stage(small_job(tmp_path, objective, **settings)))
    expected = weights_of(train_stage(small_job(tmp_path, objective, run="whole", **settings)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_holds_the_adapter_and_its_moments_and_knows_its_base(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": LORA, "train": {"steps": 6, "save_every": 2}}
    job = small_job(tmp_path, "sft", **settings)
    interrupted(job, 5)
    newest = job.run_dir / "checkpoints" / "step-00000004"
    header = next(newest.glob("*.safetensors")).read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys() - {"__metadata__"}
    assert {name.split(".")[0] for name in names} == {"model", "exp_avg", "exp_avg_sq"}
    assert all("lora_" in name for name in names)
    random_model(seed=8, scale=3.0).save_pretrained(tmp_path / "init")
    with pytest.raises(UserError, match="trained beside other frozen weights"):
        train_stage(job)


@pytest.mark.parametrize("router", ["attention", "router"])
def test_router_losses_reach_the_adapters_and_are_reported(tmp_path: Path, router: str) -> None:
    gradients = {}
    for coefficient in (0.0, 1.0):
        settings = {"router": {"balance_coef": coefficient, "z_coef": 0.0}, "lora": {**LORA, "targets": [router]}}
        trainer = shake(open_run(small_job(tmp_path, "sft", run=f"{coefficient}", **settings)).trainer)
        gradients[coefficient] = step_gradients(trainer)[1]
    assert max(float((gradients[1.0][name] - gradients[0.0][name]).abs().max()) for name in gradients[0.0]) > 1e-4


def test_the_reference_with_the_adapter_off_is_the_base_to_the_bit(tmp_path: Path) -> None:
    """The base model by itself, computed by the same engine, is the oracle; training has moved the adapters away from it."""

    def values(trainer: Trainer) -> torch.Tensor:
        (micro,) = micro_batches(trainer.stream.batch(0), None, torch.device("cpu"))
        found: Any = trainer.references
        return torch.as_tensor(found(micro.pairs.sequences))

    whole = open_run(small_job(tmp_path, "dpo", run="whole", train={"recompute": "selective"})).trainer
    trainer = open_run(small_job(tmp_path, "dpo", lora=LORA)).trainer
    assert torch.equal(values(trainer), values(whole))
    assert (values(trainer) < 0).all()
    batch = trainer.stream.batch(0)
    (micro,) = micro_batches(batch, None, torch.device("cpu"))
    before = trainer.policy(micro).logprobs.detach()
    for step in range(3):
        train_step(trainer, step)
    with trainer.policy.without_adapter():
        off = trainer.policy(micro).logprobs.detach()
    assert torch.equal(off, before)
    assert not torch.equal(trainer.policy(micro).logprobs.detach(), before)
    assert losses_of_first_step(small_job(tmp_path, "dpo", run="first", lora=LORA)) == pytest.approx(np.log(2), abs=1e-7)


def test_the_online_reference_is_the_adapter_off_and_gives_the_same_losses(tmp_path: Path) -> None:
    losses, adapters = [], []
    for reference in ("cached", "online"):
        job = small_job(tmp_path, "dpo", run=reference, lora=LORA, dpo={"reference": reference}, train={"steps": 4})
        result = train_stage(job)
        losses.append(losses_of(job))
        adapters.append({name: value for name, value in weights_of(result).items() if "lora_" in name})
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def losses_of_first_step(job: StageJob) -> float:
    return train_step(open_run(job).trainer, 0).loss


def test_experts_that_get_no_token_have_adapters_with_gradients_of_zero(tmp_path: Path) -> None:
    job = small_job(tmp_path, "sft", lora={**LORA, "targets": ["experts"]})
    trainer = shake(open_run(job).trainer)
    with torch.no_grad():
        for name, parameter in trainer.policy.model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()  # all experts are equal, so every token takes the same two
    losses, gradients = step_gradients(trainer)
    idle = losses["counts"][0] == 0
    assert idle.sum() == 2
    down = gradients["model.layers.0.mlp.experts.base_layer.lora_A.default.weight"].view(4, 4, -1)
    assert (down[idle] == 0).all()
    assert (down[~idle].abs().amax((1, 2)) > 0).all()
    train_step(trainer, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_from": "random"}, "init_from must be an earlier stage"),
        ({"train": {"precision": "split"}}, "no use for train.precision split"),
        ({"lora": {"base_dtype": "bfloat16"}}, "needs train.compute_dtype bfloat16"),
        ({"train": {"compile": True}}, "no compiled grouped product"),
        ({"lora": {"rank": 12}, "train": {"compute_dtype": "bfloat16"}}, "multiple of 8"),
        ({"router": {"freeze": True}}, "contradict each other"),
        ({"lora": {"targets": ["attention", "attention"]}}, "names a target twice"),
        ({"lora": {"targets": []}}, "at least 1 item"),
        ({"lora": {"targets": ["mlp"]}}, "attention"),
        ({"lora": {"rank": 0}}, "greater than 0"),
        ({"lora": {"rank": 10**6}}, "4096"),
        ({"lora": {"alpha": 10**12}}, "at most"),
        ({"lora": {"dropout": 0.1}}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes: dict[str, Any], reason: str) -> None:
    lora = {**LORA, **changes.pop("lora", {})}
    with pytest.raises(ValidationError, match=reason):
        small_stage("sft", lora=lora, **changes)


def test_several_processes_are_refused() -> None:
    stage: StageSpec = small_stage("sft", lora=LORA)
    with pytest.raises(UserError, match="lora is for one process, and there are 2"):
        check_ranks(stage, 2, small_config())
