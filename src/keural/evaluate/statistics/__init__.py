"""How sure a figure is: intervals of shares and means, paired differences on the same items, many comparisons at once.

In: scores of items, as numbers. Out: estimates with their intervals, p-values. numpy only; nothing here opens a model or a file.
"""

from keural.evaluate.statistics.differences import (
    Difference,
    holm,
    least_difference,
    mcnemar_exact,
    paired_bootstrap,
    paired_difference,
)
from keural.evaluate.statistics.intervals import (
    CONFIDENCE,
    Estimate,
    clustered,
    mean_interval,
    ratio_interval,
    share_interval,
    wilson,
)

__all__ = [
    "CONFIDENCE",
    "Difference",
    "Estimate",
    "clustered",
    "holm",
    "least_difference",
    "mcnemar_exact",
    "mean_interval",
    "paired_bootstrap",
    "paired_difference",
    "ratio_interval",
    "share_interval",
    "wilson",
]
