"""llama.cpp as slots: its sequences, all new tokens of a step in one of its batches.

In: a GGUF file or its directory, as the llama.cpp engine takes it. Out: `Slots`.
"""

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from keural.serve.batching.slots import Row
from keural.serve.engines.llama_cpp import BATCH, LARGEST_BATCH, OpenedGguf, cause

SMALL = 256 * 1024**2
"""Bytes of a file with which a large part of a prompt takes a fraction of a second. How prompts are cut must not depend on how
quick it goes: with quantized weights other parts are other sums, and a seeded answer would not be the same again.
"""


class LlamaSlots:
    """`Slots` of a GGUF file. Raises `UserError` as `keural.serve.engines.llama_cpp.LlamaCppEngine` does."""

    def __init__(self, path: Path, count: int, threads: int | None = None, *, verify: bool = True) -> None:
        self._opened = OpenedGguf(path, threads, sequences=count, verify=verify)
        self.unverified, self.tokenizer = self._opened.unverified, self._opened.tokenizer
        self.count, self.context_length = count, self._opened.context_length
        self.batch_tokens = min(BATCH, self.context_length)
        self.alone_tokens = min(LARGEST_BATCH if self._opened.size <= SMALL else BATCH, self.context_length)
        self._context, self._memory = self._opened.context, self._opened.memory
        self._batch = llama_cpp.llama_batch_init(self.alone_tokens, 0, 1)
        weakref.finalize(self, llama_cpp.llama_batch_free, self._batch)

    def step(self, rows: Sequence[Row]) -> Tensor:
        """See `Slots.step`; at most `alone_tokens` tokens in all."""
        wanted = number = 0
        for row in rows:
            if row.start != self._held(row.slot):
                raise ValueError(f"slot {row.slot} holds {self._held(row.slot)} tokens, not {row.start}")
            if number + len(row.ids) > self.alone_tokens:
                raise ValueError(f"more than {self.alone_tokens} tokens in a step")
            # llama.cpp reads sequences together whose numbers rise by one from row to row.
            for place, token in enumerate(row.ids):
                self._put(number + place, token, row.start + place, row.slot)
            number += len(row.ids)
            if row.wants_logits:
                self._batch.logits[number - 1] = 1
                wanted += 1
        self._batch.n_tokens = number
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError(f"llama.cpp could not read {number} tokens (code {code}: {cause()})")
        size = self.tokenizer.vocab_size
        if not wanted:
            return torch.empty(0, size)
        # Rows of the tokens that want logits, in the batch's order, in llama.cpp's memory: a copy costs as much as a greedy choice.
        return torch.from_numpy(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (wanted, size)))

    def cut(self, slot: int, length: int) -> int:
        """See `Slots.cut`."""
        if length >= self._held(slot):
            return self._held(slot)
        if not llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1) or self._held(slot) != length:
            llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return self._held(slot)

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Slots.copy`."""
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        if length:
            llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)  # of other cells llama.cpp copies all or nothing
        return self.cut(target, length)

    def _held(self, slot: int) -> int:
        """How many tokens a slot holds."""
        last: int = llama_cpp.llama_memory_seq_pos_max(self._memory, slot)
        return last + 1

    def _put(self, place: int, token: int, position: int, slot: int) -> None:
        """One token of llama.cpp's batch, without logits."""
        batch = self._batch
        batch.token[place], batch.pos[place] = token, position
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, slot
        batch.logits[place] = ctypes.c_int8(0)
