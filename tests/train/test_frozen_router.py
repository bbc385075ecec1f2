"""`router.freeze`: the routers stay as they are, bit for bit, and everything else is trained as ever."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keural.errors import UserError
from keural.train.stage.job import StageJob
from tests.helpers.train_small import (
    calling_before_each_step,
    metrics_of,
    open_run,
    random_model,
    small_job,
    step_gradients,
    train_stage,
    weights_of,
)
from tests.train.test_ranks import train_on_ranks

GATES = ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")
FROZEN: dict[str, Any] = {"freeze": True}
SHORT = {"steps": 3, "warmup_steps": 0, "weight_decay": 0.5, "lr": 1e-2, "save_every": None}


def initial_weights(job: StageJob) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in open_run(job).trainer.policy.model.named_parameters()}


@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
@pytest.mark.parametrize("precision", ["fp32", "split", "split-host"])
def test_routers_are_bit_identical_after_the_stage_and_all_else_has_moved(tmp_path: Path, objective: str, precision: str) -> None:
    before = initial_weights(small_job(tmp_path, objective, run="before"))
    job = small_job(tmp_path, objective, router=FROZEN, train={**SHORT, "precision": precision})
    result = train_stage(job)
    after = weights_of(result)
    assert after.keys() == before.keys()
    assert {name for name in after if torch.equal(after[name], before[name])} == set(GATES)
    assert result.trained == sum(value.numel() for name, value in after.items() if name not in GATES)
    assert all(line["balance_loss"] > 0 and line["z_loss"] > 0 for line in metrics_of(job) if "loss" in line), "still reported"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_losses_of_a_frozen_router_train_what_comes_before_it(tmp_path: Path, recompute: str) -> None:
    gradients = {}
    for coefficient in (0.0, 1.0):
        router = {**FROZEN, "balance_coef": coefficient, "z_coef": 0.0}
        job = small_job(tmp_path, run=f"{coefficient}", router=router, train={"recompute": recompute})
        gradients[coefficient] = step_gradients(open_run(job).trainer)[1]
    assert not gradients[1.0].keys() & set(GATES)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert (gradients[1.0][name] - gradients[0.0][name]).abs().max() > 1e-4


def test_an_unfrozen_stage_is_told_apart_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_run(small_job(tmp_path))
    assert "trains" not in capsys.readouterr().out
    open_run(small_job(tmp_path, run="frozen", router=FROZEN))
    assert "small: trains 27,808 of 28,064 parameters" in capsys.readouterr().out


class Ended(BaseException):
    """Something ends training, and does not hurry as a second signal would."""


def interrupted(job: StageJob, step: int) -> None:
    def stop(now: int) -> None:
        if now == step:
            raise Ended

    with calling_before_each_step(stop), pytest.raises(Ended):
        train_stage(job)


def test_a_checkpoint_leaves_out_what_is_frozen_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"router": FROZEN, "train": {"steps": 6, "save_every": 2}}
    expected = weights_of(train_stage(small_job(tmp_path, "sft", run="whole", **settings)))
    job = small_job(tmp_path, "sft", **settings)
    interrupted(job, 5)
    newest = job.run_dir / "checkpoints" / "step-00000004"
    assert not any(b"gate.weight" in file.read_bytes() for file in newest.glob("*.safetensors"))
    assert json.loads((newest / "manifest.json").read_text())["frozen"]
    found = weights_of(train_stage(job))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_is_refused_beside_other_frozen_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"router": FROZEN, "train": {"steps": 6, "save_every": 2}}
    job = small_job(tmp_path, "sft", **settings)
    interrupted(job, 5)
    random_model(seed=8, scale=3.0).save_pretrained(tmp_path / "init")
    with pytest.raises(UserError, match="trained beside other frozen weights"):
        train_stage(job)


@pytest.mark.slow
def test_two_ranks_leave_the_routers_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"router": FROZEN, "train": SHORT}
    expected = weights_of(train_stage(small_job(tmp_path, "sft", run="one", **settings)))
    found = train_on_ranks(tmp_path, 2, "sft", "two", **settings)["weights"]
    before = random_model(seed=7, scale=3.0).state_dict()
    assert all(torch.equal(found[name], before[name]) for name in GATES)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)
