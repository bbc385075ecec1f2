"""A shuffle that is never stored: the i-th element of a pseudo-random permutation of 0..n-1, in constant time and memory.

A balanced Feistel network over the smallest even number of bits that holds n permutes a slightly larger domain; values outside
0..n-1 are sent through again until they fall inside (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite
domains", section 3). In: n and a key of integers. Out: single elements or whole index arrays.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """The permutation of 0..n-1 that the integers in `key` (a seed, an epoch) choose."""

    def __init__(self, n: int, *key: int) -> None:
        assert n > 0, "a permutation needs at least one element"
        self._n = n
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._n:
            raise IndexError(f"index {index} is outside a permutation of {self._n}")
        return int(self.take(np.array([index]))[0])

    def take(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The elements at `indices`, each in 0..n-1. At most four rounds of walking are expected per element."""
        values = self._encrypt(indices.astype(np.uint64))
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self._n]
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (mixed(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
