"""Intervals of shares, means, ratios and clusters, against scipy and statsmodels, and their coverage by simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator

from keural.errors import UserError
from keural.evaluate.statistics import Estimate, clustered, mean_interval, ratio_interval, share_interval, wilson
from keural.evaluate.statistics.quantiles import two_sided_normal, two_sided_t


@pytest.mark.parametrize("n", [1, 2, 10, 50, 1000])
def test_wilson_equals_scipy_and_statsmodels(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for right in sorted({0, 1, n // 20, n // 2, n - 1, n}):
        for confidence in (0.9, 0.95, 0.99):
            found = wilson(right, n, confidence)
            exact = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
            assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
            expected = proportion.proportion_confint(right, n, alpha=1 - confidence, method="wilson")
            assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)


def test_wilson_gives_the_published_figures() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(right, n)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 49, 50, 999, 14041])
def test_critical_values_equal_scipys(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for confidence in (0.5, 0.9, 0.95, 0.99, 0.9999):
        assert two_sided_t(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-8)
        assert two_sided_normal(confidence) == pytest.approx(stats.norm.ppf((1 + confidence) / 2), rel=1e-9)


def test_the_interval_of_a_mean_is_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).gamma(2.0, size=37)
    found = mean_interval(values)
    expected = stats.t.interval(0.95, 36, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.error == pytest.approx(stats.sem(values))


def test_clustered_errors_equal_ordinary_least_squares_with_robust_covariance() -> None:
    models = pytest.importorskip("statsmodels.api")
    generator = np.random.default_rng(1)
    names = generator.integers(12, size=100)
    values = generator.normal(size=100) + names / 5
    found = clustered(values, [str(name) for name in names])
    fit = models.OLS(values, np.ones(100)).fit(
        cov_type="cluster", cov_kwds={"groups": names, "use_correction": True, "df_correction": True}, use_t=True
    )
    assert found.error == pytest.approx(fit.bse[0], rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-7)
    assert (found.n, found.units) == (100, len(set(names.tolist())))


def test_without_correction_the_error_is_that_of_miller() -> None:
    values, names = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), ["a", "a", "b", "b", "c"]
    mean = values.mean()
    by_hand = math.sqrt(sum(sum(values[i] - mean for i in group) ** 2 for group in ((0, 1), (2, 3), (4,)))) / 5
    assert clustered(values, names).error * math.sqrt(2 / 3) == pytest.approx(by_hand)


def test_items_without_a_cluster_stand_for_themselves() -> None:
    values = np.random.default_rng(2).normal(size=20)
    assert clustered(values, [None] * 20) == mean_interval(values)
    assert clustered(values, [str(i) for i in range(20)]).error == pytest.approx(mean_interval(values).error)
    assert clustered(values, ["", *[None] * 19]).units == 20


def test_a_ratio_weighs_documents_by_their_size() -> None:
    models = pytest.importorskip("statsmodels.api")
    generator = np.random.default_rng(3)
    size = generator.integers(10, 5000, size=40).astype(float)
    bits = size * generator.uniform(1, 3, size=40)
    found = ratio_interval(bits, size)
    assert found.value == pytest.approx(bits.sum() / size.sum())
    # The same estimate as a weighted least squares line through the origin, bits/size on 1 with weights size, HC robust.
    fit = models.WLS(bits / size, np.ones(40), weights=size).fit(cov_type="HC1")
    assert found.error == pytest.approx(fit.bse[0], rel=1e-9)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30)])
def test_right_and_wrong_answers_get_wilson_s_interval(right: int, n: int) -> None:
    found = share_interval([1.0] * right + [0.0] * (n - right))
    assert found == wilson(right, n)
    assert 0 <= found.low < found.high <= 1


def test_one_cluster_says_nothing_of_a_mean_and_little_of_a_share() -> None:
    alone = clustered([0.2, 0.4], ["a", "a"])
    assert (alone.low, alone.high, alone.units) == (-math.inf, math.inf, 1)
    share = share_interval([1.0, 0.0, 1.0], ["a", "a", "a"])
    assert share.high - share.low > wilson(2, 3).high - wilson(2, 3).low


def test_equal_scores_do_not_make_a_figure_certain() -> None:
    for values, clusters in (([0.5] * 12, None), ([1.0] * 12, ["a", "b", "c"] * 4), ([0.0] * 12, ["a"] * 12)):
        found = share_interval(values, clusters)
        assert found.high - found.low > 0.1
    assert share_interval([1.0] * 12, ["a", "b", "c"] * 4).low < wilson(12, 12).low


def test_clusters_of_like_answers_widen_an_interval_and_never_narrow_it() -> None:
    alike = [1.0] * 10 + [0.0] * 10
    plain = share_interval(alike)
    for clusters in ([str(i // 5) for i in range(20)], [str(i % 5) for i in range(20)]):
        found = share_interval(alike, clusters)
        assert found.high - found.low >= plain.high - plain.low


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda: wilson(0, 0), "no items"),
        (lambda: wilson(3, 2), "between 0 and"),
        (lambda: wilson(math.nan, 2), "between 0 and"),
        (lambda: wilson(1, 2, 1.0), "confidence"),
        (lambda: mean_interval([]), "no items"),
        (lambda: mean_interval([1.0, math.nan]), "number 2 is nan"),
        (lambda: mean_interval([math.inf]), "number 1 is inf"),
        (lambda: clustered([1.0, 2.0], ["a"]), "clusters"),
        (lambda: ratio_interval([1.0], [0.0]), "positive denominator"),
        (lambda: ratio_interval([1.0], [1.0, 2.0]), "one positive denominator"),
        (lambda: share_interval([1.1]), "between 0 and 1"),
    ],
)
def test_what_says_nothing_is_refused(measure: Callable[[], Estimate], words: str) -> None:
    with pytest.raises(UserError, match=words):
        measure()


Draw = Callable[[Generator, int], Estimate]


def _share(true: float) -> Draw:
    return lambda generator, n: share_interval((generator.random(n) < true).astype(float))


def _mean(generator: Generator, n: int) -> Estimate:
    return mean_interval(generator.beta(2.0, 2.0, size=n))


def _graded(generator: Generator, n: int) -> Estimate:
    """Scores such as the share of an item's instructions that are followed: 0, 1/3, 2/3, 1."""
    return share_interval(generator.choice([0.0, 1 / 3, 2 / 3, 1.0], p=[0.3, 0.2, 0.2, 0.3], size=n))


def _clustered(generator: Generator, n: int) -> Estimate:
    """Clusters of 5 whose items share half of their variance."""
    shared = np.repeat(generator.normal(size=n // 5), 5)
    return clustered(shared + generator.normal(size=n), [str(i // 5) for i in range(n)])


def _clustered_share(generator: Generator, n: int) -> Estimate:
    """Clusters of 5 questions on a passage that is harder or easier (beta, mean 0.7)."""
    rate = np.repeat(generator.beta(3.5, 1.5, size=n // 5), 5)
    return share_interval((generator.random(n) < rate).astype(float), [str(i // 5) for i in range(n)])


def _ratio(generator: Generator, n: int) -> Estimate:
    size = generator.integers(500, 5000, size=n).astype(float)
    return ratio_interval(size * generator.normal(2.0, 0.4, size=n), size)


CASES: dict[str, tuple[Draw, float]] = {
    "share 0.05": (_share(0.05), 0.05),
    "share 0.25": (_share(0.25), 0.25),
    "share 0.5": (_share(0.5), 0.5),
    "share 0.95": (_share(0.95), 0.95),
    "mean": (_mean, 0.5),
    "graded": (_graded, 0.5),
    "clustered": (_clustered, 0.0),
    "clustered share": (_clustered_share, 0.7),
    "ratio": (_ratio, 2.0),
}


def coverage(draw: Draw, true: float, n: int, times: int) -> float:
    generator = np.random.default_rng(n)
    found = [draw(generator, n) for _ in range(times)]
    return sum(one.low <= true <= one.high for one in found) / times


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("true", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_wilson_holds_the_true_share_as_often_as_it_says_exactly(true: float, n: int) -> None:
    binomial = pytest.importorskip("scipy.stats").binom
    held = [right for right in range(n + 1) if (found := wilson(right, n)).low <= true <= found.high]
    assert 0.93 <= binomial.pmf(held, n, true).sum() <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_the_true_value_as_often_as_they_say(case: str, n: int) -> None:
    draw, true = CASES[case]
    assert 0.93 <= coverage(draw, true, n, 40_000 if case.startswith("share") else 10_000) <= 0.97


@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_the_true_value_about_as_often_as_they_say(case: str) -> None:
    draw, true = CASES[case]
    assert 0.92 <= coverage(draw, true, 50, 800) <= 0.98
