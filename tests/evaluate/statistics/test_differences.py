"""Paired differences, their tests, Holm and power, against scipy and statsmodels; and how often they err, by simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator
from numpy.typing import NDArray

from keural.errors import UserError
from keural.evaluate.statistics import (
    Difference,
    holm,
    least_difference,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap,
    paired_difference,
)

Scores = NDArray[np.float64]


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 6), (3, 3), (2, 9), (40, 17), (700, 800), (0, 2000)])
def test_mcnemar_equals_statsmodels_and_the_binomial_test(gained: int, lost: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    stats = pytest.importorskip("scipy.stats")
    found = mcnemar_exact(gained, lost)
    if gained + lost:
        assert found == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)
        assert found == pytest.approx(tables.mcnemar([[5, gained], [lost, 5]], exact=True).pvalue, rel=1e-9)
    else:
        assert found == 1.0


def test_holm_equals_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        p_values = (generator.random(size) ** 3).tolist()
        p_values[-1] = p_values[0]
        assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())
    assert holm([]) == []


def test_the_least_difference_is_that_which_statsmodels_finds_with_the_power() -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    found = least_difference(1 / math.sqrt(400))
    assert power.normal_power(found, nobs=400, alpha=0.05) == pytest.approx(0.8, abs=1e-4)
    assert least_difference(0.01, alpha=0.01, power=0.9) == pytest.approx(0.01 * (2.575829 + 1.281552), rel=1e-6)


def test_the_power_is_what_it_says() -> None:
    generator = np.random.default_rng(0)
    error = 0.2 / math.sqrt(200)
    true = least_difference(error)
    means = generator.normal(true, error, size=20_000)
    assert np.mean(np.abs(means) > 1.959964 * error) == pytest.approx(0.8, abs=0.01)


def test_differences_of_other_scores_are_those_of_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(4)
    before = generator.normal(size=60)
    after = before + generator.normal(0.3, 1.0, size=60)
    found = paired_difference(before, after)
    test = stats.ttest_rel(after, before)
    interval = test.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-8)
    assert found.test == "bootstrap"
    assert found.p == pytest.approx(test.pvalue, abs=0.02)
    assert found.value == mean_interval(after - before).value


def test_the_bootstrap_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    change = np.random.default_rng(5).normal(0.1, 1.0, size=80)
    low, high, _ = paired_bootstrap(np.zeros(80), change, resamples=20_000)
    expected = stats.bootstrap((change,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1))
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)


def test_right_and_wrong_answers_are_counted_by_mcnemar() -> None:
    before = np.array([1.0] * 30 + [0.0] * 20)
    after = np.array([1.0] * 27 + [0.0] * 3 + [1.0] * 12 + [0.0] * 8)
    found = paired_difference(before, after)
    assert (found.gained, found.lost, found.n, found.test) == (12, 3, 50, "mcnemar")
    assert found.p == mcnemar_exact(12, 3)
    assert found.value == pytest.approx(9 / 50)
    # An end lies where the score test of the discordant items, with their most likely counts under it, stops to reject.
    for end in (found.low, found.high):
        q = min((x for x in np.linspace(1e-6, 0.6, 200_001)), key=lambda x: abs(_slope(12, 3, 50, end, x)))
        assert abs(9 - 50 * end) / math.sqrt(50 * (2 * q + end - end**2)) == pytest.approx(1.959964, rel=1e-3)


def _slope(gained: int, lost: int, n: int, difference: float, down: float) -> float:
    """Derivative of the log-likelihood of a multinomial by the share that is lost, given the difference to the one gained."""
    return gained / (down + difference) + lost / down - 2 * (n - gained - lost) / (1 - 2 * down - difference)


def test_the_interval_of_paired_shares_ends_at_the_ends() -> None:
    assert paired_difference([0.0] * 9, [1.0] * 9).high == pytest.approx(1.0)
    mirrored, found = paired_difference([1.0] * 9, [0.0] * 9), paired_difference([0.0] * 9, [1.0] * 9)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_equal_answers_differ_by_nothing_but_not_for_certain() -> None:
    found = paired_difference([1.0, 0.0] * 25, [1.0, 0.0] * 25)
    assert (found.value, found.p, found.gained, found.lost) == (0.0, 1.0, 0, 0)
    assert found.low < 0 < found.high
    assert found.least > 0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_few_items_are_never_significant(n: int) -> None:
    for before, after in (([0.0] * n, [1.0] * n), ([0.1] * n, [0.7] * n)):
        assert paired_difference(before, after).p >= 2.0 ** (1 - n) > 0.05


def test_one_item_says_nothing_of_the_spread() -> None:
    found = paired_difference([0.2], [0.7])
    assert (found.low, found.high, found.least, found.p) == (-math.inf, math.inf, math.inf, 1.0)
    assert paired_difference([0.2, 0.3], [0.7, 0.9], ["a", "a"]).p == 1.0


def test_a_seed_gives_the_same_figures() -> None:
    generator = np.random.default_rng(6)
    before, after = generator.random(30), generator.random(30)
    assert paired_bootstrap(before, after, seed=3) == paired_bootstrap(before, after, seed=3)
    assert paired_bootstrap(before, after, seed=3) != paired_bootstrap(before, after, seed=4)


def test_clusters_that_change_together_are_fewer_than_their_items() -> None:
    before = np.zeros(60)
    after = np.repeat([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], 10)
    clusters = [str(i // 10) for i in range(60)]
    assert paired_difference(before, after).p < 1e-6
    assert paired_difference(before, after, clusters).p > 0.05


def test_weights_make_the_difference_of_two_ratios() -> None:
    size = np.array([100.0, 900.0, 500.0])
    before, after = size * [2.0, 1.0, 3.0], size * [1.0, 1.0, 2.0]
    found = paired_difference(before, after, weights=size)
    assert found.value == pytest.approx(after.sum() / size.sum() - before.sum() / size.sum())


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda: paired_difference([], []), "no items"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "same items in both"),
        (lambda: paired_difference([1.0, math.nan], [1.0, 0.0]), "number 2 is nan"),
        (lambda: mcnemar_exact(-1, 2), "negative"),
        (lambda: holm([0.1, math.nan]), "between 0 and 1"),
        (lambda: least_difference(math.inf), "say nothing"),
    ],
)
def test_what_says_nothing_is_refused(measure: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        measure()


def _answers(generator: Generator, n: int, down: float, up: float) -> tuple[Scores, Scores]:
    """Right or wrong answers: a share `down` is lost, `up` is gained, 0.4 are right in both."""
    kind = generator.choice(4, p=[down, up, 0.4, 0.6 - down - up], size=n)
    return np.isin(kind, (0, 2)).astype(float), np.isin(kind, (1, 2)).astype(float)


def _covered(n: int, times: int, down: float, up: float) -> float:
    generator = np.random.default_rng(n)
    found = [paired_difference(*_answers(generator, n, down, up)) for _ in range(times)]
    return sum(one.low <= up - down <= one.high for one in found) / times


def _rejected(n: int, times: int, resamples: int) -> float:
    """How often two samples of the same graded scores differ at 0.05."""
    generator = np.random.default_rng(n)

    def differ() -> Difference:
        before, after = generator.choice([0.0, 0.5, 1.0], size=(2, n))
        return paired_difference(before, after, resamples=resamples)

    return sum(differ().p <= 0.05 for _ in range(times)) / times


@pytest.mark.slow
@pytest.mark.parametrize(("down", "up"), [(0.05, 0.05), (0.1, 0.2), (0.02, 0.1)])
@pytest.mark.parametrize("n", [50, 200, 1000])
def test_intervals_of_paired_shares_hold_the_true_difference(n: int, down: float, up: float) -> None:
    assert 0.93 <= _covered(n, 10_000, down, up) <= 0.97


def test_intervals_of_paired_shares_hold_the_true_difference_in_a_few_trials() -> None:
    assert 0.92 <= _covered(50, 800, 0.1, 0.2) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200])
def test_the_bootstrap_finds_nothing_where_there_is_nothing(n: int) -> None:
    assert 0.03 <= _rejected(n, 3000, 2000) <= 0.07


def test_the_bootstrap_finds_little_where_there_is_nothing_in_a_few_trials() -> None:
    assert _rejected(50, 200, 500) <= 0.1
