"""Which answer to another prompt each labelled answer is compared with.

In: prompts and answers, record by record. Out: for each record its prompt with the answer of another record. KTO measures on these
how far the policy has gone from its reference (Ethayarajh et al. 2024, arXiv:2402.01306), so the prompts must be others and the
answers those that it learns from: every answer is taken exactly once.

Records stand in the order of a digest of their prompts, those of one prompt together, and each takes the answer that stands so many
places further as the most frequent prompt has records. So no record gets an answer to its own prompt, however its source orders its
rows, and data that grows changes few partners.
"""

from array import array
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from keural.errors import UserError

Ids = Sequence[int] | NDArray[np.integer]


class Prompts:
    """The prompts of labelled answers in the order in which they were added."""

    def __init__(self) -> None:
        self._digests, self._records, self._lengths = array("Q"), array("Q"), array("Q")

    def add(self, ids: Ids, mask: Ids | None) -> None:
        """Add a record: its ids, of which the answer is what the mask has from its first 1 on."""
        assert mask is not None
        length = list(mask).index(1)
        tokens = np.asarray(ids, dtype="<u4")
        self._lengths.append(length)
        self._digests.append(_digest(tokens[:length]))
        self._records.append(_digest(tokens))

    def length(self, record: int) -> int:
        """Tokens of a record's prompt."""
        return self._lengths[record]

    @cached_property
    def partners(self) -> NDArray[np.int64]:
        """For each record the one whose answer it is compared with.

        Raises `UserError` where more than half of the answers are to one prompt.
        """
        prompts = np.array(self._digests, dtype=np.uint64)
        order = np.lexsort((np.array(self._records, dtype=np.uint64), prompts))
        largest = int(np.unique(prompts, return_counts=True)[1].max())
        if 2 * largest > len(prompts):
            raise UserError(
                f"{largest:,} of {len(prompts):,} labelled answers are to the same prompt; every one needs an answer to another "
                "prompt beside it (kto measures the divergence on these): give more prompts, of what is held out, too"
            )
        found = np.empty(len(prompts), dtype=np.int64)
        found[order] = np.roll(order, -largest)
        return found


def joined(prompts: Prompts, ends: Sequence[int], record: int, longest: int | None) -> list[slice]:
    """The prompt of a record and the answer of its partner, as parts of the tokens of all records, which end at `ends`; cut to
    `longest` tokens.
    """
    partner = int(prompts.partners[record])
    prompt = slice(ends[record], ends[record] + prompts.length(record))
    answer = slice(ends[partner] + prompts.length(partner), ends[partner + 1])
    room = answer.stop - answer.start if longest is None else longest - prompts.length(record)
    return [prompt, slice(answer.start, min(answer.stop, answer.start + room))]


def _digest(ids: NDArray[np.unsignedinteger]) -> int:
    return int.from_bytes(blake2b(ids.tobytes(), digest_size=8).digest(), "little")
