"""A batch is a pure function of its step; an epoch holds every token once; documents are apart; ranks share a step's rows."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError
from keural.recipe import StoreKind
from tests.helpers.examples import examples

SHA = "a" * 64
T = 16


def make_store(directory: Path, kind: StoreKind, lengths: list[int], shard_tokens: int = 60) -> TokenStore:
    """Every token of the store is another number, so that a batch shows where each came from."""
    number = itertools.count(1)
    with StoreWriter(directory, SHA, 10**6, kind, shard_tokens=shard_tokens) as writer:
        for index, length in enumerate(lengths):
            tokens = [next(number) for _ in range(length)]
            writer.add(tokens, None if kind == "documents" else [(index + place) % 3 != 0 for place in range(length)])
    return TokenStore.open(directory, SHA)


def make_stream(directory: Path, objective: str, lengths: list[int], size: int = 3, seed: int = 5) -> Stream:
    kinds: dict[str, StoreKind] = {"next_token": "documents", "sft": "conversations", "dpo": "pairs"}
    store = make_store(directory, kinds[objective], lengths)
    if objective == "dpo":
        return Stream(store, "dpo", T, batch_pairs=size, seed=seed)
    return Stream(store, objective, T, batch_rows=size, seed=seed)  # type: ignore[arg-type]


def arrays(batch: Batch) -> list[np.ndarray]:
    return [batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.sequence_ids]


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def pairs_in(batches: list[Batch]) -> list[list[int]]:
    """The two sequences of every pair."""
    return sorted(pair for batch in batches for pair in batch.pair_sequences.T.tolist())


def tokens_and_labels(batches: list[Batch]) -> tuple[Counter[int], Counter[int]]:
    tokens: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    for batch in batches:
        tokens.update(batch.input_ids[batch.segment_ids > 0].tolist())
        labels.update(batch.labels[batch.labels >= 0].tolist())
    return tokens, labels


def trained_tokens(store: TokenStore) -> Counter[int]:
    sequences = range(store.num_sequences)
    return Counter(
        int(token)
        for index in sequences
        for token, trained in zip(store.sequence(index)[1:], store.loss_mask(index)[1:], strict=True)
        if trained
    )


OBJECTIVES = pytest.mark.parametrize("objective", ["next_token", "sft", "dpo"])
SIDES = st.lists(st.integers(1, T), min_size=1, max_size=20).map(lambda lengths: lengths * 2)


@OBJECTIVES
@examples(10)
@given(data=st.data())
def test_an_epoch_holds_every_token_and_every_label_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, objective: str, data: st.DataObject
) -> None:
    longest = 70 if objective == "next_token" else T
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=30)) * 2
    stream = make_stream(tmp_path_factory.mktemp("s") / "store", objective, lengths, size=1)
    batches = [stream.batch(step) for step in range(stream.steps_per_epoch)]
    for found in (batches, list(stream.batches_once(2))):
        tokens, labels = tokens_and_labels(found)
        assert tokens == Counter(range(1, sum(lengths) + 1))
        assert labels == trained_tokens(stream.store)


@OBJECTIVES
def test_every_epoch_has_every_unit_once_and_another_order(tmp_path: Path, objective: str) -> None:
    stream = make_stream(tmp_path / "store", objective, [9, 12, 5, 16, 7, 7, 3, 15, 11, 8] * 3, size=4)
    instances = np.concatenate([stream._order.step(step) for step in range(2 * stream.instances_per_epoch)])
    epochs = instances[: len(instances) // stream.instances_per_epoch * stream.instances_per_epoch].reshape(
        -1, stream.instances_per_epoch
    )
    assert all(sorted(epoch.tolist()) == list(range(stream.instances_per_epoch)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


@OBJECTIVES
def test_a_batch_is_the_same_after_a_restart_and_in_any_order(tmp_path: Path, objective: str) -> None:
    lengths = [9, 12, 5, 16, 7, 7, 3, 15] * 3
    stream = make_stream(tmp_path / "store", objective, lengths)
    forward = [stream.batch(step) for step in range(20)]
    opened = TokenStore.open(tmp_path / "store")
    again = Stream(opened, stream.objective, T, **{"batch_pairs" if objective == "dpo" else "batch_rows": 3}, seed=5)
    assert all(same(again.batch(step), forward[step]) for step in reversed(range(20)))
    assert again.fingerprint == stream.fingerprint
    other = Stream(opened, stream.objective, T, **{"batch_pairs" if objective == "dpo" else "batch_rows": 3}, seed=6)
    assert other.fingerprint != stream.fingerprint
    assert not all(same(other.batch(step), forward[step]) for step in range(20))


@OBJECTIVES
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_rows_together_are_the_step(tmp_path: Path, objective: str, world: int) -> None:
    stream = make_stream(tmp_path / "store", objective, [9, 12, 5, 16, 7, 7, 3, 15] * 3, size=5)
    for step in range(6):
        whole = stream.batch(step)
        shares = [stream.batch(step, rank, world) for rank in range(world)]
        assert len({len(share.input_ids) for share in shares}) == 1
        for row in range(len(whole.input_ids)) if objective != "dpo" else ():
            assert same(shares[row % world].select([row // world]), whole.select([row]))
        assert pairs_in(shares) == pairs_in([whole])
        assert sum(share.num_labels for share in shares) == whole.num_labels
        assert sum(share.num_tokens for share in shares) == whole.num_tokens


@OBJECTIVES
def test_positions_restart_with_every_document_and_with_padding(tmp_path: Path, objective: str) -> None:
    lengths = [9, 12, 5, 16, 7, 7, 3, 15] * 3 if objective != "next_token" else [40, 3, 22, 9, 1, 1]
    stream = make_stream(tmp_path / "store", objective, lengths)
    for batch in (stream.batch(step) for step in range(5)):
        for segments, positions, sequences in zip(batch.segment_ids, batch.position_ids, batch.sequence_ids, strict=True):
            runs = np.flatnonzero(np.diff(segments, prepend=-1))
            assert np.array_equal(np.flatnonzero(positions == 0), runs)
            assert all(np.array_equal(part, np.arange(len(part))) for part in np.split(positions, runs[1:]))
            assert [segments[run] for run in runs if segments[run]] == list(range(1, segments.max() + 1))
            assert np.array_equal(sequences == -1, segments == 0)
            assert all(len(set(part.tolist())) == 1 for part in np.split(sequences, runs[1:]))


def test_a_long_document_becomes_pieces_whose_labels_reach_into_the_next_row(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "store", "next_token", [2 * T + 3, 4], size=1)
    rows = next(stream.batches_once(3))
    assert rows.input_ids.shape == (3, T)
    assert rows.labels[0].tolist() == list(range(2, T + 2))
    assert rows.labels[1].tolist() == list(range(T + 2, 2 * T + 2))
    assert rows.labels[2].tolist() == [2 * T + 2, 2 * T + 3, -100, 2 * T + 5, 2 * T + 6, 2 * T + 7, *[-100] * (T - 6)]
    assert rows.position_ids[1].tolist() == list(range(T))
    assert rows.sequence_ids[2].tolist() == [0] * 3 + [1] * 4 + [-1] * (T - 7)


def test_labels_are_the_next_token_of_the_same_sequence_where_it_is_trained(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "store", "sft", [5, 7], size=1)
    batch = stream.batch(0)
    start = 0
    for number in (int(batch.sequence_ids[0, 0]), int(batch.sequence_ids[0, batch.segment_ids[0].argmax()])):
        tokens, mask = stream.store.sequence(number).tolist(), stream.store.loss_mask(number).tolist()
        expected = [token if trained else -100 for token, trained in zip(tokens[1:], mask[1:], strict=True)] + [-100]
        assert batch.labels[0, start : start + len(tokens)].tolist() == expected
        start += len(tokens)


def test_a_pair_is_never_divided_and_its_sides_stand_side_by_side(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "store", "dpo", [16, 16, 3, 4, 10, 9, 5, 5, 1, 2], size=4)
    for step in range(5):
        batch = stream.batch(step)
        assert batch.input_ids.shape[1] <= 2 * T
        sides = [row[np.flatnonzero(np.diff(row, prepend=-2))].tolist() for row in batch.sequence_ids]
        sides = [[side for side in row if side >= 0] for row in sides]
        assert sum(len(row) for row in sides) == 8
        assert all(row[k] % 2 == 0 and row[k + 1] == row[k] + 1 for row in sides for k in range(0, len(row), 2))


def test_the_plan_of_packed_rows_is_kept_beside_the_store_and_made_again_when_damaged(tmp_path: Path) -> None:
    first = make_stream(tmp_path / "store", "sft", [9, 12, 5, 16, 7, 7, 3, 15] * 3).batch(0)
    (plan,) = tmp_path.glob("store.rows-*.plan")
    opened = TokenStore.open(tmp_path / "store")
    assert same(Stream(opened, "sft", T, batch_rows=3, seed=5).batch(0), first)
    plan.write_bytes(plan.read_bytes()[:100])
    assert same(Stream(opened, "sft", T, batch_rows=3, seed=5).batch(0), first)


def test_a_store_smaller_than_a_batch_is_seen_several_times_in_it(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "store", "next_token", [T, T, T], size=7)
    assert stream.steps_per_epoch == 1
    tokens, _ = tokens_and_labels([stream.batch(0)])
    assert set(tokens.values()) <= {2, 3}
    assert sum(tokens.values()) == 7 * T


def test_steps_for_a_number_of_epochs(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "store", "next_token", [T] * 10, size=4)
    assert [stream.steps_for(epochs) for epochs in (0.1, 1, 2, 2.5)] == [1, 3, 5, 7]


def test_describe_names_the_pieces_of_every_row(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "store", "next_token", [20, 4, 8], size=2)
    for row, segments in zip(arrays(stream.batch(0))[4], stream.describe(0), strict=True):
        rebuilt = [sequence for sequence, _, length in segments for _ in range(length)]
        assert rebuilt == row[row >= 0].tolist()


def test_a_store_of_another_kind_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", "documents", [5, 6])
    with pytest.raises(UserError, match="holds documents; objective sft needs conversations"):
        Stream(store, "sft", T, batch_rows=1)


def test_a_conversation_longer_than_a_row_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", "conversations", [5, T + 1])
    with pytest.raises(UserError, match=f"longest sequence has {T + 1} tokens"):
        Stream(store, "sft", T, batch_rows=1)
