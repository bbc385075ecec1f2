"""Muon steps along matrices whose singular values are near 1, one expert at a time; all else stays with AdamW."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keural.recipe import MuonSpec, StageSpec
from keural.train.loop import train_step
from keural.train.optimization.muon import MOMENTUM, Muon, orthogonalized, step_direction
from keural.train.optimization.optimizer import state_tensors
from tests.helpers.train_small import calling_before_each_step, open_run, small_job, small_stage, train_stage, weights_of
from tests.train.test_ranks import compare

MUON: dict[str, Any] = {"train": {"optimizer": "muon", "lr": 3e-3}}
SHAPES = [(12, 12), (8, 20), (20, 8), (3, 16, 8), (2, 3, 8, 16)]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Jordan's iteration as he writes it down, in float64, for one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.double().T if tall else matrix.double()
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X.T if tall else X


def one_step(parameter: nn.Parameter, gradients: list[Tensor], name: str, lr: float = 0.01, decay: float = 0.1) -> Tensor:
    """The parameter after a step with each gradient."""
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=lr)
    optimizer = Muon([(name, parameter)], MuonSpec(), decay, adamw)
    optimizer.state[parameter][MOMENTUM] = torch.zeros_like(parameter)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_matrices_is_each_of_them_by_the_plain_iteration_in_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    matrices = torch.randn(shape)
    found = orthogonalized(matrices, 5).reshape(-1, *shape[-2:])
    for matrix, ours in zip(matrices.reshape(-1, *shape[-2:]), found, strict=True):
        torch.testing.assert_close(ours.double(), newton_schulz(matrix), atol=1e-4, rtol=1e-4)


def test_singular_values_come_near_one_whatever_the_scale() -> None:
    torch.manual_seed(4)
    for scale in (1e-4, 1.0, 1e4):
        values = torch.linalg.svdvals(orthogonalized(scale * torch.randn(24, 48), 5))
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 6), 5), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_steps_are_those_of_torchs_own_muon_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(5)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    theirs = nn.Parameter(start.clone())
    oracle = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        theirs.grad = gradient.clone()
        oracle.step()
    moved = one_step(nn.Parameter(start.clone()), gradients, "q_proj.weight") - start
    assert (moved - (theirs.detach() - start)).norm() < 0.02 * moved.norm()


def test_every_expert_and_each_of_its_fused_projections_is_a_matrix_of_its_own() -> None:
    torch.manual_seed(6)
    start, gradient = torch.randn(3, 20, 8), torch.randn(3, 20, 8) * torch.tensor([1.0, 30.0, 1e-3])[:, None, None]
    together = one_step(nn.Parameter(start.clone()), [gradient], "mlp.experts.gate_up_proj")
    for expert in range(3):
        for rows in (slice(0, 10), slice(10, 20)):
            alone = one_step(nn.Parameter(start[expert, rows].clone()), [gradient[expert, rows]], "up_proj")
            torch.testing.assert_close(together[expert, rows], alone, atol=1e-6, rtol=1e-5)


def test_a_step_is_as_long_as_one_of_adamw_in_every_shape() -> None:
    torch.manual_seed(7)
    for shape in ((32, 32), (64, 16), (16, 96), (4, 32, 64)):
        assert step_direction(torch.randn(shape), 1, 5).square().mean().sqrt() == pytest.approx(0.2, rel=0.2), shape


def test_layers_matrices_are_muons_and_embedding_routers_and_norms_adamws(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, **MUON)).trainer
    optimizer = trainer.optimizer
    assert isinstance(optimizer, Muon)
    by_muon = {id(p) for group in optimizer.param_groups if optimizer.is_of_matrices(group) for p in group["params"]}
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    names = dict(trainer.policy.model.named_parameters())
    for name, parameter in names.items():
        assert (id(parameter) in by_muon) == (".layers." in name and "norm" not in name and "gate.weight" not in name), name
        assert (id(parameter) in decayed) == ("norm" not in name), name
    kept = state_tensors(optimizer, {parameter: name for name, parameter in names.items()})
    assert "momentum_buffer.model.layers.0.mlp.experts.down_proj" in kept
    assert "exp_avg_sq.model.layers.0.mlp.experts.down_proj" not in kept
    assert {f"{kind}.model.layers.0.mlp.gate.weight" for kind in ("exp_avg", "exp_avg_sq")} <= kept.keys()


def test_it_learns_and_all_weights_move(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, **MUON)).trainer
    before = {name: value.detach().clone() for name, value in trainer.policy.model.named_parameters()}
    losses = [train_step(trainer, step).loss for step in range(12)]
    assert losses[-1] < losses[0] - 0.1
    assert not any(torch.equal(value, before[name]) for name, value in trainer.policy.model.named_parameters())


def test_the_matrices_rate_is_a_multiple_of_the_others(tmp_path: Path) -> None:
    """With a vanishing scale the matrices stay where they were, and the embedding still moves."""
    train = MUON["train"] | {"muon": {"lr_scale": 1e-12}}
    trainer = open_run(small_job(tmp_path, train=train)).trainer
    before = {name: value.detach().clone() for name, value in trainer.policy.model.named_parameters()}
    train_step(trainer, 0)
    moved = {name for name, value in trainer.policy.model.named_parameters() if not torch.equal(value, before[name])}
    assert "model.embed_tokens.weight" in moved
    assert "model.layers.0.self_attn.q_proj.weight" not in moved


def test_stopped_and_started_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = MUON | {"heldout": True}

    def stop(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with calling_before_each_step(stop):
        assert train_stage(small_job(tmp_path, **settings)).interrupted
    again = weights_of(train_stage(small_job(tmp_path, **settings)))
    whole = weights_of(train_stage(small_job(tmp_path, run="whole", **settings)))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_measuring_for_a_budget_leaves_weights_and_momentum_alone(tmp_path: Path) -> None:
    train = MUON["train"] | {"steps": None, "budget_share": 1.0}
    trainer = open_run(small_job(tmp_path, run="budget", budget_seconds=2.0, train=train)).trainer
    fresh = open_run(small_job(tmp_path, **MUON)).trainer
    for ours, theirs in zip(trainer.policy.model.parameters(), fresh.policy.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for state in trainer.optimizer.state.values():  # type: ignore[union-attr]
        assert float(state["step"]) == 0
        assert all(float(value.abs().sum()) == 0 for value in state.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"muon": {"momentum": 0.9}}}, "train.muon has no effect with train.optimizer adamw"),
        ({"train": {"optimizer": "muon", "precision": "split"}}, "train.optimizer muon needs train.precision fp32"),
        ({"train": {"optimizer": "muon"}, "lora": {}}, "train.optimizer muon is for whole matrices"),
        ({"train": {"optimizer": "muno"}}, "adamw"),
        ({"train": {"optimizer": "muon", "muon": {"iterations": 0}}}, "greater than 0"),
        ({"train": {"optimizer": "muon", "muon": {"momentum": 1.0}}}, "less than 1"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_stage(**changes)


def test_the_optimizer_is_part_of_what_determines_the_weights() -> None:
    stage: StageSpec = small_stage(**MUON)
    assert stage.determining("weights")["train"]["optimizer"] == "muon"
    assert "optimizer" not in small_stage().determining("weights")["train"]


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tmp_path: Path) -> None:
    compare(tmp_path, "next_token", 2, train=MUON["train"] | {"steps": 8, "save_every": None})
