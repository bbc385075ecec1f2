"""Differences between two models on the same items: intervals, tests, many at once, and what could not have been seen.

In: two scores for each item, in one order. Out: a `Difference`, p-values. Sources: Miller (arXiv 2411.00640, sections 4 and 5) for
pairs and power, McNemar (1947) in its exact form, Tango (1998) for the interval of paired shares, Efron and Tibshirani
(1993, chapter 16) for the bootstrap, Holm (1979).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from keural.errors import UserError
from keural.evaluate.statistics.intervals import CONFIDENCE, Clusters, Floats, checked, ratio_interval, sums
from keural.evaluate.statistics.quantiles import normal_quantile, two_sided_normal

RESAMPLES = 10_000
POWER = 0.8
_DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """The second model's mean score minus the first one's, on the same items."""

    value: float
    low: float
    """Lower end of the interval; -inf where one observation says nothing about the spread."""
    high: float
    error: float
    """Standard error; NaN where one observation says nothing about it."""
    n: int
    """Items that both have."""
    gained: int
    """Items on which the second scores higher."""
    lost: int
    """Items on which the first scores higher."""
    p: float
    """Probability of a difference at least as large when there is none, of this comparison alone."""
    test: str
    """What `p` comes from: `mcnemar` or `bootstrap`."""
    least: float
    """The least true difference that would have been seen with power 0.8 (see `least_difference`)."""


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Clusters | None = None,
    *,
    weights: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """What changed from `before` to `after`, item by item.

    Right or wrong answers (all scores 0 or 1) to independent items get Tango's score interval and the exact McNemar test;
    everything else the cluster-robust interval of the mean difference and a paired bootstrap.

    Args:
        before: scores of the first model.
        after: scores of the second one on the same items in the same order.
        clusters: the cluster of each item where items belong together.
        weights: what each item weighs, such as its bytes where the scores are bits: then means are sums over the weights' sum.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        confidence: of the interval.

    Raises:
        UserError: for no items, unequal numbers of scores, or scores that are not finite.
    """
    first, second, heavy = _pairs(before, after, weights)
    change = second - first
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    estimate = ratio_interval(change, heavy, clusters, confidence)
    binary = weights is None and bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    if binary and estimate.units == estimate.n:
        low, high = _paired_shares(gained, lost, estimate.n, confidence)
        error = _shares_error(gained, lost, estimate.n)
        p, test = mcnemar_exact(gained, lost), "mcnemar"
    else:
        low, high, error = estimate.low, estimate.high, estimate.error
        p, test = paired_bootstrap(first, second, clusters, weights=heavy, seed=seed, resamples=resamples)[2], "bootstrap"
    least = least_difference(error) if math.isfinite(error) else math.inf
    return Difference(estimate.value, low, high, error, estimate.n, gained, lost, p, test, least)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p of the exact McNemar test: whether the discordant items fall to both sides alike (a fair coin's binomial).

    Args:
        gained: items right only after; lost: items right only before.

    Raises:
        UserError: for negative counts.
    """
    if gained < 0 or lost < 0:
        raise UserError(f"McNemar: counts of items cannot be negative; they are {gained} and {lost}")
    n, term, tail = gained + lost, 1, 1
    for k in range(min(gained, lost)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**n))


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Clusters | None = None,
    *,
    weights: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[float, float, float]:
    """The percentile interval of the mean difference and its two-sided p, from items (or clusters) drawn again with replacement.

    p counts the draws that lie at least as far from the difference as the difference from zero. It is never below 2^(1 - m) for m
    units that differ at all, the least that turning signs around could give: three items cannot be significant.

    Returns:
        Low, high, p. The same seed gives the same numbers.

    Raises:
        UserError: as `paired_difference`.
    """
    first, second, heavy = _pairs(before, after, weights)
    change, weight = sums(second - first, clusters), sums(heavy, clusters)
    observed = float(change.sum() / weight.sum())
    drawn = _drawn(change, weight, resamples, seed)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    far = int((np.abs(drawn - observed) >= abs(observed) - 1e-12).sum())
    floor = math.ldexp(1.0, 1 - int(np.count_nonzero(change)))
    return float(low), float(high), min(1.0, max((far + 1) / (resamples + 1), floor))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, in their order: the chance of one false finding among all stays as said.

    Raises `UserError` for a p outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise UserError("Holm: p-values lie between 0 and 1")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def least_difference(error: float, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> float:
    """The least true difference that a two-sided test at `alpha` finds with probability `power`: (z[1-alpha/2] + z[power]) * error.

    Args:
        error: standard error of the difference.
        alpha: false findings that are accepted, of this comparison alone.
        power: how often such a difference would have been seen.

    Raises:
        UserError: for an error that is negative or not finite, or shares outside (0, 1).
    """
    if not (math.isfinite(error) and error >= 0 and 0 < alpha < 1 and 0 < power < 1):
        raise UserError(f"least difference: an error of {error}, alpha {alpha} and power {power} say nothing")
    return (normal_quantile(1 - alpha / 2) + normal_quantile(power)) * error


def _pairs(before: ArrayLike, after: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    first, second = checked(before, "scores before"), checked(after, "scores after")
    heavy = np.ones_like(first) if weights is None else checked(weights, "weights")
    if not len(first) == len(second) == len(heavy):
        raise UserError(f"{len(first)} scores before and {len(second)} after; a paired difference needs the same items in both")
    return first, second, heavy


def _paired_shares(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """Ends of Tango's score interval: the differences that a score test of the discordant items does not reject."""
    reach, value = two_sided_normal(confidence), (gained - lost) / n

    def deviation(difference: float) -> float:
        """Standard errors between what was seen and a true difference; falls as the difference grows."""
        half = gained + lost - (2 * n - gained + lost) * difference
        constant = 8 * n * lost * difference * (1 - difference)
        lost_share = (math.sqrt(max(half**2 + constant, 0.0)) + half) / (4 * n)
        variance = n * (2 * lost_share + difference * (1 - difference))
        gap = gained - lost - n * difference
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)

    return _crossing(deviation, reach, -1.0, value), _crossing(deviation, -reach, value, 1.0)


def _crossing(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function passes a level between `low` and `high`."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


def _shares_error(gained: int, lost: int, n: int) -> float:
    """Standard error of a difference of paired shares, with one more item of each discordant kind: nothing seen is not no spread
    (Bonett and Price 2012).
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    return math.sqrt((up + down - (up - down) ** 2) / (n + 2))


def _drawn(change: Floats, weight: Floats, resamples: int, seed: int) -> Floats:
    """The mean difference of `resamples` samples with replacement, a bounded number of draws at a time."""
    generator = np.random.default_rng(seed)
    units, rows = len(change), max(1, _DRAWS_AT_ONCE // len(change))
    found = []
    for start in range(0, resamples, rows):
        picked = generator.integers(units, size=(min(rows, resamples - start), units))
        found.append(change[picked].sum(axis=1) / weight[picked].sum(axis=1))
    return np.concatenate(found)
