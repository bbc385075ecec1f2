"""The llama.cpp engine: a GGUF export on the CPU, or on the GPU that llama.cpp was built for.

In: a GGUF file with `tokenizer.model` beside it, and `keural.json` where our export wrote it. Out: an `Engine`. Ids go in and
logits come out: text is cut by our tokenizer, because llama.cpp's has no byte fallback for Unigram models, and tokens are drawn by
our sampler. The C interface is used directly: the wrapper around it copies logits and keeps those of a whole batch.

The cache holds all keys of sliding layers too (`swa_full`; the window is a mask then), so that it can be cut back to whatever a new
prompt shares with the last one.
"""

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from keural.errors import UserError
from keural.pretrained.lineage import check_sums
from keural.serve.engines.base import Finish
from keural.serve.engines.decoding import check_prompt, common_prefix, decode
from keural.serve.engines.paths import gguf_file
from keural.serve.engines.sampling_params import SamplingParams
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.model_file import FIRST_NORMAL_ID

ARCHITECTURE = "granite_swa"
"""The architecture of llama.cpp that this network is a case of."""
MAGIC = b"GGUF"
BATCH, LARGEST_BATCH = 128, 512
"""Tokens of a prompt that llama.cpp is given at a time, usually and at most. Ctrl-C is heard in between; with 512 a small model
reads 8 % faster, a large one 3 %."""
UNQUANTIZED = {"0", "1", "32"}
"""`general.file_type` of float32, float16 and bfloat16 files."""
LOG_LEVEL_ERROR = 4
"""Of ggml.h; llama-cpp-python has no name for it."""

_reported: deque[str] = deque(maxlen=20)
"""What llama.cpp last called an error, oldest first."""


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, _: Any) -> None:
    """Keep llama.cpp's errors for our messages; drop everything else it would print."""
    if level == LOG_LEVEL_ERROR:
        _reported.append(text.decode("utf-8", errors="replace").strip())


llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def holding_lock(function: Any) -> Any:
    """A function of llama.cpp, called without giving up Python's lock; only for what takes no time.

    Whoever waits for the lock takes it when it is given up, and what called the network's next step would wait for all that the
    server does with the last one.
    """
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return ctypes.PYFUNCTYPE(function.restype, *function.argtypes)(address)


class OpenedGguf:
    """A GGUF file in llama.cpp with room for `sequences` conversations; freed with the object. Raises as `LlamaCppEngine`."""

    def __init__(self, path: Path, threads: int | None, *, sequences: int = 1, verify: bool = True) -> None:
        file = gguf_file(path)
        self.unverified = _check_file(file, verify)
        self.size = file.stat().st_size
        self.tokenizer = KeuralTokenizer.load(file.parent)
        model = _load(file)
        weakref.finalize(self, llama_cpp.llama_model_free, model)
        _check_model(file, model, self.tokenizer)
        self.context_length: int = llama_cpp.llama_model_n_ctx_train(model)
        self.context = _new_context(file, model, self.context_length, threads or physical_cores(), sequences)
        weakref.finalize(self, llama_cpp.llama_free, self.context)  # finalizers run last first: before the model's
        self.memory = llama_cpp.llama_get_memory(self.context)


class LlamaCppEngine:
    """llama.cpp behind the decoding loop of this package. Not for concurrent use."""

    def __init__(self, path: Path, threads: int | None = None, *, verify: bool = True) -> None:
        """Load a GGUF file, or the only one of a directory.

        Args:
            path: the file or its directory.
            threads: to compute with; None takes one for each physical core that this process may use.
            verify: compare the files with the checksums in `keural.json`, where there is one.

        Raises:
            UserError: when there is no such file, when it is damaged, not a Keural export, does not fit into memory, or when the
                tokenizer beside it is not the model's.
        """
        self._opened = OpenedGguf(path, threads, verify=verify)
        self.unverified, self.tokenizer = self._opened.unverified, self._opened.tokenizer
        self.context_length = self._opened.context_length
        self._context, self._memory = self._opened.context, self._opened.memory
        self._claimed_ids: list[int] = []

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams, stop: Collection[int]) -> Generator[int, None, Finish]:
        """See `Engine.stream`. Starting a new answer invalidates an unfinished earlier one."""
        check_prompt(prompt_ids, self.context_length)
        return (yield from decode(self._read, self._reuse(prompt_ids), prompt_ids, sampling, stop, self.context_length))

    def _reuse(self, prompt_ids: Sequence[int]) -> list[int]:
        """Cut the cache back to what it shares with the prompt; returns the ids still to be read, at least one."""
        common = common_prefix(self._cached_ids(), prompt_ids)
        whole = llama_cpp.llama_memory_seq_rm(self._memory, 0, common, -1)
        if not whole or llama_cpp.llama_memory_seq_pos_max(self._memory, 0) != common - 1:
            self._forget()
            return list(prompt_ids)
        del self._claimed_ids[common:]
        return list(prompt_ids[common:])

    def _cached_ids(self) -> list[int]:
        """The ids whose keys the cache holds: of those that reading was begun for, as many as llama.cpp counts."""
        held: int = llama_cpp.llama_memory_seq_pos_max(self._memory, 0) + 1
        return self._claimed_ids[:held]

    def _read(self, ids: list[int]) -> Tensor:
        """Read ids after the cached ones; the logits `[V]` after the last, float32, in llama.cpp's memory until the next call.

        An interrupt may come at any line: ids are claimed before they are read, and what was really read is asked of llama.cpp.
        """
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self._claimed_ids += part
            self._decode(part)
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.tokenizer.vocab_size,)))

    def _decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            self._forget()
            raise UserError(f"llama.cpp could not read {len(ids)} tokens (code {code}: {cause()}); try a shorter prompt")

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._claimed_ids = []


def physical_cores() -> int:
    """Physical cores that this process may run on: threads beyond that only wait for each other's memory."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_core(cpu) for cpu in os.sched_getaffinity(0)}
    return len(cores)


def _core(cpu: int) -> tuple[str, ...]:
    """What tells the physical core of a logical CPU from others; the CPU's own number where the system does not say."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)


def _check_file(file: Path, verify: bool) -> str | None:
    """Raise `UserError` unless the file is GGUF and, with `verify`, its directory is as `keural.json` says.

    Returns what is to be said of a directory that says too little.
    """
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{file}: is not a GGUF file; copy or export it again")
    return check_sums(file.parent, [file.name, "tokenizer.model"]).notice if verify else None


def _load(file: Path) -> Any:
    """llama.cpp's model, its weights mapped into memory."""
    _reported.clear()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), llama_cpp.llama_model_default_params())
    if not model:
        raise UserError(
            f"{file}: llama.cpp cannot load it ({cause()}); copy or export it again, or install a newer llama-cpp-python"
        )
    return model


def _check_model(file: Path, model: Any, tokenizer: KeuralTokenizer) -> None:
    """Raise `UserError` unless the file holds our architecture with the tokenizer's vocabulary, piece by piece.

    Control and byte pieces are the same in every tokenizer; the file has some of the latter under other names.
    """
    architecture = _metadata(model, "general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{file}: holds a {architecture!r} model, not {ARCHITECTURE!r}; export one with `keural export`")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocabulary)
    if size != tokenizer.vocab_size:
        raise UserError(
            f"{file.parent}: the tokenizer has {tokenizer.vocab_size} ids and {file.name} {size}; "
            "put the tokenizer.model there that the model was trained with"
        )
    for token_id, piece in list(enumerate(tokenizer.proto.pieces))[FIRST_NORMAL_ID:]:
        named = llama_cpp.llama_vocab_get_text(vocabulary, token_id)
        if named != piece.piece.encode():
            raise UserError(
                f"{file.parent}: the tokenizer is not that of {file.name}: id {token_id} is {piece.piece!r} in the one and "
                f"{named.decode(errors='replace')!r} in the other; put the tokenizer.model there that the model was trained with"
            )


def _new_context(file: Path, model: Any, context_length: int, threads: int, sequences: int = 1) -> Any:
    """llama.cpp's state of so many conversations of `context_length` tokens each: cache and buffers."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context_length * sequences
    params.n_seq_max = sequences
    # Each has cells of its own. In a pool, llama.cpp gives away cells that no window reaches any more, also with `swa_full`, and a
    # conversation that is cut back would miss their keys without a word.
    params.kv_unified = False
    params.n_batch = params.n_ubatch = min(LARGEST_BATCH, context_length)
    params.n_threads = params.n_threads_batch = threads
    params.swa_full = True
    if _metadata(model, "general.file_type") in UNQUANTIZED:
        # Such a file is there to be exact; a float16 cache and flash attention, llama.cpp's defaults, move logits by a percent.
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    _reported.clear()
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise UserError(
            f"{file}: no room for a context of {context_length} tokens ({cause()}); free some memory or use a smaller quantization"
        )
    return context


def _metadata(model: Any, key: str) -> str:
    """A value of the GGUF header as text; empty where there is none."""
    buffer = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", errors="replace")


def cause() -> str:
    """What llama.cpp said when it failed; the first error is the most specific."""
    return _reported[0].split("error loading model: ")[-1] if _reported else "no reason given"
