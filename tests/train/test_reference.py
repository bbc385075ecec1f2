"""Reference log-probabilities: computed once, by training's own passes, kept whole."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from keural.errors import UserError
from keural.train.micro_batches import micro_batches
from keural.train.objectives.preference import pair_logprobs
from keural.train.reference import CHECKSUMS, VALUES, ReferenceCache
from keural.train.stage import train_stage
from tests.helpers.train_small import LENGTH, losses_of, open_run, small_job


@pytest.mark.parametrize("limit", [None, 2 * LENGTH])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_at_step_0_policy_and_reference_agree_to_the_last_bit_and_the_loss_is_ln_2(
    tmp_path: Path, limit: int | None, recompute: str
) -> None:
    job = small_job(tmp_path, "dpo", train={"micro_batch_tokens": limit, "recompute": recompute, "steps": 3})
    trainer = open_run(job).trainer
    assert trainer.references is not None
    for micro in micro_batches(trainer.stream.batch(0), limit, torch.device("cpu")):
        policy = pair_logprobs(trainer.policy(micro).logprobs, micro.pairs)
        assert torch.equal(policy.detach(), trainer.references(micro.pairs.sequences))
    train_stage(job)
    assert losses_of(job)[0] == pytest.approx(math.log(2), abs=1e-7)


def test_the_reference_is_the_initial_model_also_in_later_epochs_and_after_a_restart(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=6, train={"steps": 9, "save_every": 3, "lr": 0.05})
    first = open_run(job).trainer.references
    assert isinstance(first, ReferenceCache)
    train_stage(job)
    again = open_run(job).trainer.references
    assert isinstance(again, ReferenceCache)
    assert not np.isnan(first.values).any()
    assert np.array_equal(first.values, again.values)


def test_only_pairs_that_training_will_see_are_computed(tmp_path: Path) -> None:
    cache = open_run(small_job(tmp_path, "dpo", number=60, train={"steps": 5})).trainer.references
    assert isinstance(cache, ReferenceCache)
    assert int((~np.isnan(cache.values)).sum()) == 5 * 4 * 2


def test_a_computation_stopped_halfway_goes_on_there(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=20)
    whole = open_run(job)
    assert isinstance(whole.trainer.references, ReferenceCache)
    ranks, stream, policy = whole.trainer.ranks, whole.trainer.stream, whole.trainer.policy
    batches = [stream.batch(step) for step in range(5)]
    cache = ReferenceCache(tmp_path / "cache", "a", 40, ranks)
    assert cache.fill(policy, batches[:2], None) == 2
    assert ReferenceCache(tmp_path / "cache", "a", 40, ranks).fill(policy, batches, None) == 3
    resumed = ReferenceCache(tmp_path / "cache", "a", 40, ranks)
    assert np.array_equal(resumed.values, whole.trainer.references.values)
    assert ReferenceCache(tmp_path / "cache", "other weights", 40, ranks).fill(policy, batches, None) == 5


def test_a_flipped_bit_is_noticed_and_the_value_computed_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = small_job(tmp_path, "dpo")
    first = open_run(job).trainer.references
    assert isinstance(first, ReferenceCache)
    path = job.run_dir / "reference" / "train" / VALUES
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    capfd.readouterr()
    again = open_run(job).trainer.references
    assert isinstance(again, ReferenceCache)
    assert "1 values are damaged" in capfd.readouterr().out
    assert np.array_equal(first.values, again.values, equal_nan=True)


@pytest.mark.parametrize("name", [VALUES, CHECKSUMS, "manifest.json"])
def test_a_file_of_another_form_is_refused(tmp_path: Path, name: str) -> None:
    job = small_job(tmp_path, "dpo")
    open_run(job)
    path = job.run_dir / "reference" / "train" / name
    path.write_bytes(path.read_bytes().replace(b"<", b">").replace(b'"', b"'"))
    with pytest.raises(UserError, match=rf"{name}: damaged.*delete"):
        open_run(job)


def test_a_pair_that_occurs_twice_in_a_batch_counts_twice(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=3, train={"batch_pairs": 7, "steps": 1, "warmup_steps": 0})
    run = open_run(job)
    chosen, rejected = run.trainer.stream.batch(0).pair_sequences
    assert len(chosen) == 7
    assert (rejected == chosen + 1).all()
    assert sorted(np.bincount(chosen)[::2].tolist()) == [2, 2, 3]
    assert train_stage(job).loss_first == pytest.approx(math.log(2), abs=1e-7)


def test_random_initial_weights_cannot_be_replaced_by_another_shape(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo")
    wider = dataclasses.replace(
        job, model_config=type(job.model_config)(**(job.model_config.to_dict() | {"intermediate_size": 48}))
    )
    with pytest.raises(UserError, match="intermediate_size is 24 there and 48 in the recipe"):
        train_stage(wider)
