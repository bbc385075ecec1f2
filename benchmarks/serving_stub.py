"""`keural serve` around a network that only waits: what is measured then is the server alone.

    python benchmarks/serving_stub.py PORT TOKENIZER_DIR [--slots 8] [--waiting 32] [--step-ms 10] [--context 2000]

Every step takes the same time and the next token is always the same letter, so that each token is a piece of text. On SIGTERM one
line says what the server counted: requests taken and ended, answers still open, slots in use, and slots that hold other tokens than
the scheduler believes.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from keural.serve.batching.slots import Row
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.log import set_up_logging, write_entry
from keural.serve.server.running import Server, keep_loaded
from keural.serve.server.service import Service
from keural.serve.server.settings import Limits
from keural.serve.server.start import bind
from keural.tokenizer import KeuralTokenizer

SURE = 20.0
"""Logit of the letter; other tokens have 0."""


class Waiting:
    """Slots that count tokens, and take their time."""

    def __init__(self, tokenizer: KeuralTokenizer, count: int, context_length: int, seconds: float) -> None:
        self.count, self.context_length = count, context_length
        self.batch_tokens = self.alone_tokens = max(128, 2 * count)
        self._seconds, self.on_processors = seconds, False
        self.held = [0] * count
        letter = tokenizer.encode("가나다")[-1]
        self._logits = torch.zeros(count, tokenizer.vocab_size)
        self._logits[:, letter] = SURE

    def step(self, rows: Sequence[Row]) -> Tensor:
        """See `Slots.step`."""
        time.sleep(self._seconds)
        for row in rows:
            if row.start != self.held[row.slot]:
                raise ValueError(f"slot {row.slot} holds {self.held[row.slot]} tokens, not {row.start}")
            self.held[row.slot] += len(row.ids)
        return self._logits[: sum(row.wants_logits for row in rows)]

    def cut(self, slot: int, length: int) -> int:
        """See `Slots.cut`."""
        self.held[slot] = min(length, self.held[slot])
        return self.held[slot]

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Slots.copy`."""
        self.held[target] = min(length, self.held[source])
        return self.held[target]


def main() -> None:
    """Answer until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--context", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = KeuralTokenizer.load(given.tokenizer)
    slots = Waiting(tokenizer, given.slots, given.context, given.step_ms / 1e3)
    service = Service(
        tokenizer,
        slots,
        "stub",
        SamplingParams(temperature=0.0, repetition_penalty=1.0),
        limits=Limits(waiting=given.waiting, connections=max(1024, given.slots + 64)),
        log=write_entry,
    )
    set_up_logging()
    listener = bind("127.0.0.1", given.port)
    server = Server(service, listener)
    keep_loaded()
    server.run(sockets=[listener])
    scheduler = service.answers.scheduler
    print(
        json.dumps(
            {
                "taken": scheduler._numbers,
                "ended": sum(scheduler.stats.finished.values()),
                "by_end": scheduler.stats.finished,
                "open": service.answers.open,
                "slots_in_use": scheduler.running,
                "slots_that_differ": sum(len(held) != slots.held[slot] for slot, held in enumerate(scheduler._held)),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
