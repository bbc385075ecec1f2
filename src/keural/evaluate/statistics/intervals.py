"""Estimates with their intervals: shares, means, ratios, with items that come in clusters.

In: scores of items, and the cluster of each where the task names one. Out: an `Estimate`. Sources: Wilson (1927) for shares,
Miller, "Adding Error Bars to Evals" (arXiv 2411.00640) for means and clusters, Korn and Graubard (1998) for shares of clustered
items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keural.errors import UserError
from keural.evaluate.statistics.quantiles import two_sided_normal, two_sided_t

CONFIDENCE = 0.95
Floats = NDArray[np.float64]
Clusters = Sequence[str | None]
"""The cluster of each item, such as the passage that it asks about; an item whose cluster is None stands for itself."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure that was measured on items, with its interval."""

    value: float
    low: float
    """Lower end of the interval; -inf where one observation says nothing about the spread."""
    high: float
    error: float
    """Standard error; NaN where one observation says nothing about it."""
    n: int
    """Items."""
    units: int
    """Independent observations: the items, or their clusters."""


def wilson(right: float, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """The share `right / n` with Wilson's score interval, which also holds near 0 and 1 and for few items.

    Args:
        right: items that count, from 0 to `n`; may be a sum of scores in [0, 1], for which the interval is rather too wide.
        n: items, at least 1.
        confidence: how often such an interval holds the true share.

    Raises:
        UserError: for no items, or a count outside 0 to n.
    """
    _check_count(n)
    if not 0 <= right <= n:
        raise UserError(f"{right} right answers of {n} items: a count lies between 0 and the number of items")
    share = right / n
    low, high = _wilson(share, n, two_sided_normal(confidence))
    return Estimate(share, low, high, math.sqrt(share * (1 - share) / n), n, n)


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of independent values, with the interval of Student's t.

    Raises `UserError` for no values, or values that are not finite.
    """
    return clustered(values, None, confidence)


def clustered(values: ArrayLike, clusters: Clusters | None, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of values that come in clusters, with the cluster-robust standard error (Miller 2411.00640, section 2.2).

    The error is sqrt(G / (G - 1) * sum over clusters of (sum of the cluster's deviations)^2) / n for G clusters, and the interval
    that of Student's t with G - 1 degrees of freedom. Where every item is a cluster of its own this is the plain interval.

    Raises:
        UserError: for no values, values that are not finite, or another number of clusters than values.
    """
    found = checked(values, "scores")
    return ratio_interval(found, np.ones_like(found), clusters, confidence)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, clusters: Clusters | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """sum(numerators) / sum(denominators), such as the bits per byte of several documents, with its linearized interval.

    Raises `UserError` as `clustered` does, and for denominators that are not positive.
    """
    above, below = checked(numerators, "numerators"), checked(denominators, "denominators")
    if len(above) != len(below) or float(below.min()) <= 0:
        raise UserError("a ratio needs one positive denominator (such as bytes) for each numerator")
    total = float(below.sum())
    value = float(above.sum()) / total
    deviations = sums(above - value * below, clusters)
    units = len(deviations)
    if units == 1:
        return Estimate(value, -math.inf, math.inf, math.nan, len(above), 1)
    error = math.sqrt(units / (units - 1) * float(np.square(deviations).sum())) / total
    reach = two_sided_t(confidence, units - 1) * error
    return Estimate(value, value - reach, value + reach, error, len(above), units)


def share_interval(values: ArrayLike, clusters: Clusters | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of scores in [0, 1], with an interval that stays in [0, 1].

    Right or wrong answers get Wilson's interval; where they come in clusters, that of the number of independent items which has
    the cluster-robust error (Korn and Graubard), never more than there are. Other scores get `clustered`, cut at 0 and 1. Where
    no score differs from another, the spread cannot be estimated: then the clusters count as the items of Wilson's interval.

    Raises:
        UserError: for no scores, scores outside [0, 1] or not finite, or another number of clusters than scores.
    """
    found = checked(values, "scores")
    if float(found.min()) < 0 or float(found.max()) > 1:
        raise UserError("scores must lie between 0 and 1")
    plain = clustered(found, clusters, confidence)
    binary = bool(np.isin(found, (0.0, 1.0)).all())
    if binary and plain.units == plain.n:
        return wilson(float(found.sum()), plain.n, confidence)
    share = min(max(plain.value, 0.0), 1.0)
    spread = plain.error if plain.units > 1 else 0.0
    if not binary and spread > 0:
        return Estimate(share, max(plain.low, 0.0), min(plain.high, 1.0), plain.error, plain.n, plain.units)
    reach = two_sided_t(confidence, plain.units - 1) if plain.units > 1 else two_sided_normal(confidence)
    independent = min(share * (1 - share) / spread**2, plain.n) if spread > 0 else plain.units
    low, high = _wilson(share, independent, reach)
    return Estimate(share, low, high, plain.error, plain.n, plain.units)


def sums(values: Floats, clusters: Clusters | None) -> Floats:
    """The sum of the values of each cluster; the values themselves without clusters. Raises `UserError` for unequal numbers."""
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise UserError(f"{len(clusters)} clusters for {len(values)} scores; each score needs one")
    numbers: dict[tuple[str, int], int] = {}
    of = [numbers.setdefault(("", at) if name is None else (name, -1), len(numbers)) for at, name in enumerate(clusters)]
    return np.bincount(of, weights=values).astype(np.float64)


def checked(values: ArrayLike, what: str) -> Floats:
    """The values as one row of finite numbers. Raises `UserError` for none, and where one is not finite."""
    found = np.asarray(values, dtype=np.float64).reshape(-1)
    _check_count(len(found))
    if not np.isfinite(found).all():
        where = int(np.flatnonzero(~np.isfinite(found))[0])
        raise UserError(f"{what}: number {where + 1} is {found[where]}, which no statistic can use; score that item again")
    return found


def _check_count(n: int) -> None:
    if n < 1:
        raise UserError("there are no items to measure; ask for at least one")


def _wilson(share: float, n: float, reach: float) -> tuple[float, float]:
    """Ends of Wilson's interval for a share of `n` items, `reach` standard errors to each side; exactly 0 or 1 at the ends."""
    square = reach**2
    center = (share + square / (2 * n)) / (1 + square / n)
    half = reach / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n**2))
    return (0.0 if share == 0 else max(center - half, 0.0)), (1.0 if share == 1 else min(center + half, 1.0))
