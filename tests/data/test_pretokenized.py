"""Stores and published shards train as they are: the documents of the converted store, at any step, for any ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.pretokenized import open_pretokenized
from keural.data.tokens.import_export import import_tokens
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError
from keural.recipe import DataSpec
from keural.tokenizer import KeuralTokenizer
from tests.helpers.published_writer import pack_documents, write_shard

LENGTH = 16


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    generator = np.random.default_rng(2)
    documents = [generator.integers(260, 400, generator.integers(1, 30)).tolist() for _ in range(60)]
    sequences = pack_documents(documents, LENGTH, 20)
    for number, start in enumerate(range(0, len(sequences), 13)):
        write_shard(tmp_path / "shards", number, sequences[start : start + 13], LENGTH)
    return tmp_path / "shards"


def documents_in(batch: Batch) -> list[tuple[int, ...]]:
    rows = zip(batch.input_ids, batch.segment_ids, strict=True)
    return [tuple(ids[segments == number].tolist()) for ids, segments in rows for number in range(1, segments.max() + 1)]


def test_shards_give_the_documents_of_the_converted_store(shards: Path, tokenizer: KeuralTokenizer) -> None:
    """The order differs: of shards a row is a sequence with its padding, of a store a window of a line without any."""
    counts = import_tokens(shards, shards.with_name("store"), "published", tokenizer)
    store = TokenStore.open(shards.with_name("store"))
    stream = Stream(PublishedShards(shards, tokenizer.vocab_size), "next_token", LENGTH, batch_rows=1, seed=4)
    batches = [stream.batch(step) for step in range(stream.steps_per_epoch)]
    found = [document for batch in batches for document in documents_in(batch)]
    assert Counter(found) == Counter(tuple(store.sequence(index).tolist()) for index in range(store.num_sequences))
    in_order = [document for batch in stream.batches_once(3) for document in documents_in(batch)]
    assert in_order == [tuple(store.sequence(index).tolist()) for index in range(store.num_sequences)]
    assert sum(batch.num_tokens for batch in batches) == counts["tokens"]
    assert sum(batch.num_labels for batch in batches) == counts["tokens"] - counts["documents"]
    assert PublishedShards(shards, tokenizer.vocab_size).survey().counts.table() == counts


def test_a_row_trains_no_padding_and_never_across_documents(shards: Path, tokenizer: KeuralTokenizer) -> None:
    stream = Stream(PublishedShards(shards, tokenizer.vocab_size), "next_token", LENGTH, batch_rows=4)
    for batch in stream.batches_once(5):
        trained = batch.labels[:, :-1] >= 0
        assert np.array_equal(batch.labels[:, :-1][trained], batch.input_ids[:, 1:][trained])
        assert (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:])[trained].all()
        assert (batch.labels[batch.segment_ids == 0] == -100).all()
        assert (batch.labels[:, -1] == -100).all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step_of_shards(shards: Path, tokenizer: KeuralTokenizer, world: int) -> None:
    stream = Stream(PublishedShards(shards, tokenizer.vocab_size), "next_token", LENGTH, batch_rows=5, seed=1)
    again = Stream(PublishedShards(shards, tokenizer.vocab_size), "next_token", LENGTH, batch_rows=5, seed=1)
    assert stream.fingerprint == again.fingerprint
    for step in (9, 0):
        whole, parts = stream.batch(step), [again.batch(step, rank, world) for rank in range(world)]
        for row in range(5):
            assert np.array_equal(parts[row % world].input_ids[row // world], whole.input_ids[row])


def spec(**data: object) -> DataSpec:
    return DataSpec.model_validate({"sequence_length": LENGTH, **data})


def test_shards_say_what_is_padding_cut_and_lost(shards: Path, tokenizer: KeuralTokenizer) -> None:
    prepared = open_pretokenized(spec(shards="shards"), "next_token", shards.parent, tokenizer, shards.parent)
    (row,) = prepared.table
    assert all(word in row.survey for word in ("published shards", "padding", "cut", "lost first tokens"))
    with pytest.raises(UserError, match="set it to 16"):
        open_pretokenized(spec(shards="shards", sequence_length=32), "next_token", shards.parent, tokenizer, shards.parent)


def test_a_store_is_refused_for_another_tokenizer_kind_or_when_it_is_none(shards: Path, tokenizer: KeuralTokenizer) -> None:
    work = shards.parent
    import_tokens(shards, work / "store", "published", tokenizer)
    assert open_pretokenized(spec(store="store"), "next_token", work, tokenizer, work).table[0].adapter == "store"
    with pytest.raises(UserError, match="objective sft needs conversations"):
        open_pretokenized(spec(store="store"), "sft", work, tokenizer, work)
    with StoreWriter(work / "foreign", "b" * 64, 500, "documents") as writer:
        writer.add([1, 5, 2])
    with pytest.raises(UserError, match="another tokenizer"):
        open_pretokenized(spec(store="foreign"), "next_token", work, tokenizer, work)
    with pytest.raises(UserError, match="no finished token store"):
        open_pretokenized(spec(store="shards"), "next_token", work, tokenizer, work)


def test_several_stores_are_mixed_by_weight(shards: Path, tokenizer: KeuralTokenizer) -> None:
    work = shards.parent
    import_tokens(shards, work / "one", "published", tokenizer)
    import_tokens(shards, work / "two", "published", tokenizer)
    stores = [{"name": "one", "path": "one", "weight": 3.0}, {"name": "two", "path": "two", "weight": 1.0}]
    prepared = open_pretokenized(spec(stores=stores, mixing={"max_repeat": 1.0}), "next_token", work, tokenizer, work)
    shares = {row.source: row.mixture.share for row in prepared.table}
    assert shares["one"] == pytest.approx(0.75, abs=0.03)
    stream = prepared.corpus.stream("next_token", LENGTH, 4, None, 1, tokenizer.sha256, tokenizer.vocab_size)
    assert stream.batch(3).input_ids.shape == (4, LENGTH)
