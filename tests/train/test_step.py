"""One optimizer step does not depend on how it is cut, and does what its settings say."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from keural.data.loading.stream import Stream
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError
from keural.train.loop import train_step
from keural.train.micro_batches import micro_batches
from keural.train.optimization.optimizer import clip_gradients, gradient_norm
from keural.train.stage.training import train_stage
from keural.train.trainer import Trainer
from tests.helpers.train_small import LENGTH, SHA, VOCAB, metrics_of, open_run, small_job, step_gradients, weights_of

OBJECTIVES = ("next_token", "sft", "dpo", "kto")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_micro_batches_give_the_same_gradients_router_losses_included(tmp_path: Path, objective: str) -> None:
    router = {"balance_coef": 0.5, "z_coef": 0.1}
    whole = open_run(small_job(tmp_path, objective, run="whole", router=router)).trainer
    parts = open_run(small_job(tmp_path, objective, run="parts", router=router, train={"micro_batch_tokens": 2 * LENGTH})).trainer
    for step in range(2):
        losses, gradients = step_gradients(whole, step)
        split_losses, split_gradients = step_gradients(parts, step)
        torch.testing.assert_close(split_losses, losses, atol=1e-5, rtol=1e-5)
        for name in gradients:
            torch.testing.assert_close(split_gradients[name], gradients[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("which", ["balance_coef", "z_coef"])
def test_router_losses_add_exactly_their_own_gradient(tmp_path: Path, objective: str, which: str) -> None:
    """The gradient with a router loss less the gradient without is that of the loss alone, computed here from the model's router
    logits over all tokens without padding: balance as E sum f P, z as the mean squared logsumexp.
    """
    router = {"balance_coef": 0.0, "z_coef": 0.0}
    train = {"micro_batch_tokens": 2 * LENGTH}
    found = []
    for run, coefficients in (("with", router | {which: 0.5}), ("without", router)):
        trainer = open_run(small_job(tmp_path, objective, run=run, router=coefficients, train=train)).trainer
        found.append(step_gradients(trainer)[1])
    model = trainer.policy.model.zero_grad() or trainer.policy.model
    layers: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    for micro in micro_batches(trainer.stream.batch(0), None, torch.device("cpu")):
        output = model.model(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False, output_router_logits=True)
        for layer, logits in zip(layers, output.router_logits, strict=True):
            layer.append(logits[micro.token_mask.flatten()])
    losses = []
    for parts in layers:
        logits = torch.cat(parts).double()
        probabilities = logits.softmax(-1)
        counts = torch.nn.functional.one_hot(probabilities.topk(2).indices, logits.shape[-1]).sum((0, 1)).double()
        balance = logits.shape[-1] * (counts / counts.sum() * probabilities.mean(0)).sum()
        losses.append(balance if which == "balance_coef" else logits.logsumexp(-1).square().mean())
    (0.5 * torch.stack(losses).mean()).backward()
    gate = model.get_parameter("model.layers.0.mlp.gate.weight").grad
    assert gate is not None
    assert gate.abs().max() > 1e-4
    for name, parameter in model.named_parameters():
        alone = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found[0][name] - found[1][name], alone, atol=1e-5, rtol=1e-5)


def test_published_scope_balances_each_micro_batch_instead(tmp_path: Path) -> None:
    train = {"micro_batch_tokens": LENGTH}
    gates = []
    for scope in ("global_batch", "micro_batch"):
        job = small_job(tmp_path, run=scope, router={"balance_coef": 1.0, "scope": scope}, train=train)
        gates.append(step_gradients(open_run(job).trainer)[1]["model.layers.0.mlp.gate.weight"])
    assert (gates[0] - gates[1]).abs().max() > 1e-3


def test_one_micro_batch_is_the_same_in_both_scopes(tmp_path: Path) -> None:
    gates = []
    for scope in ("global_batch", "micro_batch"):
        job = small_job(tmp_path, run=scope, router={"balance_coef": 1.0, "scope": scope})
        gates.append(step_gradients(open_run(job).trainer)[1]["model.layers.0.mlp.gate.weight"])
    torch.testing.assert_close(gates[0], gates[1])


def test_lagged_load_is_that_of_the_step_before_however_the_step_is_cut(tmp_path: Path) -> None:
    """The second forward pass is the oracle: given this step's load as that of the step before, lagged gradients are exact ones."""

    def trainer(run: str, load: str, limit: int | None) -> Trainer:
        router = {"balance_coef": 1.0, "z_coef": 0.1, "load": load}
        return open_run(small_job(tmp_path, run=run, router=router, train={"micro_batch_tokens": limit})).trainer

    exact, whole, parts = (
        trainer("exact", "exact", 2 * LENGTH),
        trainer("whole", "lagged", None),
        trainer("parts", "lagged", 2 * LENGTH),
    )
    first = step_gradients(whole)[1]
    torch.testing.assert_close(step_gradients(parts)[1], first, atol=1e-5, rtol=1e-5)
    losses, gradients = step_gradients(exact)
    gate = "model.layers.0.mlp.gate.weight"
    assert (first[gate] - gradients[gate]).abs().max() > 1e-3, "even load at the first step"
    parts.previous.counts = losses["counts"]
    torch.testing.assert_close(step_gradients(parts), (losses, gradients), atol=1e-5, rtol=1e-5)


def test_lagged_load_runs_no_forward_pass_ahead_and_reports_the_load_of_the_step(tmp_path: Path) -> None:
    train = {"micro_batch_tokens": 2 * LENGTH}
    passes = {}
    for load in ("exact", "lagged"):
        trainer = open_run(small_job(tmp_path, run=load, router={"load": load}, train=train)).trainer
        calls: list[bool] = []
        trainer.policy.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        report = train_step(trainer, 0)
        passes[load] = (calls.count(True), calls.count(False), report.balance_loss)
        assert trainer.previous.counts is not None
        assert trainer.previous.counts.sum() == report.tokens * 2 * 2
    assert passes["exact"] == (4, 4, passes["lagged"][2])
    assert passes["lagged"][:2] == (4, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, objective: str) -> None:
    plain = open_run(small_job(tmp_path, objective, run="plain")).trainer
    saving = open_run(small_job(tmp_path, objective, run="saving", train={"recompute": "full"})).trainer
    assert saving.policy.model.is_gradient_checkpointing
    torch.testing.assert_close(step_gradients(saving), step_gradients(plain), atol=1e-7, rtol=1e-6)


def test_gradients_of_packed_neighbours_are_those_of_each_document_alone(tmp_path: Path) -> None:
    """The gradient of a batch of packed documents is the token-weighted sum of the gradients of its documents in rows of their
    own.
    """
    draw = np.random.default_rng(0)
    documents = [draw.integers(4, VOCAB, 8) for _ in range(8)]
    for name, rows in (("packed", documents), *((f"alone{i}", [document]) for i, document in enumerate(documents))):
        with StoreWriter(tmp_path / name, SHA, VOCAB, "conversations") as writer:
            for row in rows:
                writer.add(row, np.ones(8, int))
    job = small_job(tmp_path, "sft", router={"balance_coef": 0.0, "z_coef": 0.0})
    trainer = open_run(job).trainer
    stream = Stream(TokenStore.open(tmp_path / "packed"), "sft", LENGTH, batch_rows=2)
    assert stream.instances_per_epoch == 2
    _, packed = step_gradients(dataclasses.replace(trainer, stream=stream))
    alone: dict[str, torch.Tensor] = {}
    for index in range(len(documents)):
        stream = Stream(TokenStore.open(tmp_path / f"alone{index}"), "sft", LENGTH, batch_rows=1)
        for name, gradient in step_gradients(dataclasses.replace(trainer, stream=stream))[1].items():
            alone[name] = alone.get(name, torch.zeros(())) + gradient / len(documents)
    for name in packed:
        torch.testing.assert_close(packed[name], alone[name], atol=1e-5, rtol=1e-4)


def test_clipping_scales_to_the_global_norm() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    for number, parameter in enumerate(parameters, 1):
        parameter.grad = torch.full_like(parameter, float(number))
    before = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    norm = gradient_norm(parameters)
    clip_gradients(parameters, norm, 1.0)
    after = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    assert norm.item() == pytest.approx(before.item())
    assert after.item() == pytest.approx(1.0, abs=1e-5)


def test_a_step_of_2e_7_moves_the_weights_also_under_bfloat16_compute(tmp_path: Path) -> None:
    job = small_job(
        tmp_path, "sft", train={"lr": 2e-7, "min_lr": 0.0, "warmup_steps": 0, "compute_dtype": "bfloat16", "weight_decay": 0.0}
    )
    trainer = open_run(job).trainer
    before = {name: value.clone() for name, value in trainer.policy.model.named_parameters()}
    train_step(trainer, 0)
    for name, value in trainer.policy.model.named_parameters():
        moved = value.detach() != before[name]
        assert value.dtype == torch.float32
        if name.endswith("proj.weight"):
            assert moved.float().mean() > 0.95, name


def test_bfloat16_compute_stays_close_to_float32(tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        result = train_stage(small_job(tmp_path, "sft", run=dtype, train={"compute_dtype": dtype}))
        losses.append(result.loss_last)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_loss_that_is_not_a_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path)).trainer
    train_step(trainer, 0)
    with torch.no_grad():
        trainer.policy.model.model.norm.weight[0] = math.nan
    before = {name: value.clone() for name, value in trainer.policy.model.named_parameters()}
    with pytest.raises(UserError, match=r"loss is nan at step 1.*keural data show .*small\.yaml --step 1"):
        train_step(trainer, 1)
    for name, value in trainer.policy.model.named_parameters():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_weight_decay_acts_on_matrices_only(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path)).trainer
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in trainer.policy.model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name


def test_metrics_have_every_step_once_with_the_promised_fields(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", heldout=True, train={"evaluate_every": 5})
    result = train_stage(job)
    lines = metrics_of(job)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(12))
    assert {
        "learning_rate",
        "gradient_norm",
        "tokens",
        "tokens_per_second",
        "seconds",
        "balance_loss",
        "z_loss",
        "expert_load",
    } <= set(steps[0])
    assert {"reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected"} <= set(steps[0])
    assert np.array(steps[0]["expert_load"]).sum(-1) == pytest.approx([1, 1], abs=1e-4)
    assert [line["step"] for line in lines if "heldout" in line] == [4, 9, 11]
    assert result.heldout == lines[-1]["heldout"]
    assert result.heldout["items"] == 10
    assert result.tokens == steps[-1]["tokens"]
    assert (result.loss_first, result.loss_last) == (steps[0]["loss"], steps[-1]["loss"])


def test_every_objective_learns(tmp_path: Path) -> None:
    for objective in OBJECTIVES:
        (tmp_path / objective).mkdir()
        result = train_stage(small_job(tmp_path / objective, objective, train={"steps": 40, "lr": 5e-3, "save_every": None}))
        assert result.loss_last < 0.9 * result.loss_first, objective
        assert all(torch.isfinite(value).all() for value in weights_of(result).values())
