"""Weights are met within one document, limits hold, what cannot be met is refused, and nothing is copied."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.cli.printing import print_data
from keural.data.loading.mixture import Mixture, allocate, mix
from keural.data.loading.stream import Stream
from keural.data.prepare import prepare
from keural.data.prepared import Prepared
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError
from keural.recipe import DataSpec, MixingSpec, SourceSpec, StoreKind
from keural.tokenizer import KeuralTokenizer
from tests.data.test_stream import pairs_in
from tests.helpers.examples import examples

SHA = "a" * 64
T = 16
KINDS: dict[str, StoreKind] = {"next_token": "documents", "sft": "conversations", "dpo": "pairs"}
OBJECTIVES = pytest.mark.parametrize("objective", list(KINDS))


def make_store(directory: Path, kind: StoreKind, lengths: dict[str, list[int]]) -> TokenStore:
    """A store with a section for each name; every token is another number."""
    number = 1
    sections = [{"source": name, "sequences": len(sizes)} for name, sizes in lengths.items()]
    with StoreWriter(directory, SHA, 10**6, kind, {"sections": sections}, shard_tokens=70) as writer:
        for size in (size for sizes in lengths.values() for size in sizes):
            writer.add(range(number, number + size), None if kind == "documents" else [1] * size)
            number += size
    return TokenStore.open(directory, SHA)


def stream_of(store: TokenStore, objective: str, mixture: Mixture, size: int = 1, seed: int = 3) -> Stream:
    batch: dict[str, Any] = {"batch_pairs" if objective == "dpo" else "batch_rows": size}
    return Stream(store, objective, T, seed=seed, mixture=mixture, **batch)  # type: ignore[arg-type]


def seen(stream: Stream) -> Counter[int]:
    """How often each token is in an epoch."""
    found: Counter[int] = Counter()
    for step in range(stream.instances_per_epoch):
        batch = stream.batch(step)
        found.update(batch.input_ids[batch.segment_ids > 0].tolist())
    return found


LENGTHS = st.lists(st.integers(1, T), min_size=1, max_size=15)
WEIGHTS = st.floats(0.05, 10)


@OBJECTIVES
@examples(10)
@given(data=st.data())
def test_shares_are_reached_within_a_document_and_limits_hold(
    tmp_path_factory: pytest.TempPathFactory, objective: str, data: st.DataObject
) -> None:
    names = ["a", "b", "c"][: data.draw(st.integers(1, 3))]
    sides = 2 if objective == "dpo" else 1
    lengths = {name: data.draw(LENGTHS) * sides for name in names}
    weights = {name: data.draw(WEIGHTS) for name in names}
    spec = MixingSpec(max_repeat=data.draw(st.floats(1, 5)), epoch=data.draw(st.one_of(st.just("scarcest"), st.integers(1, 800))))
    store = make_store(tmp_path_factory.mktemp("m") / "store", KINDS[objective], lengths)
    sizes = {name: len(sizes) // 2 if objective == "dpo" else sum(sizes) for name, sizes in lengths.items()}
    total = sum(weights.values())
    scarce = [
        name for name in names if spec.epoch != "scarcest" and spec.epoch * weights[name] / total > spec.max_repeat * sizes[name]
    ]
    if scarce:
        with pytest.raises(UserError, match=r"at most .* times; lower epoch"):
            mix(store, weights, spec)
        return
    mixture = mix(store, weights, spec)
    epoch = spec.epoch if spec.epoch != "scarcest" else min(spec.max_repeat * sizes[n] * total / weights[n] for n in names)
    longest = 1 if objective == "dpo" else T
    counted = seen(stream_of(store, objective, mixture))
    first = 1
    for name in names:
        tokens = range(first, first := first + sum(lengths[name]))
        times = [counted[token] for token in tokens]
        share = mixture.shares[name]
        assert sum(times) == share.tokens
        reached = share.records if objective == "dpo" else share.tokens
        assert abs(reached - epoch * weights[name] / total) <= longest
        assert max(times) - min(times) <= 1, "whole copies, and a part once more"
        assert reached <= spec.max_repeat * sizes[name] + 1e-9
        assert share.repeats == reached / sizes[name]
        assert share.unused_tokens == times.count(0)
        assert sum(share.share for share in mixture.shares.values()) == pytest.approx(1)
    assert sum(counted.values()) == sum(share.tokens for share in mixture.shares.values())


@given(st.dictionaries(st.sampled_from("abcde"), st.tuples(st.integers(1, 900), WEIGHTS), min_size=1), st.integers(1, 9000))
def test_what_is_missing_is_shared_among_the_others_only_when_asked(parts: dict[str, tuple[int, float]], epoch: int) -> None:
    sizes, weights = {n: size for n, (size, _) in parts.items()}, {n: weight for n, (_, weight) in parts.items()}
    spec = MixingSpec(epoch=epoch, max_repeat=3, scarce="renormalise")
    if epoch > 3 * sum(sizes.values()):
        with pytest.raises(UserError, match="more than all sources give"):
            allocate(sizes, weights, spec)
        return
    found = allocate(sizes, weights, spec)
    assert sum(found.values()) == pytest.approx(epoch)
    assert all(found[name] <= 3 * sizes[name] + 1e-6 for name in parts)
    free = [found[name] / weights[name] for name in parts if found[name] < 3 * sizes[name] - 1e-6]
    assert not free or max(free) == pytest.approx(min(free)), "those with enough keep their ratio"


@OBJECTIVES
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_mixed_batch_is_the_same_for_any_ranks_and_after_a_restart(tmp_path: Path, objective: str, world: int) -> None:
    lengths = {"a": [9, 12, 5, 16, 7, 7, 3, 15] * 2, "b": [4, 4, 8, 16]}
    store = make_store(tmp_path / "store", KINDS[objective], lengths)
    mixture = mix(store, {"a": 0.4, "b": 0.6}, MixingSpec())
    stream = stream_of(store, objective, mixture, size=5)
    again = stream_of(TokenStore.open(tmp_path / "store"), objective, mixture, size=5)
    assert stream.fingerprint == again.fingerprint
    for step in (7, 0, 3):
        whole = stream.batch(step)
        shares = [again.batch(step, rank, world) for rank in range(world)]
        assert pairs_in(shares) == pairs_in([whole])
        for row in range(len(whole.input_ids)) if objective != "dpo" else ():
            for name in ("input_ids", "labels", "position_ids", "segment_ids", "sequence_ids"):
                assert np.array_equal(getattr(shares[row % world], name)[row // world], getattr(whole, name)[row])
    other = mix(store, {"a": 0.5, "b": 0.5}, MixingSpec())
    assert stream_of(store, objective, other, size=5).fingerprint != stream.fingerprint
    assert len(list(tmp_path.glob("store.rows-*.plan"))) == (1 if objective == "sft" else 0)


def test_labels_of_a_mixed_line_never_cross_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", "documents", {"a": [40, 3, 22], "b": [9, 1]})
    stream = stream_of(store, "next_token", mix(store, {"a": 0.7, "b": 0.3}, MixingSpec(max_repeat=2.5)))
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in stream.batches_once(2):
        trained = batch.labels >= 0
        pairs.update(zip(batch.input_ids[trained].tolist(), batch.labels[trained].tolist(), strict=True))
    assert all(label == token + 1 for token, label in pairs)
    ends = np.cumsum([40, 3, 22, 9, 1]).tolist()
    assert not any(token in ends for token, _ in pairs)


def test_stores_are_joined_without_being_touched(tmp_path: Path) -> None:
    one = make_store(tmp_path / "one", "documents", {"x": [5, 9, 30]})
    two = make_store(tmp_path / "two", "documents", {"y": [70, 2]})
    joined = TokenStore.join({"one": one, "two": two})
    assert [joined.sequence(index).tolist() for index in range(5)] == [
        store.sequence(index).tolist() for store, number in ((one, 3), (two, 2)) for index in range(number)
    ]
    assert joined.sections == {"one": (0, 3), "two": (3, 5)}
    assert joined.read(40, 50).tolist() == [*one.read(40, 44).tolist(), *two.read(0, 6).tolist()]
    assert mix(joined, {"one": 1, "two": 1}, MixingSpec()).shares["one"].share == pytest.approx(0.55)  # a document of 70 is not cut


class Workplace:
    """Two sources of documents, one of them small."""

    def __init__(self, data_dir: Path, write: Any, tokenizer: KeuralTokenizer) -> None:
        self.data_dir, self.tokenizer, self.out = data_dir, tokenizer, data_dir.with_name("out")
        big = [{"text": f"{number}번째 문서입니다. " * (1 + number % 3)} for number in range(200)]
        small = [{"text": f"It is document number {number}."} for number in range(50)]
        self.files = {
            name: write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows), name=name)
            for name, rows in (("big", big), ("small", small))
        }

    def __call__(self, weights: dict[str, float], mixing: MixingSpec | None = None, **others: Any) -> Prepared:
        sources = [SourceSpec(name=name, adapter="text", path=f"{name}.jsonl", weight=weight) for name, weight in weights.items()]
        spec = DataSpec(sources=sources, sequence_length=64, mixing=mixing or MixingSpec(), **others)
        return prepare(spec, "next_token", self.data_dir, self.tokenizer, self.out, 1)


@pytest.fixture
def work(data_dir: Path, write: Any, tokenizer: KeuralTokenizer) -> Workplace:
    return Workplace(data_dir, write, tokenizer)


def test_the_table_shows_target_share_repeats_and_what_was_left_out(work: Workplace) -> None:
    prepared = work({"big": 1, "small": 1})
    store = TokenStore.open(prepared.train)
    rows = {row.source: row for row in prepared.table}
    assert store.num_sequences == 250, "each document is there once"
    assert sum(row.tokens for row in prepared.table) == store.num_tokens
    for row in rows.values():
        assert row.mixture.target == 0.5
        assert row.mixture.share == pytest.approx(0.5, abs=0.01)
    assert rows["small"].mixture.repeats == 4
    big = rows["big"].mixture
    assert big.repeats < 1
    assert 0 < big.unused_records < 200
    assert big.records + big.unused_records == 200
    assert big.tokens + big.unused_tokens == rows["big"].tokens


def test_the_printed_table_shows_what_an_epoch_holds(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = work({"big": 1, "small": 1})
    print_data(SimpleNamespace(data={"base": prepared}))  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "base: an epoch" in printed
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "%" in line]
    shares = {row.source: row.mixture for row in prepared.table}
    assert lines == [
        [name, "50.0%", f"{share.share:.1%}", f"{share.repeats:.2f}", f"{share.records:,}", f"{share.tokens:,}"]
        for name, share in shares.items()
    ]


def test_data_that_is_not_mixed_has_no_such_table(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [SourceSpec(name="big", adapter="text", path="big.jsonl")]
    spec = DataSpec(sources=sources, sequence_length=64)
    prepared = prepare(spec, "next_token", work.data_dir, work.tokenizer, work.out, 1)
    print_data(SimpleNamespace(data={"base": prepared}))  # type: ignore[arg-type]
    assert "an epoch" not in capsys.readouterr().out


def test_other_weights_need_no_other_store(work: Workplace) -> None:
    first, second = work({"big": 1, "small": 1}), work({"big": 2, "small": 1})
    assert first.train == second.train
    assert first.fingerprint != second.fingerprint


def test_the_beginning_of_a_section_depends_on_content_and_seed_alone(work: Workplace, write: Any) -> None:
    first = TokenStore.open(work({"big": 1, "small": 1}).train)
    lines = (work.data_dir / "big.jsonl").read_text().splitlines(keepends=True)
    (work.data_dir / "big.jsonl").write_text("".join(reversed(lines)))
    again = TokenStore.open(work({"big": 1, "small": 1}).train)
    assert first.directory != again.directory
    assert [first.sequence(index).tolist() for index in range(250)] == [again.sequence(index).tolist() for index in range(250)]


def test_what_is_held_out_is_neither_repeated_nor_changed_by_weights(work: Workplace) -> None:
    mixed = work({"big": 1, "small": 5}, heldout_per_mille=100)
    spec = DataSpec(
        sources=[SourceSpec(name=name, adapter="text", path=f"{name}.jsonl") for name in ("big", "small")],
        sequence_length=64,
        heldout_per_mille=100,
    )
    plain = prepare(spec, "next_token", work.data_dir, work.tokenizer, work.out, 1)
    assert mixed.heldout is not None
    assert plain.heldout is not None
    one, other = TokenStore.open(mixed.heldout), TokenStore.open(plain.heldout)
    assert one.fingerprint == other.fingerprint


def test_what_cannot_be_is_refused(work: Workplace) -> None:
    with pytest.raises(UserError, match="'small' should give"):
        work({"big": 1, "small": 1}, MixingSpec(epoch=10**6))

    def refused(message: str, sources: list[dict[str, Any]], **data: Any) -> None:
        with pytest.raises(ValueError, match=message):
            DataSpec.model_validate({"sources": sources, "sequence_length": 64, **data})

    one, two = {"name": "a", "adapter": "text", "weight": 1.0}, {"name": "b", "adapter": "text"}
    refused(r"needs data\.mixing", [one])
    refused("'b' has none", [one, two], mixing={})
    refused("repeat and weight exclude each other", [one | {"repeat": 2}], mixing={})
    refused("two parts are called 'a'", [one, one], mixing={})
    refused("never repeated", [one], mixing={}, heldout_sources=[one | {"name": "h"}])
    refused("exactly one of", [])
    refused("exactly one of", [two], store="x")
    refused("mixing is for sources or stores", [], store="x", mixing={})
    refused("heldout_per_mille is for sources", [], store="x", heldout_per_mille=3.0)
    refused("cleaning is for sources", [], store="x", cleaning={})
    refused("decontaminate is for sources", [], shards="x", decontaminate={"sources": [two]})
    refused("text_kind of 'b' needs data.cleaning", [two | {"text_kind": "ko"}])
    refused("text_kind of 'h' needs data.cleaning", [two], heldout_sources=[two | {"name": "h", "text_kind": "ko"}])
    refused("held out is never repeated", [two], heldout_sources=[two | {"name": "h", "repeat": 3}])
    refused(r"needs data\.decontaminate", [two | {"gates": {"contaminated": "count"}}])
    refused("limit of 'b' has no effect", [two], decontaminate={"sources": [two | {"limit": 5}]})
