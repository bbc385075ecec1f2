"""The permutation is a bijection, is the same for single elements and arrays, and mixes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.permutation import Permutation
from tests.helpers.examples import examples


@examples(15)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_it_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    values = Permutation(n, seed, epoch).take(np.arange(n))
    assert sorted(values.tolist()) == list(range(n))


@given(n=st.integers(1, 10**15), data=st.data())
def test_single_elements_are_those_of_arrays_and_in_range(n: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    permutation = Permutation(n, 1)
    values = permutation.take(np.array(indices))
    assert [permutation[index] for index in indices] == values.tolist()
    assert all(0 <= value < n for value in values)


def test_different_keys_give_different_orders_and_equal_keys_the_same() -> None:
    n = np.arange(1000)
    first = Permutation(1000, 7, 0).take(n)
    assert (first == Permutation(1000, 7, 0).take(n)).all()
    assert (first == Permutation(1000, 7, 1).take(n)).mean() < 0.01
    assert (first == Permutation(1000, 8, 0).take(n)).mean() < 0.01


def test_it_mixes_like_a_random_order() -> None:
    n = 10_000
    values = Permutation(n, 3).take(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.05
    assert (np.diff(values) == 1).mean() < 0.001
    for quarter in np.split(values, 4):
        assert np.allclose(np.histogram(quarter, bins=4, range=(0, n))[0], n / 16, rtol=0.2)


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        Permutation(5, 1)[5]
