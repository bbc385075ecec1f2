"""Pairs in rows: steps of equal work, hardly any padding, as much on every rank, and always the same pairs in a step."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keural.data.loading.epoch_order import STEPS_TOGETHER, EpochOrder
from keural.data.loading.row_layout import RowShape, even_rows, lay_out
from keural.data.loading.stream import Stream
from tests.data.test_stream import make_store

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def drawn(number: int, seed: int = 0, longest: int = 1024) -> np.ndarray:
    """Lengths of pairs as real sets have them: both sides 288 tokens in the mean, some few of them far longer."""
    return np.random.default_rng(seed).lognormal(5.4, 0.7, number).astype(np.int64).clip(4, longest)


class TestOrder:
    @settings(max_examples=40, deadline=None)
    @given(number=st.integers(1, 400), size=st.integers(1, 50), seed=st.integers(0, 3))
    def test_every_epoch_has_every_pair_once_in_steps_of_the_same_number(self, number: int, size: int, seed: int) -> None:
        order = EpochOrder(number, size, seed, drawn(number, seed))
        steps = [order.step(step) for step in range(3 * number // size + 1)]
        assert {len(step) for step in steps} == {size}
        seen = np.concatenate(steps)
        for epoch in range(len(seen) // number):
            assert sorted(seen[epoch * number : (epoch + 1) * number].tolist()) == list(range(number))

    def test_steps_have_equally_many_tokens(self) -> None:
        lengths = drawn(3161)
        for size in (2, 8, 32, 64):
            dealt, shuffled = EpochOrder(len(lengths), size, 0, lengths), EpochOrder(len(lengths), size, 0)
            steps = range(len(lengths) // size - 1)
            evened, plain = ([int(lengths[order.step(step)].sum()) for step in steps] for order in (dealt, shuffled))
            assert max(evened) < np.mean(evened) + 4 * np.std(evened) + 1
            assert np.std(evened) < (0.4 if size > 2 else 0.65) * np.std(plain)

    def test_any_step_is_the_same_after_a_restart_and_in_any_order(self) -> None:
        lengths, steps = drawn(500), list(range(40))
        forward = [EpochOrder(500, 8, 5, lengths).step(step) for step in steps]
        backward = EpochOrder(500, 8, 5, lengths)
        assert all(np.array_equal(backward.step(step), forward[step]) for step in reversed(steps))
        assert not np.array_equal(EpochOrder(500, 8, 6, lengths).step(0), forward[0])

    def test_epochs_differ_in_which_pairs_come_together(self) -> None:
        for number, size in ((512, 8), (64, 8), (64, 2), (12, 4)):
            order, steps = EpochOrder(number, size, 0, drawn(number)), number // size
            first, second = ({frozenset(order.step(k).tolist()) for k in range(begin, begin + steps)} for begin in (0, steps))
            assert len(first & second) <= steps // 16

    def test_every_step_has_long_and_short_pairs_as_the_data_has(self) -> None:
        lengths = drawn(64 * 32)
        order = EpochOrder(len(lengths), 32, 0, lengths)
        long = [int((lengths[order.step(step)] > np.median(lengths)).sum()) for step in range(64)]
        assert min(long) >= 13
        assert max(long) <= 19

    def test_the_longest_pair_may_come_in_any_step(self) -> None:
        lengths = drawn(128)
        places = set()
        for seed in range(20):
            order = EpochOrder(128, 2, seed, lengths)
            places |= {step for step in range(64) if int(lengths.argmax()) in order.step(step)}
        assert len(places) > 12

    def test_a_step_costs_the_same_however_much_data_there_is(self) -> None:
        order = EpochOrder(10**7, 32, 0, np.full(10**7, 9))
        asked = []
        original = order._shuffled
        order._shuffled = lambda start, count: asked.append(count) or original(start, count)  # type: ignore[method-assign, func-returns-value]
        order.step(200_000)
        assert asked == [STEPS_TOGETHER * 32]


class TestRows:
    @given(LENGTHS, st.integers(1, 5), st.integers(60, 200) | st.none(), st.sampled_from([1, 16]))
    def test_every_pair_is_in_one_row_and_ranks_have_equally_many(
        self, lengths: list[int], ranks: int, limit: int | None, multiple: int
    ) -> None:
        rows, length = lay_out(lengths, ranks, RowShape(limit, multiple))
        assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
        assert len(rows) % ranks == 0
        assert max(sum(lengths[place] for place in row) for row in rows) <= length
        assert limit is None or length <= limit
        assert length % multiple == 0 or length in (limit, sum(lengths))

    def test_without_a_limit_a_step_is_one_row_without_padding(self) -> None:
        rows, length = lay_out([5, 9, 3], 1, RowShape(None))
        assert ([sorted(row) for row in rows], length) == ([[0, 1, 2]], 17)

    def test_even_rows_are_even(self) -> None:
        lengths = drawn(64).tolist()
        tokens = [sum(lengths[place] for place in row) for row in even_rows(lengths, 4)]
        assert max(tokens) < 1.02 * min(tokens)

    def test_long_pairs_fill_rows_as_well_as_short_ones(self) -> None:
        """Of the lengths that published pairs may have, some eight fill a row of 8,192: dealing them out leaves 2% of it empty."""
        lengths = np.random.default_rng(0).lognormal(6.8, 0.5, 640).astype(int).clip(16, 2048)
        shares = []
        for start in range(0, len(lengths), 64):
            found = lengths[start : start + 64].tolist()
            rows, length = lay_out(found, 1, RowShape(8192))
            shares.append(sum(found) / (len(rows) * length))
        assert np.mean(shares) > 0.99
        assert min(shares) > 0.98

    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("pairs", [8, 32, 64])
    def test_nearly_every_position_has_a_token(self, ranks: int, pairs: int) -> None:
        lengths = drawn(3161)
        order = EpochOrder(len(lengths), pairs, 0, lengths)
        for shape, least in ((RowShape(None), 0.98), (RowShape(4096), 0.98), (RowShape(8192, 128), 0.94)):
            tokens = positions = 0
            for step in range(len(lengths) // pairs - 1):
                found = lengths[order.step(step)].tolist()
                rows, length = lay_out(found, ranks, shape)
                tokens, positions = tokens + sum(found), positions + len(rows) * length
            few = pairs // ranks < 8  # some pairs for a rank cannot be evened out
            assert tokens / positions >= (least if not few else 0.7), (shape, tokens / positions)


@pytest.mark.parametrize("shape", [None, RowShape(None), RowShape(40), RowShape(64, 16)])
def test_what_is_in_a_step_depends_on_neither_ranks_nor_rows(tmp_path: Path, shape: RowShape | None) -> None:
    lengths = np.random.default_rng(1).integers(1, 17, 60).tolist()
    store = make_store(tmp_path / "store", "pairs", lengths)
    plain = Stream(store, "dpo", 16, batch_pairs=7, seed=3)
    stream = Stream(store, "dpo", 16, batch_pairs=7, seed=3, pair_rows=shape)
    assert stream.fingerprint == plain.fingerprint
    for step in range(9):
        expected = Counter(plain.batch(step).pair_sequences[0].tolist())
        for world in (1, 2, 3, 8):
            shares = [stream.batch(step, rank, world) for rank in range(world)]
            assert len({share.input_ids.shape for share in shares}) == 1
            assert Counter(pair for share in shares for pair in share.pair_sequences[0].tolist()) == expected
