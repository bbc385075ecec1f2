"""Experts that get no token: their gradients are zero, they stay where they are, and nothing waits for them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.train_small import LENGTH, metrics_of, open_run, random_model, small_job, step_gradients, train_stage, weights_of
from tests.train.test_ranks import train_on_ranks

SETTINGS: dict[str, Any] = {
    "router": {"freeze": True},
    "train": {"steps": 3, "warmup_steps": 0, "weight_decay": 0.0, "save_every": None, "micro_batch_tokens": 2 * LENGTH},
}


def idle_experts(directory: Path, objective: str) -> torch.Tensor:
    """Make an initial model whose routers hold all experts for equal, so that every token takes the same two; gives the others."""
    model = random_model(seed=7, scale=3.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
    model.save_pretrained(directory / "init")
    losses, gradients = step_gradients(open_run(small_job(directory, objective, run="look", **SETTINGS)).trainer)
    idle = losses["counts"] == 0
    assert (idle.sum(1) == 2).all()
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            gradient = gradients[f"model.layers.{layer}.mlp.experts.{name}"].abs().amax((1, 2))
            assert torch.equal(gradient == 0, idle[layer])
    return idle


def check(directory: Path, idle: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
    before = random_model(seed=7, scale=3.0).state_dict()
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        unmoved = (weights[name] == before[name]).all(-1).all(-1)
        assert torch.equal(unmoved, idle[layer])
    lines = [line for line in metrics_of(small_job(directory, run="run", **SETTINGS)) if "loss" in line]
    assert torch.equal((torch.tensor([line["expert_load"] for line in lines]) == 0).all(0), idle)
    assert {line["dead_experts"] for line in lines} == {int(idle.sum())}


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_one_process(tmp_path: Path, objective: str) -> None:
    idle = idle_experts(tmp_path, objective)
    check(tmp_path, idle, weights_of(train_stage(small_job(tmp_path, objective, **SETTINGS))))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_two_ranks(tmp_path: Path, objective: str) -> None:
    idle = idle_experts(tmp_path, objective)
    check(tmp_path, idle, train_on_ranks(tmp_path, 2, objective, "run", **SETTINGS)["weights"])
