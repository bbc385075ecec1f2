"""llama.cpp's own loop over several sequences, greedy, without a server: what `serving_speed.py` compares servers with.

    python benchmarks/serving_bare.py GGUF_DIR STREAMS THREADS

Reads lines of JSON, each `{"prompts": [[ID, …], …], "tokens": N}`, and answers each with `{"seconds", "first"}`: the time for N
tokens after every prompt, and until all have their first one. The C interface is the one that `keural serve` uses, the tokens are
the largest logits by NumPy: nothing that a server could do without.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from keural.serve.engines.llama_cpp import BATCH, OpenedGguf


class Bare:
    """The loop on an opened file."""

    def __init__(self, path: Path, streams: int, threads: int) -> None:
        self._opened = OpenedGguf(path, threads, sequences=streams, verify=False)
        self._size = self._opened.tokenizer.vocab_size
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        """Seconds for so many tokens after each prompt, and until the first ones were there."""
        llama_cpp.llama_memory_clear(self._opened.memory, True)
        begun = time.perf_counter()
        waiting = [(stream, place, token) for stream, prompt in enumerate(prompts) for place, token in enumerate(prompt)]
        last = {(stream, len(prompt) - 1) for stream, prompt in enumerate(prompts)}
        newest: dict[int, int] = {}
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            newest |= self._decode(part, [(stream, place) in last for stream, place, _ in part])
        first = time.perf_counter() - begun
        for step in range(tokens - 1):
            rows = [(stream, len(prompts[stream]) + step, token) for stream, token in sorted(newest.items())]
            newest = self._decode(rows, [True] * len(rows))
        return time.perf_counter() - begun, first

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: Sequence[bool]) -> dict[int, int]:
        """Read rows of stream, position, id; the next token of the streams whose logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, ((stream, position, token), wants) in enumerate(zip(rows, wanted, strict=True)):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, stream
            batch.logits[place] = int(wants)
        assert llama_cpp.llama_decode(self._opened.context, batch) == 0
        found = {}
        for place, ((stream, _, _), wants) in enumerate(zip(rows, wanted, strict=True)):
            if wants:
                logits = llama_cpp.llama_get_logits_ith(self._opened.context, place)
                found[stream] = int(np.ctypeslib.as_array(logits, (self._size,)).argmax())
        return found


def main() -> None:
    """Answer lines until there are none."""
    path, streams, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    bare = Bare(path, streams, threads)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds, first = bare.run(asked["prompts"], asked["tokens"])
        print(json.dumps({"seconds": seconds, "first": first}), flush=True)


if __name__ == "__main__":
    main()
