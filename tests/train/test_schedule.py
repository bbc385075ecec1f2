"""The learning rate of every step follows from its number."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.train.optimization.schedule import learning_rate

PUBLISHED = {"steps": 100_000, "peak": 3e-4, "minimum": 3e-5, "warmup_steps": 2000}


def test_warm_up_is_linear_and_its_first_step_already_moves() -> None:
    assert learning_rate(0, **PUBLISHED) == pytest.approx(3e-4 / 2000)
    assert learning_rate(999, **PUBLISHED) == pytest.approx(1.5e-4)
    assert learning_rate(1999, **PUBLISHED) == pytest.approx(3e-4)


def test_cosine_starts_at_the_peak_halves_in_the_middle_and_ends_at_the_minimum() -> None:
    assert learning_rate(2000, **PUBLISHED) == pytest.approx(3e-4)
    middle = 2000 + (99_999 - 2000) // 2
    assert learning_rate(middle, **PUBLISHED) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-4)
    assert learning_rate(99_999, **PUBLISHED) == pytest.approx(3e-5, rel=1e-12)


@given(st.integers(1, 400), st.data())
def test_it_rises_then_falls_and_stays_between_zero_and_the_peak(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    rates = [learning_rate(step, steps=steps, peak=1.0, minimum=0.1, warmup_steps=warmup) for step in range(steps)]
    top = max(range(steps), key=rates.__getitem__)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert steps == 1 or warmup == steps - 1 or math.isclose(rates[-1], 0.1)


def test_before_the_last_share_of_the_steps_the_rate_stays() -> None:
    rates = [
        learning_rate(step, steps=111, peak=1.0, minimum=0.2, warmup_steps=10, decay="linear", decay_share=0.25)
        for step in range(111)
    ]
    assert rates[9:86] == [1.0] * 77
    assert rates[86] == pytest.approx(1 - 0.8 / 25)
    assert rates[110] == pytest.approx(0.2)
    falls = [before - after for before, after in pairwise(rates[85:])]
    assert falls == pytest.approx([0.8 / 25] * 25)


def test_one_curve_over_two_stages_has_no_step_where_they_meet() -> None:
    first = {"steps": 50, "peak": 1.0, "minimum": 1.0, "warmup_steps": 5}
    second = {"steps": 50, "peak": 1.0, "minimum": 0.0, "warmup_steps": 0}
    rates = [learning_rate(step, **first) for step in range(50)] + [learning_rate(step, **second) for step in range(50)]
    assert rates[4:51] == [1.0] * 47
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == 0.0


def test_a_share_of_less_than_a_step_still_ends_at_the_minimum() -> None:
    rates = [learning_rate(step, steps=10, peak=1.0, minimum=0.2, warmup_steps=2, decay_share=0.01) for step in range(10)]
    assert rates[2:] == [1.0] * 7 + [0.2]
    assert learning_rate(2, steps=3, peak=1.0, minimum=0.2, warmup_steps=2, decay_share=0.01) == 1.0  # no step after the warm-up's
