"""What a network is to the scheduler: slots, each of which holds the tokens of one sequence that were read.

In: rows, each some new tokens of a slot. Out: logits after the last token of the rows that want them.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from keural.serve.engines.sampling import Logits


class Row(NamedTuple):
    """Tokens to be read in one step: `ids` follow the `start` tokens that the slot holds."""

    slot: int
    ids: Sequence[int]
    start: int
    wants_logits: bool


class Slots(Protocol):
    """A network with room for `count` sequences at once. Its methods are called by one thread alone."""

    count: int
    context_length: int
    """Tokens that one sequence may have."""
    batch_tokens: int
    """Tokens that are well read in one step: more would let the answers under way wait."""
    alone_tokens: int
    """The same of one prompt beside no other answer; at least `batch_tokens`. A newcomer waits for them."""
    on_processors: bool
    """Whether a step takes the processors that the server runs on."""

    def step(self, rows: Sequence[Row]) -> Logits:
        """Read the rows, of different slots, the lowest first.

        Returns the logits `[wanted, V]` after the rows that want them, in their order; good until the next call, and the caller's
        to write to until then.
        Where it raises, what the rows' slots hold is unknown.
        """

    def cut(self, slot: int, length: int) -> int:
        """Forget all but the first `length` tokens of a slot; returns how many it holds now: fewer where it cannot go back."""

    def copy(self, source: int, target: int, length: int) -> int:
        """Let `target` hold the first `length` tokens of `source`, instead of its own; returns how many it holds now."""
