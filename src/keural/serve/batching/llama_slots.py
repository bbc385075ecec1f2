"""llama.cpp as slots: its sequences, all new tokens of a step in one of its batches.

In: a GGUF file or its directory, as the llama.cpp engine takes it. Out: `Slots`.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from keural.serve.batching.slots import Row
from keural.serve.engines.llama_cpp import BATCH, LARGEST_BATCH, OpenedGguf, cause, holding_lock

SMALL = 256 * 1024**2
"""Bytes of a file with which a large part of a prompt takes a fraction of a second. How prompts are cut must not depend on how
quick it goes: with quantized weights other parts are other sums, and a seeded answer would not be the same again.
"""


_last_position = holding_lock(llama_cpp.llama_memory_seq_pos_max)


class LlamaSlots:
    """`Slots` of a GGUF file. Raises `UserError` as `keural.serve.engines.llama_cpp.LlamaCppEngine` does."""

    def __init__(self, path: Path, count: int, threads: int | None = None, *, verify: bool = True) -> None:
        self._opened = OpenedGguf(path, threads, sequences=count, verify=verify)
        self.unverified, self.tokenizer = self._opened.unverified, self._opened.tokenizer
        self.count, self.context_length = count, self._opened.context_length
        self.batch_tokens = min(BATCH, self.context_length)
        self.alone_tokens = min(LARGEST_BATCH if self._opened.size <= SMALL else BATCH, self.context_length)
        self.on_processors = not llama_cpp.llama_supports_gpu_offload()
        self._context, self._memory = self._opened.context, self._opened.memory
        self._batch = _Batch(self.alone_tokens)
        prototype = ctypes.PYFUNCTYPE if self.on_processors else ctypes.CFUNCTYPE  # it waits for an accelerator: without the lock
        self._address_of_logits = prototype(ctypes.c_void_p, ctypes.c_void_p)(_address(llama_cpp.llama_get_logits))
        self._logits: tuple[int, NDArray[np.float32]] = 0, np.empty((0, self.tokenizer.vocab_size), dtype=np.float32)
        """Where llama.cpp has its logits, and an array of them."""

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See `Slots.step`; at most `alone_tokens` tokens in all."""
        for row in rows:
            if row.start != self._held(row.slot):
                raise ValueError(f"slot {row.slot} holds {self._held(row.slot)} tokens, not {row.start}")
        number = sum(len(row.ids) for row in rows)
        if number > self.alone_tokens:
            raise ValueError(f"more than {self.alone_tokens} tokens in a step")
        code = llama_cpp.llama_decode(self._context, self._batch.of(rows))
        if code != 0:
            raise RuntimeError(f"llama.cpp could not read {number} tokens (code {code}: {cause()})")
        return self._logits_of(sum(row.wants_logits for row in rows))

    def _logits_of(self, wanted: int) -> NDArray[np.float32]:
        """The rows of the tokens that want logits, in the batch's order, in llama.cpp's memory: a copy costs as much as a greedy
        choice, and an array for it nearly so.
        """
        address, rows = self._logits
        if not wanted:
            return rows[:0]
        now = self._address_of_logits(self._context)  # ctypes' pointers take longer to look into than it
        if now != address or wanted != len(rows):
            logits = ctypes.cast(now, ctypes.POINTER(ctypes.c_float))
            rows = np.ctypeslib.as_array(logits, (wanted, self.tokenizer.vocab_size))
            self._logits = now, rows
        return rows

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
        last: int = _last_position(self._memory, slot)
        return last + 1


class _Batch:
    """llama.cpp's batch, its arrays filled by NumPy: through ctypes each value costs as much as a row here."""

    def __init__(self, size: int) -> None:
        self._token, self._pos, self._slot, self._slots_of_each = (np.zeros(size, dtype=np.int32) for _ in range(4))
        self._slots_of_each[:] = 1
        self._slot_of = self._slot.ctypes.data + np.arange(size, dtype=np.uintp) * self._slot.itemsize
        self._wants = np.zeros(size, dtype=np.int8)
        self._batch = llama_cpp.llama_batch(
            0,
            _pointer(self._token, ctypes.c_int32),
            None,
            _pointer(self._pos, ctypes.c_int32),
            _pointer(self._slots_of_each, ctypes.c_int32),
            _pointer(self._slot_of, ctypes.POINTER(ctypes.c_int32)),
            _pointer(self._wants, ctypes.c_int8),
        )

    def of(self, rows: Sequence[Row]) -> Any:
        """The batch of these rows, in their order: llama.cpp reads sequences together whose numbers rise by one from row to row."""
        end = 0
        for row in rows:
            begin, end = end, end + len(row.ids)
            self._token[begin:end] = row.ids
            self._pos[begin:end] = range(row.start, row.start + len(row.ids))
            self._slot[begin:end] = row.slot
            self._wants[begin:end] = 0
            self._wants[end - 1] = row.wants_logits
        self._batch.n_tokens = end
        return self._batch


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
