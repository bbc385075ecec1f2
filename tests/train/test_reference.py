"""Reference log-probabilities: computed once for each pair by training's own passes, kept whole, found again."""

import dataclasses
import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.train.checks.record import CHECKS_FILE, ChecksFile
from keural.train.micro_batches import micro_batches
from keural.train.objectives.preference import pair_logprobs
from keural.train.reference.cache import ReferenceCache
from keural.train.reference.online import OnlineReference, values_by
from keural.train.reference.records import MANIFEST, RECORD, RECORDS, RecordFile, ReferenceIdentity, pair_digests
from keural.train.stage.job import StageJob
from keural.train.stage.run import StageRun
from keural.train.stage.signals import StopSignals
from keural.train.stage.training import make_references, train_stage
from tests.helpers.train_small import (
    LENGTH,
    losses_of,
    open_run,
    random_model,
    small_config,
    small_job,
    start,
    weights_of,
    write_store,
)

Said = pytest.CaptureFixture[str]
ROUNDING = 2e-5
"""Values of the same pair that were computed in other rows."""


def cache_of(run: StageRun) -> ReferenceCache:
    found = run.trainer.references
    assert isinstance(found, ReferenceCache)
    return found


def file_of(job: StageJob) -> Path:
    """The one file of reference values of a job."""
    (found,) = (job.references or job.run_dir / "reference").glob(f"*/{RECORDS}")
    return found


def number_stored(job: StageJob) -> int:
    """Whole records that a job's file has."""
    return sum(file.stat().st_size // RECORD.itemsize for file in (job.run_dir / "reference").glob(f"*/{RECORDS}"))


def records(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), dtype=RECORD)


@pytest.fixture
def computed(capfd: Said) -> Callable[[], list[str]]:
    """What was said of reference values since the last call."""

    def lines() -> list[str]:
        return [line for line in capfd.readouterr().out.splitlines() if "reference" in line or "damaged" in line]

    return lines


@pytest.mark.parametrize("limit", [None, 2 * LENGTH])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("reference", ["cached", "online"])
def test_at_step_0_policy_and_reference_agree_to_the_last_bit_and_the_loss_is_ln_2(
    tmp_path: Path, limit: int | None, recompute: str, reference: str
) -> None:
    train = {"micro_batch_tokens": limit, "recompute": recompute, "steps": 3}
    job = small_job(tmp_path, "dpo", train=train, dpo={"reference": reference})
    trainer = open_run(job).trainer
    for micro in micro_batches(trainer.stream.batch(0), limit, torch.device("cpu")):
        found = trainer.references
        values = found.of(micro)(micro.pairs.sequences) if isinstance(found, OnlineReference) else found(micro.pairs.sequences)  # type: ignore[misc]
        assert torch.equal(pair_logprobs(trainer.policy(micro).logprobs, micro.pairs).detach(), values)
    train_stage(job)
    assert losses_of(job)[0] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("train", [{}, {"precision": "split"}, {"micro_batch_tokens": 2 * LENGTH}], ids=["fp32", "split", "micro"])
def test_a_reference_computed_in_the_step_is_the_one_that_is_kept(tmp_path: Path, train: dict[str, Any]) -> None:
    train = {"steps": 6, "evaluate_every": 3, "lr": 0.01, **train}
    runs = {
        name: small_job(tmp_path, "dpo", heldout=True, run=name, train=train, dpo={"reference": name})
        for name in ("cached", "online")
    }
    weights = {name: weights_of(train_stage(job)) for name, job in runs.items()}
    assert losses_of(runs["online"]) == losses_of(runs["cached"])
    assert all(torch.equal(weights["online"][name], weight) for name, weight in weights["cached"].items())
    assert not (runs["online"].run_dir / "reference").exists()


def test_the_reference_is_the_initial_model_also_in_later_epochs_and_after_a_restart(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=6, train={"steps": 9, "save_every": 3, "lr": 0.05})
    first = cache_of(open_run(job)).values
    train_stage(job)
    assert not np.isnan(first).any()
    assert np.array_equal(first, cache_of(open_run(job)).values)


def test_only_pairs_that_training_will_see_are_computed(tmp_path: Path) -> None:
    cache = cache_of(open_run(small_job(tmp_path, "dpo", number=60, train={"steps": 5})))
    assert int((~np.isnan(cache.values)).sum()) == 5 * 4 * 2


@pytest.mark.parametrize(("at", "computed_pairs"), [("read", 0), ("append", 4)], ids=["before its first batch", "after it"])
def test_a_signal_at_the_reference_pass_stops_the_stage_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, computed_pairs: int
) -> None:
    job, whole = (small_job(tmp_path / name, "dpo", number=12, train={"steps": 3}) for name in ("stopped", "whole"))
    original = getattr(RecordFile, at)

    def interrupted(*arguments: Any) -> Any:
        if signal.getsignal(signal.SIGINT) is not before:  # the second one would end the process
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(RecordFile, at, interrupted)
        result = train_stage(job)
    assert (result.interrupted, result.steps, number_stored(job)) == (True, 0, computed_pairs)
    expected = weights_of(train_stage(whole))
    for name, weight in weights_of(train_stage(job)).items():
        assert torch.equal(weight, expected[name])
    assert ChecksFile.read(job.run_dir / CHECKS_FILE).reference_difference == 0


class TestWhatIsFoundAgain:
    """A value depends on its pair, the weights and the precision, and on nothing else of a recipe."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"train": {"lr": 5e-3, "steps": 14}},
            {"dpo": {"beta": 0.7}},
            {"train": {"batch_pairs": 3}},
            {"train": {"batch_pairs": 6, "micro_batch_tokens": 2 * LENGTH}, "router": {"z_coef": 0.5}},
        ],
        ids=["rate and length", "beta", "size of a step", "cut and router"],
    )
    def test_another_recipe_on_the_same_pairs_computes_nothing(
        self, tmp_path: Path, changes: dict[str, Any], computed: Callable[[], list[str]]
    ) -> None:
        job = small_job(tmp_path, "dpo", number=12, heldout=True)
        first = cache_of(open_run(job)).values
        assert len(computed()) == 2
        other = dataclasses.replace(
            small_job(tmp_path, "dpo", heldout=True, run="other", **changes), references=job.run_dir / "reference"
        )
        assert np.array_equal(cache_of(open_run(other)).values, first)
        assert computed() == []

    def test_pairs_that_are_added_are_computed_alone(self, tmp_path: Path) -> None:
        cache = cache_of(open_run(small_job(tmp_path, "dpo", number=8)))
        before = records(cache.file.path)
        grown = tmp_path / "grown"
        write_store(grown, "dpo", 11)  # the same eight, and three more
        store = TokenStore.open(grown)
        assert {pair.tobytes() for pair in before["pair"]} <= {pair.tobytes() for pair in pair_digests(store)}
        job = dataclasses.replace(
            small_job(tmp_path, "dpo", run="more", train={"batch_pairs": 1, "steps": 11}),
            train_store=grown,
            references=tmp_path / "run" / "reference",
        )
        cache_of(open_run(job))
        after = records(cache.file.path)
        assert np.array_equal(after[:8], before)
        assert len(after) == 11

    def test_other_weights_precision_or_tokenizer_are_other_values(self, tmp_path: Path) -> None:
        job = small_job(tmp_path, "dpo")
        open_run(job)
        rounded = small_job(tmp_path, "dpo", train={"compute_dtype": "bfloat16"})
        shutil.copytree(tmp_path / "init", tmp_path / "other")
        random_model(seed=8).save_pretrained(tmp_path / "other")
        for other in (rounded, dataclasses.replace(job, init=tmp_path / "other")):
            open_run(other)
        assert len(list((tmp_path / "run" / "reference").iterdir())) == 3

    def test_equal_pairs_share_a_value(self, tmp_path: Path) -> None:
        once, twice = (write_store(tmp_path / name, "dpo", 5) for name in ("once", "twice"))
        joined = TokenStore.join({"a": TokenStore.open(once), "b": TokenStore.open(twice)})
        digests = pair_digests(joined)
        assert np.array_equal(digests[:5], digests[5:])
        assert len({digest.tobytes() for digest in digests}) == 5

    def test_a_pair_with_another_mask_or_swapped_sides_is_another_pair(self, tmp_path: Path) -> None:
        from tests.data.test_stream import make_store

        store = make_store(tmp_path / "a", "pairs", [4, 5])
        (digest,) = pair_digests(store)
        swapped = [store.sequence(1), store.sequence(0)], [store.loss_mask(1), store.loss_mask(0)]
        other_mask = [store.sequence(0), store.sequence(1)], [store.loss_mask(0), 1 - store.loss_mask(1)]
        cut = [store.sequence(0)[:3], store.sequence(1)], [store.loss_mask(0)[:3], store.loss_mask(1)]
        for name, (tokens, masks) in {"swapped": swapped, "mask": other_mask, "cut": cut}.items():
            assert not np.array_equal(pair_digests(rewritten(tmp_path / name, tokens, masks))[0], digest), name


def rewritten(directory: Path, tokens: list[Any], masks: list[Any]) -> TokenStore:
    from keural.data.tokens.store import StoreWriter

    with StoreWriter(directory, "a" * 64, 10**6, "pairs") as writer:
        for side in range(2):
            writer.add(tokens[side], masks[side])
    return TokenStore.open(directory)


class TestInterrupted:
    """A process may be killed at any moment, and the file be damaged afterwards: what is read is what was computed."""

    def test_a_computation_stopped_halfway_goes_on_there(self, tmp_path: Path) -> None:
        whole = open_run(small_job(tmp_path, "dpo", number=20))
        ranks, stream, store = whole.trainer.ranks, whole.trainer.stream, whole.trainer.stream.store
        assert isinstance(store, TokenStore)
        batches, compute = [stream.batch(step) for step in range(5)], values_by(whole.trainer.policy)
        file = RecordFile(tmp_path / "cache", cache_of(whole).file.identity)
        assert ReferenceCache(file, store, ranks).fill(compute, batches[:2], None) == 2
        assert ReferenceCache(file, store, ranks).fill(compute, batches, None) == 3
        resumed = ReferenceCache(file, store, ranks)
        assert np.array_equal(resumed.values, cache_of(whole).values)
        assert resumed.fill(compute, batches, None) == 0

    def test_every_length_of_a_torn_file_reads_as_its_whole_records(self, tmp_path: Path) -> None:
        job = small_job(tmp_path, "dpo", number=4, train={"batch_pairs": 1, "steps": 4, "warmup_steps": 0})
        values, path = cache_of(open_run(job)).values, file_of(job)
        content = path.read_bytes()
        assert len(content) == 4 * RECORD.itemsize
        for length in (0, 1, 31, 32, 33, 63, 96, 127):
            path.write_bytes(content[:length])
            assert np.array_equal(cache_of(open_run(job)).values, values)
            assert path.read_bytes() == content

    @pytest.mark.parametrize("place", [0, 9, 16, 23, 31])
    def test_a_flipped_bit_is_noticed_and_the_value_computed_again(
        self, tmp_path: Path, place: int, computed: Callable[[], list[str]]
    ) -> None:
        job = small_job(tmp_path, "dpo")
        first, path = cache_of(open_run(job)).values, file_of(job)
        content = bytearray(path.read_bytes())
        content[5 * RECORD.itemsize + place] ^= 4
        path.write_bytes(content)
        computed()
        assert np.array_equal(cache_of(open_run(job)).values, first, equal_nan=True)
        said = computed()
        assert "1 records are damaged" in said[0]
        assert "of 1 train batches computed" in said[1]
        open_run(job)
        assert computed() == [], "what was damaged is gone"

    def test_records_of_another_model_are_not_believed(self, tmp_path: Path) -> None:
        job = small_job(tmp_path, "dpo")
        cache = cache_of(open_run(job))
        other = RecordFile(tmp_path / "moved", cache.file.identity.model_copy(update={"weights": "others"}))
        (tmp_path / "moved").mkdir()
        shutil.copy(cache.file.path, other.path)
        found = other.read()
        assert (len(found.pairs), found.damaged) == (0, len(records(cache.file.path)))

    @pytest.mark.slow
    @pytest.mark.parametrize(("objective", "seed"), [("dpo", 0), ("dpo", 1), ("dpo", 2), ("kto", 0), ("kto", 1)])
    def test_kill_9_at_random_moments_loses_one_batch_at_most_and_no_value(self, tmp_path: Path, objective: str, seed: int) -> None:
        batch = {"batch_answers": 4} if objective == "kto" else {}
        settings: dict[str, Any] = {"number": 60, "train": {"steps": 15, "save_every": None, **batch}, "heldout": True}
        job, moments = small_job(tmp_path, objective, **settings), random.Random(seed)
        expected = cache_of(open_run(small_job(tmp_path, objective, run="whole", **settings))).values
        kills = 0
        while not (job.run_dir / "metrics.jsonl").exists():
            before = number_stored(job)
            process = start({"directory": str(tmp_path), "objective": objective, "pause": 0.05, "asked": "asked", **settings})
            while process.is_alive() and number_stored(job) == before and not (job.run_dir / "metrics.jsonl").exists():
                time.sleep(0.005)  # however slow the machine is, every start gets somewhere
            time.sleep(moments.uniform(0.0, 0.3))
            process.kill()
            process.join()
            kills += 1
            assert kills < 60
            stored, begun = number_stored(job), int((tmp_path / "asked").read_text() or 0)
            assert stored >= min(begun, 14) * 4, "the batches before the one that was begun are there"
        assert kills > 1
        assert np.array_equal(cache_of(open_run(job)).values, expected)

    def test_a_second_process_is_refused_while_one_computes(self, tmp_path: Path) -> None:
        run = open_run(small_job(tmp_path, "dpo"))
        cache = cache_of(run)
        file = RecordFile(tmp_path / "shared", cache.file.identity)
        with file.writing():
            file.append(np.zeros((1, 2), np.uint64), np.zeros((1, 2), np.float32))
            second = RecordFile(tmp_path / "shared", cache.file.identity)
            assert len(second.read().pairs) == 1, "reading is no matter"
            with pytest.raises(UserError, match="another process is computing reference values there; wait"), second.writing():
                pass
        with second.writing():
            second.append(np.ones((1, 2), np.uint64), np.zeros((1, 2), np.float32))
        assert len(file.read().pairs) == 2

    def test_a_model_that_gives_no_number_is_refused(self, tmp_path: Path) -> None:
        run = open_run(small_job(tmp_path, "dpo"))
        store = run.trainer.stream.store
        assert isinstance(store, TokenStore)
        cache = ReferenceCache(RecordFile(tmp_path / "cache", cache_of(run).file.identity), store, run.trainer.ranks)
        with pytest.raises(UserError, match="not finite"):
            cache.fill(lambda micro: torch.full(micro.pairs.sequences.shape, math.nan), [run.trainer.stream.batch(0)], None)


class TestBroughtAlong:
    """Made by one machine with `make_references`, used by another; verified first."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        job = small_job(tmp_path, "dpo", run="elsewhere", heldout=True)
        assert make_references(job)
        assert [path.name for path in job.run_dir.iterdir()] == ["reference"], "nothing was trained or planned"
        return job.run_dir / "reference"

    def job(self, tmp_path: Path, directory: Path, **changes: Any) -> StageJob:
        dpo = {"reference_path": str(directory)} | changes.pop("dpo", {})
        return small_job(tmp_path, "dpo", heldout=True, dpo=dpo, **changes)

    def test_it_gives_the_same_losses_to_the_bit(self, tmp_path: Path, made: Path, computed: Callable[[], list[str]]) -> None:
        own = small_job(tmp_path, "dpo", heldout=True, run="own")
        train_stage(own)
        computed()
        (inside,) = made.iterdir()
        for directory in (made, inside):
            job = self.job(tmp_path, directory, run=directory.name)
            train_stage(job)
            assert losses_of(job) == losses_of(own)
            assert not (job.run_dir / "reference").exists()
        assert computed() == []

    @pytest.mark.parametrize("kept", [0.0, 0.5])
    def test_one_that_is_not_complete_is_refused_or_filled_where_that_was_asked_for(
        self, tmp_path: Path, made: Path, kept: float
    ) -> None:
        (path,) = made.glob(f"*/{RECORDS}")
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content)) // RECORD.itemsize * RECORD.itemsize])
        job = self.job(tmp_path, made)
        with pytest.raises(UserError, match=r"has no reference values for \d+ of the 48 train pairs.*--reference-only"):
            train_stage(job)
        assert make_references(job)
        train_stage(job)
        assert sorted(map(bytes, records(path))) == sorted(map(bytes, np.frombuffer(content, dtype=RECORD)))

    def test_a_damaged_one_is_refused(self, tmp_path: Path, made: Path) -> None:
        (path,) = made.glob(f"*/{RECORDS}")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match="1 records are damaged; bring it along again"):
            open_run(self.job(tmp_path, made))

    def test_one_of_another_model_is_refused_and_what_differs_is_named(self, tmp_path: Path, made: Path) -> None:
        (inside,) = made.iterdir()
        for directory in (made, inside):
            with pytest.raises(UserError, match=r"another model \(computed in float32, not computed in bfloat16\)"):
                open_run(self.job(tmp_path, directory, train={"compute_dtype": "bfloat16"}))
        other = dataclasses.replace(self.job(tmp_path, made), init=tmp_path / "other")
        random_model(seed=8).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=r"another model \(other weights\)"):
            open_run(other)

    def test_one_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such directory"):
            open_run(self.job(tmp_path, tmp_path / "nowhere"))

    def test_a_manifest_that_was_changed_is_refused(self, tmp_path: Path, made: Path) -> None:
        (manifest,) = made.glob(f"*/{MANIFEST}")
        manifest.write_bytes(manifest.read_bytes().replace(b"float32", b"float64"))
        with pytest.raises(UserError, match=rf"{MANIFEST}: damaged.*delete"):
            open_run(self.job(tmp_path, made))

    def test_a_path_has_no_effect_online(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="reference_path has no effect with"):
            small_job(tmp_path, "dpo", dpo={"reference": "online", "reference_path": "x"})

    def test_a_stage_without_reference_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="keeps no reference values"):
            make_references(small_job(tmp_path, "sft"))


def test_values_of_another_weight_of_longer_answers_are_others(tmp_path: Path) -> None:
    plain = cache_of(open_run(small_job(tmp_path, "dpo", number=12)))
    shorter = cache_of(open_run(small_job(tmp_path, "dpo", number=12, dpo={"ld_alpha": 0.25})))
    assert plain.file.directory != shorter.file.directory
    assert not np.array_equal(plain.values, shorter.values)
    assert train_stage(small_job(tmp_path, "dpo", number=12, dpo={"ld_alpha": 0.25})).loss_first == pytest.approx(
        math.log(2), abs=0.2
    )


def test_a_loss_without_reference_needs_none_and_refuses_its_settings(tmp_path: Path) -> None:
    free = {"loss": "simpo", "beta": 2.0}
    run = open_run(small_job(tmp_path, "dpo", dpo=free))
    assert run.trainer.references is None
    assert not (tmp_path / "run" / "reference").exists()
    for setting in ({"reference": "online"}, {"reference_path": "x"}):
        with pytest.raises(ValueError, match="has no effect with loss simpo"):
            small_job(tmp_path, "dpo", dpo=free | setting)


@pytest.mark.parametrize("settings", [{}, {"ld_alpha": 0.25}])
def test_the_online_reference_of_an_adapter_is_the_policy_with_it_off(tmp_path: Path, settings: dict[str, float]) -> None:
    pytest.importorskip("peft")
    adapted = {"lora": {"rank": 2, "targets": ["attention"]}, "number": 12, "train": {"steps": 3}}
    cached = open_run(small_job(tmp_path, "dpo", dpo=settings, run="cached", **adapted))
    online = open_run(small_job(tmp_path, "dpo", dpo=settings | {"reference": "online"}, run="online", **adapted))
    assert online.trainer.references.policy is online.trainer.policy
    cached.train(StopSignals())
    online.train(StopSignals())
    trained = [name for name, weight in online.trainer.policy.named_parameters() if weight.requires_grad]
    assert trained
    ours, theirs = (dict(run.trainer.policy.named_parameters()) for run in (online, cached))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_identity_names_what_differs() -> None:
    one = ReferenceIdentity(weights="a", network="b", tokenizer="c", precision="computed in float32", scored="all")
    assert one.differences(one.model_copy(update={"scored": "half", "weights": "d"})) == "other weights and half, not all"
    assert one.differences(one.model_copy(update={"tokenizer": "d", "network": "e"})) == "other network and other tokenizer"
    assert one.key == one.model_copy().key != one.model_copy(update={"weights": "b"}).key


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
    wider = dataclasses.replace(job, model_config=small_config(intermediate_size=48))
    with pytest.raises(UserError, match="intermediate_size is 24 there and 48 in the recipe"):
        train_stage(wider)


def test_values_of_other_rows_differ_by_rounding_alone(tmp_path: Path) -> None:
    first = cache_of(open_run(small_job(tmp_path, "dpo", number=12))).values
    other = cache_of(open_run(small_job(tmp_path, "dpo", run="other", train={"batch_pairs": 3, "micro_batch_tokens": 64}))).values
    np.testing.assert_allclose(other, first, rtol=ROUNDING)
