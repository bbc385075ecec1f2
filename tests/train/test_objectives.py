"""The tables of objectives fit together, and pair indices are those of a naive search."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import PAIR_WEIGHTS, StoreWriter, TokenStore
from keural.files import atomic_directory
from keural.recipe import OBJECTIVES, STORES, DpoSpec, Objective, StageSpec, StoreKind
from keural.train.micro_batches import micro_batches
from keural.train.objectives.pairwise import Answers
from keural.train.objectives.preference import pair_logprobs, preference_terms
from keural.train.objectives.registry import LOSSES
from keural.train.stage.heldout import evaluate
from tests.helpers.train_small import END, LENGTH, SHA, VOCAB, open_run, small_job, small_stage, step_gradients, write_store

CPU = torch.device("cpu")


def test_every_objective_has_a_row_and_a_loss_and_every_store_a_shape() -> None:
    assert set(get_args(Objective)) == set(OBJECTIVES) == set(LOSSES)
    assert set(get_args(StoreKind)) == set(STORES) == {kind.store for kind in OBJECTIVES.values()}
    assert {kind.settings for kind in OBJECTIVES.values() if kind.settings} <= set(StageSpec.model_fields)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_loss_reports_the_metrics_of_its_row(tmp_path: Path, objective: str) -> None:
    trainer = open_run(small_job(tmp_path, objective)).trainer
    for micro in micro_batches(trainer.stream.batch(0), None, CPU):
        logprobs = trainer.policy(micro).logprobs
        assert set(trainer.objective(logprobs, micro, trainer.references).metrics) == set(trainer.stage.metrics)


def naive_sides(batch: Batch) -> list[tuple[int, set[int]]]:
    """The store's sequence and the flattened positions of every packed sequence, those of each row in the order of the store."""
    sides = []
    for row, (segments, sequences) in enumerate(zip(batch.segment_ids, batch.sequence_ids, strict=True)):
        found = [np.flatnonzero(segments == number) for number in range(1, segments.max() + 1)]
        found.sort(key=lambda places: (sequences[places[0]], places[0]))
        sides += [
            (int(sequences[places[0]]), {row * batch.input_ids.shape[1] + int(place) for place in places}) for places in found
        ]
    return sides


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("limit", [None, 2 * LENGTH, 4 * LENGTH])
def test_pair_indices_are_those_of_every_rank_and_micro_batch(tmp_path: Path, world: int, limit: int | None) -> None:
    store = TokenStore.open(write_store(tmp_path / "store", "dpo", 9, longest=12))
    stream = Stream(store, "dpo", LENGTH, batch_pairs=13)  # some pairs twice
    total = 0
    for batch in [stream.batch(2, rank, world) for rank in range(world)]:
        for part, micro in zip(parts(batch, limit), micro_batches(batch, limit, CPU), strict=True):
            sides = naive_sides(part)
            assert micro.pairs.sequences.T.tolist() == [[sequence, sequence + 1] for sequence, _ in sides if sequence % 2 == 0]
            chosen_first = [*(s for s in sides if s[0] % 2 == 0), *(s for s in sides if s[0] % 2 == 1)]
            found: list[set[int]] = [set() for _ in sides]
            for place, side in zip(micro.pairs.positions.tolist(), micro.pairs.sides.tolist(), strict=True):
                found[side].add(place)
            assert found == [places for _, places in chosen_first]
            total += len(part.pairs)
    assert total == 13


def parts(batch: Batch, limit: int | None) -> list[Batch]:
    rows, length = batch.input_ids.shape
    size = rows if limit is None else limit // length
    return [batch.select(slice(start, start + size)) for start in range(0, rows, size)]


@pytest.mark.parametrize("objective", ["next_token", "sft"])
def test_other_data_has_no_pairs(tmp_path: Path, objective: str) -> None:
    trainer = open_run(small_job(tmp_path, objective)).trainer
    assert len(trainer.stream.batch(0).pairs) == 0
    (micro,) = micro_batches(trainer.stream.batch(0), None, CPU)
    assert pair_logprobs(torch.zeros(micro.labels.shape), micro.pairs).shape == (2, 0)


def test_settings_of_another_objective_are_refused() -> None:
    with pytest.raises(ValueError, match="dpo settings have no effect with objective sft"):
        small_stage("sft", dpo={"beta": 0.2})


def test_weights_of_pairs_multiply_their_losses_and_metrics() -> None:
    draw = torch.Generator().manual_seed(4)
    sides = [-torch.rand(3, generator=draw) * 5 for _ in range(4)]
    lengths = [torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 5.0, 2.0])]
    answers = Answers(*sides, *lengths, sides[0])
    spec = DpoSpec(beta=0.5)
    whole = preference_terms(answers, spec, torch.tensor([1.0, 0.25, 0.5]))
    alone = [preference_terms(Answers(*(side[place : place + 1] for side in answers)), spec) for place in range(3)]
    torch.testing.assert_close(whole.loss, alone[0].loss + 0.25 * alone[1].loss + 0.5 * alone[2].loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, alone[0].metrics[name] + 0.25 * alone[1].metrics[name] + 0.5 * alone[2].metrics[name])


def write_weighted(directory: Path, weights: list[float], repeats: list[int]) -> Path:
    """Pairs of one prompt and two answers, each so many times in the store, with these weights."""
    draw = np.random.default_rng(3)
    with atomic_directory(directory) as path, StoreWriter(path, SHA, VOCAB, "pairs") as writer:
        for repeat in repeats:
            sides = [draw.integers(4, VOCAB, 9) for _ in range(2)]
            for side in sides * repeat:
                side[-1] = END
                writer.add(side, [0] * 4 + [1] * 5)
        if any(weight != 1 for weight in weights):
            (path / PAIR_WEIGHTS).write_bytes(np.array(weights, dtype="<f4").tobytes())
            writer.close(extra=[PAIR_WEIGHTS])
    return directory


@pytest.mark.parametrize("limit", [None, 2 * LENGTH])
def test_a_pair_of_weight_one_counts_like_four_of_a_quarter(tmp_path: Path, limit: int | None) -> None:
    """The oracle are stores in which pairs stand so many times as their weights say."""
    found = []
    for run, weights, repeats in (
        ("weighted", [1.0, 0.25, 0.5], [1, 1, 1]),
        ("repeated", [1.0] * 7, [4, 1, 2]),
        ("small", [0.02, 0.005, 0.01], [1, 1, 1]),
    ):
        directory = tmp_path / run
        directory.mkdir()
        write_weighted(directory / "store", weights, repeats)
        write_weighted(directory / "heldout", weights, repeats)
        train = {"batch_pairs": sum(repeats), "micro_batch_tokens": limit}
        job = small_job(directory, "dpo", heldout=True, router={"balance_coef": 0.0, "z_coef": 0.0}, train=train, dpo={"beta": 5.0})
        opened = open_run(job)
        with torch.no_grad():
            for parameter in opened.trainer.policy.model.parameters():
                parameter.add_(0.01)
        heldout = Stream(TokenStore.open(directory / "heldout"), "dpo", LENGTH, batch_pairs=1)
        references = opened.trainer.references
        found.append((*step_gradients(opened.trainer), evaluate(opened.trainer, heldout, references).figures))
    for losses, gradients, figures in found[1:]:
        for name in ("loss", *OBJECTIVES["dpo"].metrics):
            torch.testing.assert_close(losses[name], found[0][0][name])
            assert figures[name] == pytest.approx(found[0][2][name], rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], atol=1e-5, rtol=1e-4)
    assert found[0][0]["loss"] != pytest.approx(0.6931, abs=1e-3), "the weights matter"
    assert [figures["items"] for *_, figures in found] == pytest.approx([1.75, 7, 0.035])


@pytest.mark.parametrize("world", [1, 2])
def test_weights_follow_their_pairs_over_ranks_and_micro_batches(tmp_path: Path, world: int) -> None:
    weights = [1 / (1 + number) for number in range(9)]
    stream = Stream(TokenStore.open(write_weighted(tmp_path / "s", weights, [1] * 9)), "dpo", LENGTH, batch_pairs=13)
    seen = 0
    for rank in range(world):
        for micro in micro_batches(stream.batch(1, rank, world), LENGTH, CPU):
            assert micro.pairs.weights is not None
            assert micro.pairs.weights.tolist() == pytest.approx([weights[pair // 2] for pair in micro.pairs.sequences[0]])
            seen += len(micro.pairs.weights)
    assert seen == 13
