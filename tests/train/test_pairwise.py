"""Each preference loss is its paper's formula, in float64: against a loop over pairs and, where it has the form, against TRL."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore
from keural.recipe import PREFERENCE_LOSSES, DpoSpec
from keural.train.micro_batches import MicroBatch, micro_batches
from keural.train.objectives.pairwise import PAIR_LOSSES
from keural.train.objectives.preference import Dpo
from keural.train.stage.training import train_stage
from tests.helpers.train_small import LENGTH, losses_of, metrics_of, open_run, small_job, small_stage, step_gradients, write_store

FORMS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid", "beta": 0.3},
    "cDPO": {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
    "sigmoid_norm": {"loss": "sigmoid_norm", "beta": 5.0},
    "sigmoid_norm, smoothed": {"loss": "sigmoid_norm", "beta": 5.0, "label_smoothing": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.25},
    "hinge": {"loss": "hinge", "beta": 0.3},
    "robust": {"loss": "robust", "beta": 0.3, "label_smoothing": 0.15},
    "rpo": {"loss": "rpo", "beta": 0.3, "rpo_alpha": 0.5},
    "dpop": {"loss": "dpop", "beta": 0.3, "dpop_lambda": 5.0},
    "simpo": {"loss": "simpo", "beta": 2.5, "simpo_gamma": 1.25},
    "LD": {"loss": "sigmoid", "beta": 0.3, "ld_alpha": 0.4},
    "mixture": {"loss": {"sigmoid": 0.7, "ipo": 0.2, "nll": 0.1}, "beta": 0.3},
}
OF_TRL = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "LD", "several")
"""Of `FORMS` what TRL has, and a mixture of it."""


class Side:
    """Log-probabilities of one answer's trained tokens, under policy and reference."""

    def __init__(self, policy: list[float], reference: list[float]) -> None:
        self.policy, self.reference = policy, reference

    def __len__(self) -> int:
        return len(self.policy)

    @property
    def ratio(self) -> float:
        return sum(self.policy) - sum(self.reference)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def naive(chosen: Side, rejected: Side, form: dict[str, Any]) -> float:
    """The formula for one pair, term by term."""
    loss, beta = form["loss"], form["beta"]
    if isinstance(loss, dict):
        return sum(weight * naive(chosen, rejected, form | {"loss": name}) for name, weight in loss.items())
    flips, alpha = form.get("label_smoothing", 0.0), form.get("ld_alpha", 1.0)
    nll = -sum(chosen.policy) / len(chosen)
    if alpha != 1.0:
        shared = min(len(chosen), len(rejected))
        chosen, rejected = (
            Side(*([x * (1 if place < shared else alpha) for place, x in enumerate(xs)] for xs in (s.policy, s.reference)))
            for s in (chosen, rejected)
        )
    x = beta * (chosen.ratio - rejected.ratio)
    means = chosen.ratio / len(chosen) - rejected.ratio / len(rejected)
    match loss:
        case "sigmoid":
            return -(1 - flips) * log_sigmoid(x) - flips * log_sigmoid(-x)
        case "sigmoid_norm":
            return -(1 - flips) * log_sigmoid(beta * means) - flips * log_sigmoid(-beta * means)
        case "ipo":
            return (means - 1 / (2 * beta)) ** 2
        case "hinge":
            return max(0.0, 1 - x)
        case "robust":
            return (-(1 - flips) * log_sigmoid(x) + flips * log_sigmoid(-x)) / (1 - 2 * flips)
        case "rpo":
            return -log_sigmoid(x) + form["rpo_alpha"] * nll
        case "dpop":
            return -log_sigmoid(x - beta * form["dpop_lambda"] * max(0.0, -chosen.ratio))
        case "simpo":
            policy = sum(chosen.policy) / len(chosen) - sum(rejected.policy) / len(rejected)
            return -log_sigmoid(beta * policy - form["simpo_gamma"])
        case "nll":
            return nll
    raise AssertionError(loss)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    store = TokenStore.open(write_store(tmp_path_factory.mktemp("pairs") / "store", "dpo", 9, seed=5, longest=14))
    return Stream(store, "dpo", LENGTH, batch_pairs=9).batch(0)


@cache
def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return -torch.rand(shape, generator=draw, dtype=torch.float64) * 3


def scored(batch: Batch) -> tuple[MicroBatch, Tensor, Tensor]:
    """The micro-batch and its labels' log-probabilities under policy and reference, float64 ``[rows, T]``."""
    (micro,) = micro_batches(batch, None, torch.device("cpu"))
    policy, reference = (drawn(tuple(micro.labels.shape), seed) * (micro.labels >= 0) for seed in (1, 2))
    return micro, policy.clone().requires_grad_(), reference


def ours(batch: Batch, form: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient by label, and metrics."""
    micro, policy, reference = scored(batch)
    objective = Dpo(DpoSpec(**form))
    kept = objective.answers(reference, micro, lambda sequences: torch.zeros(sequences.shape, dtype=torch.float64))
    terms = objective(policy, micro, lambda sequences: torch.stack([kept.chosen, kept.rejected]))
    terms.loss.backward()
    assert policy.grad is not None
    return terms.loss.detach(), policy.grad, terms.metrics


def sides_of(batch: Batch) -> Iterator[tuple[Side, Side]]:
    micro, policy, reference = scored(batch)
    for row, begin, middle, end in batch.pairs.tolist():
        spans = [slice(begin, middle), slice(middle, end)]
        yield tuple(  # type: ignore[misc]
            Side(*(values[row, span][micro.labels[row, span] >= 0].tolist() for values in (policy, reference))) for span in spans
        )


def test_every_loss_of_the_recipe_has_a_formula_and_is_tested_here() -> None:
    assert set(PAIR_LOSSES) == set(PREFERENCE_LOSSES)
    tested = {name for form in FORMS.values() for name in DpoSpec(**form).weights}
    assert tested == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("name", FORMS)
def test_the_loss_is_the_formula_summed_over_pairs(batch: Batch, name: str) -> None:
    expected = math.fsum(naive(*sides, FORMS[name]) for sides in sides_of(batch))
    loss, gradient, _ = ours(batch, FORMS[name])
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_formula(batch: Batch, name: str) -> None:
    """Against differences of the loop's values, at the first and last trained token of two answers."""
    _, gradient, _ = ours(batch, FORMS[name])
    micro, _, _ = scored(batch)
    step = 1e-6
    for number in (0, 5):
        row, begin, middle, end = batch.pairs[number].tolist()
        pairs = list(sides_of(batch))[number]
        for side, span in zip((0, 1), (slice(begin, middle), slice(middle, end)), strict=True):
            places = (micro.labels[row, span] >= 0).nonzero().flatten() + span.start
            for place in (0, -1):
                values = []
                for sign in (1, -1):
                    moved = [Side(list(each.policy), each.reference) for each in pairs]
                    moved[side].policy[place] += sign * step
                    values.append(naive(*moved, FORMS[name]))
                slope = (values[0] - values[1]) / (2 * step)
                assert gradient[row, places[place]].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.fixture(scope="module")
def trl_loss(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """TRL's own loss code on given log-probabilities."""
    trl = pytest.importorskip("trl")
    from accelerate import Accelerator

    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)

    class Given(torch.nn.Module):
        """A model whose log-probabilities of labels are known."""

        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.values, self.is_gradient_checkpointing = values, False

        def forward(self, **_: Any) -> Any:
            nothing = torch.zeros(self.values.shape)
            return SimpleNamespace(log_probs=self.values, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    def loss(policy: Tensor, reference: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        defaults = {"label_smoothing": 0.0, "ld_alpha": None, "loss_weights": [1.0] * len(settings["loss_types"])}
        fixed = {
            "accelerator": Accelerator(cpu=True),
            "aux_loss_enabled": False,
            "precompute_ref_logps": False,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            "ref_model": Given(reference),
            "model": Given(policy),
            "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
            "_tp_size": 1,
            "_total_train_tokens": 0,
        }
        for name, value in (fixed | defaults | settings).items():
            object.__setattr__(trainer, name, value)
        trainer._metrics = {mode: SimpleMetrics() for mode in ("train", "eval")}
        inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        found: Tensor = trainer.compute_loss(trainer.model, inputs)
        return found

    return loss


class SimpleMetrics(dict):  # type: ignore[type-arg]
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


@pytest.mark.parametrize("name", OF_TRL)
def test_losses_and_gradients_are_trls_where_it_has_them(batch: Batch, trl_loss: Callable[..., Any], name: str) -> None:
    form = {"loss": {"sigmoid": 0.6, "hinge": 0.3, "ipo": 0.1}, "beta": 0.3} if name == "several" else FORMS[name]
    spec = DpoSpec(**form)
    micro, policy, reference = scored(batch)
    pairs = batch.pairs.tolist()
    where = [*((row, slice(b, m)) for row, b, m, _ in pairs), *((row, slice(m, e)) for row, _, m, e in pairs)]
    mask = padded([torch.cat([torch.zeros(1), (micro.labels[place] >= 0)[:-1].float()]) for place in where]).long()
    loss = trl_loss(
        *(padded([values[place] for place in where])[:, :-1] for values in (policy, reference)),
        mask,
        loss_types=list(spec.weights),
        loss_weights=list(spec.weights.values()),
        beta=spec.beta,
        label_smoothing=spec.label_smoothing,
        ld_alpha=spec.ld_alpha if spec.ld_alpha != 1 else None,
    )
    loss.backward()
    assert policy.grad is not None
    found, gradient, _ = ours(batch, form)
    assert found.item() / len(pairs) == pytest.approx(loss.item(), rel=1e-10)
    labelled = micro.labels >= 0
    torch.testing.assert_close(gradient[labelled] / len(pairs), policy.grad[labelled], rtol=1e-10, atol=1e-14)


def test_metrics_are_those_of_the_pairs(batch: Batch) -> None:
    pairs = list(sides_of(batch))
    _, _, metrics = ours(batch, FORMS["sigmoid"])
    rewards = [tuple(0.3 * side.ratio for side in sides) for sides in pairs]
    drift = [-sum(side.ratio / len(side) for side in sides) / 2 for sides in pairs]
    for name, values in {
        "reward_chosen": [chosen for chosen, _ in rewards],
        "reward_margin": [chosen - rejected for chosen, rejected in rewards],
        "reward_accuracy": [float(chosen > rejected) for chosen, rejected in rewards],
        "logprob_rejected": [sum(rejected.policy) for _, rejected in pairs],
        "length_chosen": [len(chosen) for chosen, _ in pairs],
        "kl_estimate": drift,
    }.items():
        assert metrics[name].item() == pytest.approx(math.fsum(values), rel=1e-9), name
    per_token = ours(batch, FORMS["simpo"])[2]
    assert per_token["reward_chosen"].item() == pytest.approx(sum(2.5 * sum(c.policy) / len(c) for c, _ in pairs), rel=1e-9)
    assert "kl_estimate" not in per_token


AT_START = {
    "sigmoid": math.log(2),
    "cDPO": math.log(2),
    "sigmoid_norm": math.log(2),
    "ipo": 4.0,
    "hinge": 1.0,
    "robust": math.log(2),
    "dpop": math.log(2),
    "LD": math.log(2),
}


@pytest.mark.parametrize("name", AT_START)
def test_a_loss_with_a_reference_starts_where_its_formula_says(tmp_path: Path, name: str) -> None:
    job = small_job(tmp_path, "dpo", number=8, train={"steps": 1, "warmup_steps": 0}, dpo=FORMS[name])
    train_stage(job)
    assert losses_of(job)[0] == pytest.approx(AT_START[name], abs=1e-7)
    (line,) = metrics_of(job)
    assert (line["reward_margin"], line["kl_estimate"]) == (0.0, 0.0)


def test_rpo_starts_at_dpos_loss_and_the_likelihood_of_the_chosen_answer(tmp_path: Path) -> None:
    run = open_run(small_job(tmp_path, "dpo", number=8, dpo=FORMS["rpo"]))
    assert run.trainer.references is not None
    (micro,) = micro_batches(run.trainer.stream.batch(0), None, torch.device("cpu"))
    kept = run.trainer.references(micro.pairs.sequences)[0]
    lengths = [float((micro.labels[row, b:m] >= 0).sum()) for row, b, m, _ in run.trainer.stream.batch(0).pairs.tolist()]
    expected = math.log(2) - 0.5 * sum(value / length for value, length in zip(kept.tolist(), lengths, strict=True)) / len(lengths)
    assert step_gradients(run.trainer)[0]["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_loss_without_a_reference_needs_no_reference_pass(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=8, dpo=FORMS["simpo"], heldout=True)
    assert open_run(job).trainer.references is None
    train_stage(job)
    assert not (job.run_dir / "reference").exists()
    assert len(losses_of(job)) == 12
    assert "kl_estimate" not in metrics_of(job)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect with loss ipo; .*robust, rpo read it"),
        ({"rpo_alpha": 1.0}, "rpo_alpha has no effect with loss sigmoid; rpo read it"),
        ({"loss": {"hinge": 1.0, "ipo": 1.0}, "simpo_gamma": 1.0}, "simpo_gamma has no effect with loss hinge and ipo"),
        ({"loss": "robust"}, "robust needs label_smoothing"),
        ({"loss": "nll"}, "alone it is objective sft"),
        ({"loss": {}}, "must be a name or a mapping"),
        ({"loss": 3}, "must be a name or a mapping"),
        ({"loss": ["sigmoid"]}, "must be a name or a mapping"),
        ({"loss": "sigmiod"}, "unknown loss 'sigmiod'.*sigmoid"),
        ({"loss": {"kto_pair": 1.0}}, "unknown loss 'kto_pair'"),
        ({"loss": {"ipo": 0.0}}, "weight of ipo must be a number above 0"),
        ({"loss": {"ipo": True}}, "weight of ipo must be a number above 0"),
        ({"loss": {"ipo": 1e12}}, "weight of ipo must be a number above 0"),
        ({"loss": {"sigmoid": 1.0, "simpo": 1.0}, "ld_alpha": 0.5}, "loss simpo is of means"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "hinge", "ld_alpha": -0.1}, "greater than or equal to 0"),
    ],
)
def test_an_option_that_a_loss_does_not_read_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_stage("dpo", dpo=settings)
