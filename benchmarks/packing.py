"""Packing lengths like those of the published SFT data: fill, time on one core, and what is saved against padding.

    python benchmarks/packing.py [--samples 2351212]

Lengths are log-normal with a mean of 621 and cut at 8,192 (the card's mean and maximum; the shape between is an assumption, so
three widths are tried). What is longer than the window is cut to it beforehand, as `prepare` shortens conversations to the window.
Three ways to lay the samples out: each padded to the window (as the published scripts do), each batch of 64 in random order padded
to its longest, and packed. Positions are what a model computes on.
"""

import argparse
import math
import time

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.packing import pack

MEAN, LONGEST = 621, 8192
WINDOWS = (2048, 4096)
WIDTHS = (0.7, 1.0, 1.3)
BATCH = 64


def draw(samples: int, width: float, mean: float = MEAN, longest: int = LONGEST) -> NDArray[np.int64]:
    """Log-normal lengths with this standard deviation of the logarithm, cut at `longest`, scaled until the mean is `mean`."""
    normal = np.random.default_rng(0).standard_normal(samples)
    scale = math.log(mean) - width**2 / 2
    for _ in range(20):  # the cut lowers the mean a little
        lengths = np.clip(np.exp(scale + width * normal).round(), 8, longest).astype(np.int64)
        scale += math.log(mean / lengths.mean())
    return lengths


def padded_batches(lengths: NDArray[np.int64]) -> int:
    """Positions when each batch in random order is padded to its longest."""
    order = np.random.default_rng(1).permutation(lengths)
    order = np.append(order, np.zeros(-len(order) % BATCH, dtype=np.int64)).reshape(-1, BATCH)
    return int((order.max(axis=1) * BATCH).sum())


def main() -> None:
    """Print one table row per window and width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_351_212)
    arguments = parser.parse_args()
    print("| window | width | mean | tokens | plan, s | rows | fill | positions padded to the window | batch-padded | packed |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for window in WINDOWS:
        for width in WIDTHS:
            drawn = draw(arguments.samples, width)
            lengths = np.minimum(drawn, window)
            started = time.process_time()
            rows = pack(lengths, window)
            seconds = time.process_time() - started
            packed = np.fromiter((index for row in rows for index in row), dtype=np.int64, count=len(lengths))
            assert np.array_equal(np.sort(packed), np.arange(len(lengths))), "a sample is lost or doubled"
            sums = np.add.reduceat(lengths[packed], np.cumsum([0, *map(len, rows)])[:-1])
            assert int(sums.max()) <= window, "a row is too long"
            total, positions = int(lengths.sum()), len(rows) * window
            padded, batched = len(lengths) * window, padded_batches(lengths)
            print(
                f"| {window:,} | {width} | {drawn.mean():.0f} | {total / 1e9:.3f} G | {seconds:.1f} | {len(rows):,} "
                f"| {total / positions:.2%} | {padded / 1e9:.3f} G ({padded / positions:.2f}×) "
                f"| {batched / 1e9:.3f} G ({batched / positions:.2f}×) | {positions / 1e9:.3f} G |",
                flush=True,
            )


if __name__ == "__main__":
    main()
