"""The tables of objectives fit together, and pair indices are those of a naive search."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore
from keural.recipe import OBJECTIVES, STORES, Objective, StageSpec, StoreKind
from keural.train.micro_batches import micro_batches
from keural.train.objectives.preference import dpo_loss, pair_logprobs
from keural.train.objectives.registry import LOSSES
from tests.helpers.train_small import LENGTH, open_run, small_job, small_stage, write_store

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
        assert tuple(trainer.objective(logprobs, micro, trainer.references).metrics) == OBJECTIVES[objective].metrics


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


def test_dpo_loss_is_the_formula_of_the_paper() -> None:
    chosen, rejected = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.0])
    terms = dpo_loss(chosen, rejected, torch.tensor([-3.5, -4.0]), torch.tensor([-4.5, -5.0]), beta=0.5)
    margins = torch.tensor([0.0, -1.0])
    torch.testing.assert_close(terms.loss, -torch.log(torch.sigmoid(margins)).sum())
    assert terms.metrics["reward_margin"].item() == pytest.approx(-1.0)
    assert terms.metrics["reward_accuracy"].item() == 0.0
    assert terms.metrics["reward_chosen"].item() == pytest.approx(0.5 * (0.5 - 1.0))


def test_settings_of_another_objective_are_refused() -> None:
    with pytest.raises(ValueError, match="dpo settings have no effect with objective sft"):
        small_stage("sft", dpo={"beta": 0.2})
