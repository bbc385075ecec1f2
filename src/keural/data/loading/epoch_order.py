"""The order of an epoch's instances: a shuffle, and for pairs one whose steps have equally much work.

In: how many instances there are, how many a step takes, a seed, and for pairs their lengths. Out: the instances of any step, in
time that does not depend on how many there are. Epochs follow each other without a gap: a step may take the end of one and the
beginning of the next.

Steps of equally many pairs differ in their tokens, by a third where there are few, so that rows of a fixed length are half full at
the end of every step, and every step has another shape. So the pairs of several steps are dealt out together: sorted by length,
each run of as many pairs as there are steps gives every step one, the longer ones to the steps that have the least so far. Every
step then has long pairs and short ones as the data has them, and their number stays exact.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from keural.data.permutation import Permutation

Array = NDArray[np.int64]

ORDER_VERSION = 2
"""Raised when the pairs of a step change. 1 was a plain shuffle."""
STEPS_TOGETHER = 16
"""Steps whose pairs are dealt out together, never across the end of an epoch, and never more than a quarter of one: dealing follows
from the lengths, so it is by which pairs are dealt out together that epochs differ.
"""


class EpochOrder:
    """Instances ``0..number - 1``, `size` of them a step.

    Args:
        number: of instances in an epoch.
        size: of a step.
        seed: chooses the shuffle.
        lengths: tokens of each instance, where steps are to have equally many; None leaves the shuffle as it is.
    """

    def __init__(self, number: int, size: int, seed: int, lengths: Array | None = None) -> None:
        self.number, self.size, self.seed, self.lengths = number, size, seed, lengths
        self._together = max(1, min(STEPS_TOGETHER, number // size // 4))
        self._dealt = lru_cache(maxsize=4)(self._deal)

    def step(self, step: int) -> Array:
        """The instances of a step, counted from 0."""
        if self.lengths is not None:
            epoch, inside = divmod(step * self.size, self.number)
            if inside + self.size <= self.number:
                first = -(-epoch * self.number // self.size)  # the first step that lies within this epoch
                window, place = divmod(step - first, self._together)
                found: Array = self._dealt(epoch, first + window * self._together)[place]
                return found
        return self._shuffled(step * self.size, self.size)

    def _shuffled(self, start: int, count: int) -> Array:
        """Positions ``start..`` of the epochs' permutations, one after another."""
        epochs, inside = np.divmod(np.arange(start, start + count), self.number)
        parts = [Permutation(self.number, self.seed, epoch).take(inside[epochs == epoch]) for epoch in np.unique(epochs).tolist()]
        return np.concatenate(parts)

    def _deal(self, epoch: int, first: int) -> Array:
        """The instances ``[steps, size]`` of some steps from `first` on, all within the epoch."""
        steps = min(self._together, (epoch + 1) * self.number // self.size - first)
        instances = self._shuffled(first * self.size, steps * self.size)
        assert self.lengths is not None
        lengths = self.lengths[instances]
        order = np.argsort(-lengths, kind="stable").reshape(self.size, steps)
        dealt, tokens = np.empty((steps, self.size), dtype=np.int64), np.zeros(steps, dtype=np.int64)
        for place, longest_first in enumerate(order):
            least_first = np.argsort(tokens, kind="stable")
            dealt[least_first, place] = longest_first
            tokens[least_first] += lengths[longest_first]
        mixed = Permutation(steps, self.seed, epoch, first).take(np.arange(steps))  # the first one was given the longest pair
        return instances[dealt[mixed]]
