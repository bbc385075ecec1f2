"""KTO: the loss of single answers is the paper's formula, and what it is measured against is of a whole step."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keural.data.loading.stream import Stream
from keural.data.tokens.store import LABELS, TokenStore
from keural.errors import UserError
from keural.recipe import OBJECTIVES, KtoSpec
from keural.train.divergence import against_divergence, measured
from keural.train.gradients import accumulate_gradients
from keural.train.losses import token_logprobs
from keural.train.micro_batches import micro_batches
from keural.train.objectives.base import figures
from keural.train.objectives.labelled import Kto, answer_loss
from keural.train.reference.cache import ReferenceCache
from keural.train.stage.heldout import evaluate
from keural.train.stage.training import train_stage
from keural.train.trainer import Trainer
from tests.helpers.train_small import (
    LENGTH,
    losses_of,
    metrics_of,
    open_run,
    random_model,
    small_job,
    small_stage,
    step_gradients,
    weights_of,
    write_store,
)

CPU = torch.device("cpu")
NO_ROUTER = {"balance_coef": 0.0, "z_coef": 0.0}


def moved(trainer: Trainer) -> Trainer:
    """The trainer with a policy that is no longer its reference."""
    trainer.policy.model.load_state_dict(random_model(seed=16, scale=3.0).state_dict())
    return trainer


def summed(trainer: Trainer, sequence: int, reference: bool = False) -> float:
    """Log-probability of the answer of one sequence of the store, by itself, in float64."""
    store = trainer.stream.store
    assert isinstance(store, TokenStore)
    if reference:
        assert isinstance(trainer.references, ReferenceCache)
        return float(trainer.references.values[sequence])
    tokens = torch.from_numpy(store.sequence(sequence).astype("int64"))
    mask = torch.from_numpy(store.loss_mask(sequence)[1:] == 1)
    with torch.no_grad():
        logits = trainer.policy.model(tokens[None]).logits[0, :-1].double()
    return float(logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)[mask].sum())


def graphed(trainer: Trainer, sequence: int) -> torch.Tensor:
    """The same with its gradient, in float32."""
    store = trainer.stream.store
    assert isinstance(store, TokenStore)
    tokens = torch.from_numpy(store.sequence(sequence).astype("int64"))
    logits = trainer.policy.model(tokens[None]).logits[0, :-1]
    kept = torch.from_numpy(store.loss_mask(sequence)[1:] == 1)
    return logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)[kept].sum()


def ratio(trainer: Trainer, sequence: int) -> float:
    return summed(trainer, sequence) - summed(trainer, sequence, reference=True)


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


class TestFormula:
    """Against a loop over answers in float64."""

    @pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
    @pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
    def test_of_a_whole_step(self, tmp_path: Path, loss: str, weights: tuple[float, float]) -> None:
        spec = {"loss": loss, "beta": 0.2, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        trainer = moved(open_run(small_job(tmp_path, "kto", router=NO_ROUTER, kto=spec)).trainer)
        records = (trainer.stream.batch(0).pair_sequences[0] // 2).tolist()
        store = trainer.stream.store
        assert isinstance(store, TokenStore)
        assert store.labels is not None
        point = max(0.0, sum(ratio(trainer, 2 * record + 1) for record in records) / len(records)) if loss == "kto" else 0.0
        total, rewards = 0.0, {True: [0.0], False: [0.0]}
        for record in records:
            good, gain = bool(store.labels[record]), ratio(trainer, 2 * record)
            total += (
                weights[0] * (1 - logistic(0.2 * (gain - point))) if good else weights[1] * (1 - logistic(0.2 * (point - gain)))
            )
            rewards[good].append(0.2 * gain)
        found = accumulate_gradients(trainer, 0)
        assert found.loss == pytest.approx(total / len(records), abs=1e-6)
        assert found.metrics["kl"] == pytest.approx(point, abs=1e-4)
        assert (point > 0) == (loss == "kto"), "the case is one in which it matters"
        means = {good: sum(values) / (len(values) - 1) for good, values in rewards.items()}
        assert found.metrics["reward_desirable"] == pytest.approx(means[True], abs=1e-4)
        assert found.metrics["reward_undesirable"] == pytest.approx(means[False], abs=1e-4)
        assert found.metrics["reward_margin"] == pytest.approx(means[True] - means[False], abs=1e-4)

    def test_gradients_in_float64(self) -> None:
        torch.manual_seed(0)
        ratios = torch.randn(7, dtype=torch.float64, requires_grad=True)
        good = torch.tensor([True, False, True, True, False, False, True])
        spec = KtoSpec(beta=0.7, desirable_weight=1.3, undesirable_weight=0.6)
        point = torch.tensor(0.4, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda values: answer_loss(values, good, point, spec), ratios)

    def test_good_answers_gain_by_what_bad_ones_lose(self) -> None:
        ratios, good = torch.tensor([0.0, 9.0, -9.0] * 2), torch.tensor([True] * 3 + [False] * 3)
        loss = answer_loss(ratios, good, torch.tensor(0.0), KtoSpec(beta=1.0))
        assert loss[0] == loss[3] == 0.5
        assert loss[1] == loss[5] < 1e-3
        assert loss[2] == loss[4] > 0.99

    def test_of_extreme_ratios_it_stays_a_number(self) -> None:
        ratios = torch.tensor([1e4, -1e4] * 2, requires_grad=True)
        loss = answer_loss(ratios, torch.tensor([True, True, False, False]), torch.tensor(0.0), KtoSpec(beta=100.0))
        loss.sum().backward()
        assert loss.tolist() == [0.0, 1.0, 1.0, 0.0]
        assert ratios.grad is not None
        assert torch.isfinite(ratios.grad).all()


def test_before_the_first_step_every_loss_is_a_half_to_the_bit(tmp_path: Path) -> None:
    assert accumulate_gradients(open_run(small_job(tmp_path, "kto")).trainer, 0).loss == 0.5


class TestDivergence:
    """What answers to other prompts say of the policy."""

    def test_it_is_of_the_whole_step_however_it_is_cut(self, tmp_path: Path) -> None:
        whole = moved(open_run(small_job(tmp_path, "kto", run="whole")).trainer)
        parts = moved(open_run(small_job(tmp_path, "kto", run="parts", train={"micro_batch_tokens": LENGTH})).trainer)
        mismatched = parts.stream.batch(0).mismatched
        assert mismatched is not None
        assert len(micro_batches(mismatched, LENGTH, CPU)) > 1
        found = [float(measured(trainer, [trainer.stream.batch(0)], trainer.references)) for trainer in (whole, parts)]
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        shares = [parts.stream.batch(0, rank, 3) for rank in range(3)]
        assert float(measured(parts, shares, parts.references)) == pytest.approx(found[0], rel=1e-5)
        one_by_one = [ratio(whole, int(sequence)) for sequence in mismatched.pair_sequences[0]]
        assert all(sequence % 2 for sequence in mismatched.pair_sequences[0])
        assert found[0] == pytest.approx(float(np.mean(one_by_one)), rel=1e-4)

    def test_it_is_never_below_zero(self, tmp_path: Path) -> None:
        trainer = open_run(small_job(tmp_path, "kto")).trainer
        likely = lambda sequences: torch.zeros(sequences.shape)  # noqa: E731 - a reference to which everything is certain
        assert float(measured(trainer, [trainer.stream.batch(0)], likely)) == 0.0

    def test_no_gradient_goes_through_it(self, tmp_path: Path) -> None:
        trainer = moved(open_run(small_job(tmp_path, "kto", router=NO_ROUTER)).trainer)
        batch = trainer.stream.batch(0)
        objective = against_divergence(trainer, [batch], trainer.references).objective
        assert isinstance(objective, Kto)
        assert objective.divergence is not None
        assert not objective.divergence.requires_grad
        _, gradients = step_gradients(trainer)
        loss = 0.0
        for sequence, good in zip(batch.pair_sequences[0].tolist(), batch.desirable.tolist(), strict=True):  # type: ignore[union-attr]
            gain = 0.1 * (graphed(trainer, sequence) - summed(trainer, sequence, reference=True) - float(objective.divergence))
            loss = loss + torch.sigmoid(-gain if good else gain) / len(batch.pairs)
        trainer.policy.model.zero_grad()
        torch.autograd.backward(loss)  # type: ignore[arg-type]
        for name, parameter in trainer.policy.model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)

    def test_it_has_no_part_in_the_routers_losses_or_in_the_tokens(self, tmp_path: Path) -> None:
        trainer = open_run(small_job(tmp_path, "kto")).trainer
        own = trainer.stream.batch(0).num_tokens
        found = accumulate_gradients(trainer, 0)
        assert found.tokens == own
        assert found.router.counts.sum(1).tolist() == [own * trainer.top_k] * len(found.router.counts)

    def test_a_loss_that_does_not_go_by_it_computes_nothing_for_it(self, tmp_path: Path) -> None:
        passes = []
        for loss in ("kto", "apo_zero_unpaired"):
            trainer = open_run(small_job(tmp_path, "kto", run=loss, kto={"loss": loss})).trainer
            passes.append(0)
            trainer.policy.register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))
            accumulate_gradients(trainer, 0)
        assert passes == [2, 1]


class TestOneLabel:
    """A step may have answers of one label alone."""

    @pytest.mark.parametrize("good", [0, 1])
    def test_its_figures_are_of_that_label_and_the_loss_is_half(self, tmp_path: Path, good: int) -> None:
        job = small_job(tmp_path, "kto", checks={"one_label": 1.0})
        store = write_store(tmp_path / "made", "kto", 20, good=[good] * 20)
        found = accumulate_gradients(open_run(dataclasses.replace(job, train_store=store)).trainer, 0)
        there, absent = ("desirable", "undesirable") if good else ("undesirable", "desirable")
        assert (found.metrics[there], found.metrics[absent], found.loss) == (1.0, 0.0, 0.5)
        assert {f"{name}_{there}" for name in ("reward", "logprob", "length")} <= found.metrics.keys()
        assert not [name for name in found.metrics if name.endswith(f"_{absent}") or name == "reward_margin"]

    def test_metrics_hold_numbers_alone(self, tmp_path: Path) -> None:
        job = small_job(tmp_path, "kto", number=12, heldout=True, train={"batch_answers": 1, "steps": 12})
        train_stage(job)
        lines = metrics_of(job)
        assert {line["desirable"] for line in lines if "loss" in line} == {0.0, 1.0}
        assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
        json.dumps(lines, allow_nan=False)

    def test_figures_are_means_over_their_part(self) -> None:
        means = {"desirable": 0.25, "undesirable": 0.75, "kl": 2.0} | {
            f"{name}_{label}": 3.0 for name in ("reward", "logprob", "length") for label in ("desirable", "undesirable")
        }
        found = figures(means, OBJECTIVES["kto"])
        assert (found["reward_desirable"], found["reward_undesirable"], found["reward_margin"]) == (12.0, 4.0, 8.0)
        assert figures({"reward_margin": 1.0}, OBJECTIVES["dpo"]) == {"reward_margin": 1.0}


class TestReference:
    """Reference values of answers are kept like those of pairs."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"train": {"lr": 5e-3, "steps": 14}},
            {"kto": {"beta": 0.7, "desirable_weight": 1.2}},
            {"kto": {"loss": "apo_zero_unpaired"}},
            {"train": {"batch_answers": 5, "micro_batch_tokens": LENGTH}},
        ],
        ids=["rate and length", "beta and weights", "loss", "size and cut"],
    )
    def test_another_recipe_computes_nothing(
        self, tmp_path: Path, changes: dict[str, Any], capfd: pytest.CaptureFixture[str]
    ) -> None:
        job = small_job(tmp_path, "kto", number=12, heldout=True)
        open_run(job)
        assert "batches computed" in capfd.readouterr().out
        other = small_job(tmp_path, "kto", heldout=True, run="other", **changes)
        open_run(dataclasses.replace(other, references=job.run_dir / "reference"))
        assert "batches computed" not in capfd.readouterr().out

    def test_other_labels_compute_nothing(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        job = small_job(tmp_path, "kto", number=12)
        open_run(job)
        turned = write_store(tmp_path / "turned", "kto", 12, good=[0, 1] * 6)
        capfd.readouterr()
        other = small_job(tmp_path, "kto", run="other")
        open_run(dataclasses.replace(other, train_store=turned, references=job.run_dir / "reference"))
        assert "batches computed" not in capfd.readouterr().out

    def test_values_are_those_of_both_sequences_alone(self, tmp_path: Path) -> None:
        trainer = open_run(small_job(tmp_path, "kto", number=12)).trainer
        assert isinstance(trainer.references, ReferenceCache)
        for sequence in range(24):
            assert trainer.references.values[sequence] == pytest.approx(summed(trainer, sequence), rel=1e-5)

    def test_one_that_is_computed_in_the_step_gives_the_same_training(self, tmp_path: Path) -> None:
        cached, online = (small_job(tmp_path, "kto", run=kind, kto={"reference": kind}) for kind in ("cached", "online"))
        expected = weights_of(train_stage(cached))
        found = weights_of(train_stage(online))
        assert losses_of(online) == pytest.approx(losses_of(cached), abs=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        assert not (online.run_dir / "reference").exists()

    def test_a_path_has_no_effect_online(self) -> None:
        with pytest.raises(ValueError, match="reference_path has no effect"):
            small_stage("kto", kto={"reference": "online", "reference_path": "x"})


class TestHeldout:
    """Held-out figures."""

    def test_they_are_those_of_every_answer_against_the_divergence_of_all(self, tmp_path: Path) -> None:
        run = open_run(small_job(tmp_path, "kto", heldout=True))
        trainer = moved(run.trainer)
        assert isinstance(run.heldout_references, ReferenceCache)
        assert run.heldout is not None
        on_heldout = dataclasses.replace(trainer, stream=run.heldout, references=run.heldout_references)
        point = max(0.0, float(np.mean([ratio(on_heldout, 2 * record + 1) for record in range(10)])))
        store = run.heldout.store
        assert isinstance(store, TokenStore)
        assert store.labels is not None
        signs = [1 if store.labels[record] else -1 for record in range(10)]
        losses = [1 - logistic(0.1 * sign * (ratio(on_heldout, 2 * record) - point)) for record, sign in enumerate(signs)]
        found = evaluate(trainer, run.heldout, run.heldout_references).figures
        assert found["loss"] == pytest.approx(float(np.mean(losses)), abs=1e-5)
        assert found["kl"] == pytest.approx(point, abs=1e-4)
        assert (found["items"], found["desirable"]) == (10.0, signs.count(1) / 10)


def test_training_moves_good_answers_away_from_bad_ones(tmp_path: Path) -> None:
    store = write_store(tmp_path / "made", "kto", 24, good=[1, 0] * 12)
    job = small_job(tmp_path, "kto", train={"steps": 30, "lr": 5e-3, "batch_answers": 24, "save_every": None}, kto={"beta": 0.5})
    train_stage(dataclasses.replace(job, train_store=store))
    last = metrics_of(job)[-1]
    assert last["reward_margin"] > 1
    assert last["reward_desirable"] > last["reward_undesirable"]
    assert last["loss"] < 0.4


def test_weights_of_labels_weigh_their_gradients(tmp_path: Path) -> None:
    """Gradients of good and of bad answers alone add up, each times its weight."""
    found = {}
    for name, weights in {"both": (2.0, 0.5), "good": (2.0, 1e-30), "bad": (1e-30, 0.5)}.items():
        spec = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        found[name] = step_gradients(moved(open_run(small_job(tmp_path, "kto", run=name, router=NO_ROUTER, kto=spec)).trainer))[1]
    for name, gradient in found["both"].items():
        torch.testing.assert_close(found["good"][name] + found["bad"][name], gradient, atol=1e-6, rtol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in found["both"].values()) > 1e-3


def test_answers_take_one_pass_over_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are told while their logits are there."""
    told = []

    def watched(*arguments: Any, weighing: Any = None, **others: Any) -> torch.Tensor:
        told.append(weighing is not None and len(weighing.ends))
        return token_logprobs(*arguments, weighing=weighing, **others)

    monkeypatch.setattr("keural.train.network.policy.token_logprobs", watched)
    accumulate_gradients(open_run(small_job(tmp_path, "kto")).trainer, 0)
    assert told[-1] == 8, "an answer is a group of its own"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kto": {"beta": 0.0}}, "beta"),
        ({"kto": {"desirable_weight": 0.0}}, "desirable_weight"),
        ({"kto": {"undesirable_weight": -1.0}}, "undesirable_weight"),
        ({"kto": {"desirable_weight": 1e300}}, "desirable_weight"),
        ({"kto": {"loss": "sigmoid"}}, "loss"),
        ({"kto": {"label_smoothing": 0.1}}, "label_smoothing"),
        ({"dpo": {"beta": 0.1}}, "dpo settings have no effect with objective kto"),
        ({"train": {"batch_answers": None, "batch_pairs": 4}}, "objective kto needs train.batch_answers"),
        ({"init_from": "random"}, "needs init_from"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_stage("kto", **settings)


def test_a_store_of_pairs_is_no_store_of_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds pairs; objective kto needs answers"):
        Stream(TokenStore.open(write_store(tmp_path / "pairs", "dpo", 4)), "kto", LENGTH, batch_pairs=2)


def test_a_store_whose_labels_are_gone_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path, "kto")
    assert isinstance(job.train_store, Path)
    (job.train_store / LABELS).unlink()
    with pytest.raises(UserError, match=LABELS):
        train_stage(job)
