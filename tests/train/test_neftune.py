"""Noise on the embeddings is NEFTune's, the same however a step is cut, by whatever computes it, and absent unless asked for."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from keural.train.micro_batches import micro_batches
from keural.train.network.neftune import embedding_noise, noised
from keural.train.stage.heldout import evaluate
from keural.train.stage.training import train_stage
from tests.helpers.train_small import LENGTH, losses_of, open_run, small_job, small_stage, step_gradients, weights_of

NOISE = {"neftune_alpha": 10.0}


def test_noise_is_uniform_with_the_papers_bound_and_none_on_padding() -> None:
    segments = np.array([[1] * 20 + [2] * 5 + [0] * 7])
    sequences = np.array([[4] * 20 + [9] * 5 + [-1] * 7])
    noise = embedding_noise(segments, sequences, 64, alpha=5.0, seed=(1, 2))[0]
    for places, tokens in ((slice(0, 20), 20), (slice(20, 25), 5)):
        bound = 5.0 / math.sqrt(tokens * 64)
        values = noise[places] / bound
        assert 0.9 < values.abs().max() <= 1
        assert values.mean().abs() < 0.1
        assert values.square().mean().item() == pytest.approx(1 / 3, rel=0.15)
    assert (noise[25:] == 0).all()


def test_every_conversation_and_step_has_its_own() -> None:
    segments, sequences = np.array([[1, 1, 2, 2]]), np.array([[4, 4, 5, 5]])
    first, other_step = (embedding_noise(segments, sequences, 8, 5.0, (1, step))[0] for step in (0, 1))
    assert not torch.equal(first[:2], first[2:])
    assert not torch.equal(first, other_step)
    elsewhere = embedding_noise(np.array([[0, 1, 1]]), np.array([[-1, 5, 5]]), 8, 5.0, (1, 0))[0]
    assert torch.equal(elsewhere[1:], first[2:])


def test_losses_and_gradients_do_not_depend_on_how_the_step_is_cut_or_computed(tmp_path: Path) -> None:
    """`selective` is computed by the training engine."""
    settings = [{}, {"micro_batch_tokens": 2 * LENGTH}, {"recompute": "selective"}]
    found = [
        step_gradients(open_run(small_job(tmp_path, "sft", run=str(number), train=train, sft=NOISE)).trainer)
        for number, train in enumerate(settings)
    ]
    for losses, gradients in found[1:]:
        torch.testing.assert_close(losses, found[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-5, rtol=1e-4)
    plain = step_gradients(open_run(small_job(tmp_path, "sft", run="plain")).trainer)
    assert abs(plain[0]["loss"] - found[0][0]["loss"]) > 1e-4


def test_the_loss_is_that_of_embeddings_with_the_noise_added(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, "sft", sft=NOISE, router={"balance_coef": 0.0, "z_coef": 0.0})).trainer
    batch = trainer.stream.batch(0)
    (micro,) = noised(trainer, 0, batch, micro_batches(batch, None, torch.device("cpu")))
    assert micro.noise is not None
    model = trainer.policy.model
    with torch.no_grad():
        embedded = model.model.embed_tokens(micro.input_ids) + micro.noise
        logits = model(inputs_embeds=embedded, position_ids=micro.position_ids, use_cache=False).logits.log_softmax(-1)
    trained = micro.labels >= 0
    expected = -logits.gather(-1, micro.labels.clamp(min=0)[..., None]).squeeze(-1)[trained].mean()
    assert step_gradients(trainer)[0]["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_held_out_figures_have_no_noise(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, "sft", sft=NOISE)).trainer
    plain = dataclasses.replace(trainer, stage=small_stage("sft"))
    assert evaluate(trainer, trainer.stream, None).figures == evaluate(plain, trainer.stream, None).figures


def test_a_resumed_stage_goes_on_with_the_same_noise(tmp_path: Path) -> None:
    train = {"steps": 4, "save_every": 2, "warmup_steps": 0, "lr": 1e-3, "min_lr": 1e-3}
    whole = small_job(tmp_path, "sft", run="whole", train=train, sft=NOISE)
    weights = weights_of(train_stage(whole))
    stopped = small_job(tmp_path, "sft", run="stopped", train=train | {"steps": 2}, sft=NOISE)
    train_stage(stopped)
    again = weights_of(train_stage(dataclasses.replace(stopped, stage=whole.stage)))
    assert losses_of(stopped) == losses_of(whole)
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_it_is_off_by_default_and_refused_elsewhere() -> None:
    assert small_stage("sft").sft.neftune_alpha == 0
    for objective in ("dpo", "next_token"):
        with pytest.raises(ValueError, match=f"sft settings have no effect with objective {objective}"):
            small_stage(objective, sft=NOISE)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        small_stage("sft", sft={"neftune_alpha": -1.0})
