"""A network without weights: what comes next is a function of all ids that a slot holds, so that a lost or foreign token shows."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keural.serve.batching.slots import Row

VOCAB = 32


def logits_after(ids: Sequence[int]) -> Tensor:
    """Logits `[VOCAB]` after ids, other ones after every other sequence."""
    seed = 0
    for token in ids:
        seed = (seed * 31 + token + 1) % 1_000_003
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class FakeSlots:
    """Slots that remember ids, and refuse whatever a network could not do."""

    def __init__(
        self,
        count: int = 3,
        context_length: int = 40,
        batch_tokens: int = 8,
        keeps: Callable[[int], int] = lambda length: length,
        before_step: Callable[[Sequence[Row]], None] = lambda rows: None,
        pause: float = 0.0,
        alone_tokens: int = 0,
        on_processors: bool = False,
    ) -> None:
        self.count, self.context_length = count, context_length
        self.batch_tokens, self.alone_tokens = batch_tokens, max(batch_tokens, alone_tokens)
        self.on_processors = on_processors
        self.keeps, self.before_step, self.pause = keeps, before_step, pause
        self.held: list[list[int]] = [[] for _ in range(count)]
        self.steps: list[list[Row]] = []

    def step(self, rows: Sequence[Row]) -> Tensor:
        """See `Slots.step`."""
        assert rows
        slots = [row.slot for row in rows]
        assert slots == sorted(set(slots)), "a slot has one row a step, and the lowest comes first"
        time.sleep(self.pause)
        self.before_step(rows)
        self.steps.append(list(rows))
        for row in rows:
            assert row.ids
            assert row.start == len(self.held[row.slot])
            self.held[row.slot] += row.ids
            assert len(self.held[row.slot]) < self.context_length
        wanted = [logits_after(self.held[row.slot]) for row in rows if row.wants_logits]
        return torch.stack(wanted) if wanted else torch.empty(0, VOCAB)

    def cut(self, slot: int, length: int) -> int:
        """See `Slots.cut`; a network that cannot go back to any length is given by `keeps`."""
        if length < len(self.held[slot]):
            del self.held[slot][self.keeps(length) :]
        return len(self.held[slot])

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Slots.copy`."""
        assert source != target
        self.held[target] = self.held[source][:length]
        return len(self.held[target])
