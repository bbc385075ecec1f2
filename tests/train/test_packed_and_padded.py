"""Packed rows, padded rows and sequences one by one: the same loss and gradients, for the same step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keural.data.loading.batch import Batch, empty_batch, fill
from keural.data.tokens.store import TokenStore
from keural.recipe import OBJECTIVES
from keural.train.divergence import against_divergence
from keural.train.gradients import count_step, forward_backward
from keural.train.micro_batches import micro_batches
from keural.train.trainer import Trainer
from tests.helpers.train_small import LENGTH, open_run, small_job

NO_ROUTER = {"balance_coef": 0.0, "z_coef": 0.0}


def rows_of(trainer: Trainer, records: list[list[int]]) -> Batch:
    """A row for each record, padded to the longest: both sides of a pair; of a labelled answer each sequence has its own."""
    store = trainer.stream.store
    assert isinstance(store, TokenStore)
    if store.labels is None:
        return padded_rows(store, records)
    own, other = (padded_rows(store, [[record[side]] for record in records]) for side in (0, 1))
    good = store.labels[[record[0] // 2 for record in records]]
    return replace(own, desirable=good, mismatched=replace(other, desirable=good))


def padded_rows(store: TokenStore, records: list[list[int]]) -> Batch:
    """A row for each record."""
    lengths = [sum(len(store.sequence(sequence)) for sequence in record) for record in records]
    batch, places = empty_batch(len(records), max(lengths)), []
    for row, record in enumerate(records):
        ends = [0]
        for number, sequence in enumerate(record, start=1):
            tokens = store.sequence(sequence)
            labels = np.full(len(tokens), -100, dtype=np.int64)
            labels[:-1] = np.where(store.loss_mask(sequence)[1:], tokens[1:].astype(np.int64), -100)
            fill(batch, row, ends[-1], tokens, labels, number, sequence)
            ends.append(ends[-1] + len(tokens))
        batch.position_ids[row, ends[-1] :] = np.arange(max(lengths) - ends[-1])
        places.append((row, *ends))
    columns = 2 + len(records[0])
    return replace(batch, pairs=np.array(places if store.kind != "conversations" else [], dtype=np.int64).reshape(-1, columns))


def loss_and_gradients(trainer: Trainer, batches: list[Batch], limit: int | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a step whose rows are those of all batches; each is a forward pass of its own, or several."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer = against_divergence(trainer, batches, trainer.references)
    micros = [micro for batch in batches for micro in micro_batches(batch, limit, torch.device("cpu"))]
    totals = [count_step(trainer, batch, micros) for batch in batches]
    whole = replace(totals[0], denominator=sum(each.denominator for each in totals), tokens=sum(each.tokens for each in totals))
    loss = sum(float(forward_backward(trainer, micro, whole, None)[0]) for micro in micros) / whole.denominator
    return loss, {name: parameter.grad.clone() for name, parameter in trainer.policy.model.named_parameters()}


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
@pytest.mark.parametrize(
    ("recompute", "world"),
    [("none", 1), ("selective", 2), *(pytest.param(*both, marks=pytest.mark.slow) for both in (("none", 2), ("selective", 1)))],
)
def test_the_same_step_packed_padded_and_one_by_one(tmp_path: Path, objective: str, recompute: str, world: int) -> None:
    settings: dict[str, Any] = {"train": {"recompute": recompute}} | ({} if objective == "sft" else {objective: {"beta": 0.7}})
    trainer = open_run(small_job(tmp_path, objective, router=NO_ROUTER, **settings)).trainer
    with torch.no_grad():
        torch.manual_seed(3)
        for parameter in trainer.policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # away from the reference, so that pairs weigh differently
    packed = [trainer.stream.batch(1, rank, world) for rank in range(world)]
    numbers = sorted(np.concatenate([np.unique(batch.sequence_ids[batch.sequence_ids >= 0]) for batch in packed]).tolist())
    together = OBJECTIVES[trainer.stream.objective].sequences_per_record
    first = {number - number % together for number in numbers}
    records = [list(range(number, number + together)) for number in sorted(first)]
    expected_loss, expected = loss_and_gradients(trainer, packed)
    others = {
        "micro": loss_and_gradients(trainer, packed, 2 * LENGTH),
        "padded": loss_and_gradients(trainer, [rows_of(trainer, records)]),
        "one by one": loss_and_gradients(trainer, [rows_of(trainer, [record]) for record in records]),
    }
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for name, (loss, gradients) in others.items():
        assert loss == pytest.approx(expected_loss, abs=1e-5), name
        for parameter, gradient in expected.items():
            torch.testing.assert_close(
                gradients[parameter], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_step_of_pairs_is_a_row_without_padding_where_nothing_limits_it(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, "dpo")).trainer
    batch = trainer.stream.batch(0)
    assert batch.input_ids.shape == (1, batch.num_tokens)
    halves = [trainer.stream.batch(0, rank, 2) for rank in (0, 1)]
    assert [len(half.input_ids) for half in halves] == [1, 1]
    limited = open_run(small_job(tmp_path, "dpo", run="limited", train={"micro_batch_tokens": 2 * LENGTH})).trainer.stream.batch(0)
    assert limited.input_ids.shape[1] <= 2 * LENGTH
