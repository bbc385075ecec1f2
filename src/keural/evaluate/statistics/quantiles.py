"""Critical values of the normal and of Student's t distribution, without scipy.

In: a confidence, degrees of freedom. Out: how many standard errors an interval reaches to each side.
"""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from keural.errors import UserError


def normal_quantile(probability: float) -> float:
    """The value below which a standard normal variable lies with the probability."""
    return NormalDist().inv_cdf(probability)


def two_sided_normal(confidence: float) -> float:
    """Standard errors to each side of an interval that rests on the normal distribution: 1.96 for 0.95.

    Raises `UserError` for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UserError(f"a confidence lies between 0 and 1, such as 0.95; it is {confidence}")
    return normal_quantile((1 + confidence) / 2)


@lru_cache(maxsize=4096)
def two_sided_t(confidence: float, freedom: int) -> float:
    """Standard errors to each side of an interval that rests on Student's t with `freedom` (1 or more) degrees of freedom."""
    low = high = two_sided_normal(confidence)
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(value: float, freedom: int) -> float:
    """The probability that a t variable lies between -`value` and `value` (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(value, math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    steps = np.arange(1, (freedom - odd) // 2)
    factors = (2 * steps - 1 + odd) / (2 * steps + odd) * square
    terms = math.fsum(np.cumprod(np.concatenate([[1.0], factors]))) if freedom > 1 else 0.0
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * terms)
    return math.sin(angle) * terms
