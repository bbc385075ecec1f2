"""What every part goes by: the shapes that are tried, where results go, how time is measured.

In: a part, a file, shapes, a deadline. Out: printed results in the file, failures with their reasons; milliseconds of a call.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keural.model import KeuralConfig
from keural.train.network.block import windows_of
from keural.train.network.layers import COMPILED, graphs

PEAK = 989.5e12
GIB = 2**30
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A model and a micro-batch."""

    config: KeuralConfig
    length: int
    tokens: int

    def layers(self, number: int) -> "Size":
        """The same with so many layers."""
        values = self.config.to_dict() | {"num_hidden_layers": number, "layer_types": self.config.layer_types[:number]}
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok",
                 "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings",
                 "layer_types")  # fmt: skip
        return replace(self, config=KeuralConfig(**{name: values[name] for name in names}))


REAL = Size(
    KeuralConfig(
        vocab_size=131_074, hidden_size=4096, intermediate_size=5632, num_hidden_layers=24, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=513,
        max_position_embeddings=4096,
    ), 4096, 16_384,
)  # fmt: skip
SMALL = Size(
    KeuralConfig(
        vocab_size=514, hidden_size=128, intermediate_size=96, num_hidden_layers=6, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=33,
        max_position_embeddings=128,
    ), 128, 512,
)  # fmt: skip


class OutOfTime(Exception):
    """The part ends here: what it would do next does not fit into its time."""


class Bench:
    """Where results go, and what is measured."""

    def __init__(self, part: str, out: Path, size: Size, deadline: float, small: bool) -> None:
        self.part, self.out, self.size, self.deadline, self.small = part, out, size, deadline, small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            COMPILED.update(graphs("aot_eager"))  # code generation for a CPU takes minutes

    def record(self, name: str, /, **values: Any) -> None:
        """Print a result and write it down."""
        print(f"{self.part} {name} {json.dumps(values)}", flush=True)
        known = json.loads(self.out.read_text()) if self.out.exists() else {}
        known.setdefault(self.part, {}).setdefault(name, {}).update(values)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(self.out)

    @contextmanager
    def guarded(self, name: str, seconds: float = 0.0) -> Iterator[None]:
        """A piece whose failure is written down and stops nothing else. Raises `OutOfTime` when less than `seconds` remain."""
        started = time.monotonic()
        if self.deadline - started < seconds and not self.small:
            self.record(name, error=f"only {self.deadline - started:.0f} s were left, {seconds:.0f} are needed")
            raise OutOfTime
        try:
            yield
            self.record(name, took_s=round(time.monotonic() - started, 2))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()][:3]
            where = "".join(traceback.format_exception(error)[-4:])[-800:]
            self.record(name, error=f"{type(error).__name__}: {' '.join(lines)[:400]}", where=where)
        finally:
            self.free()

    def free(self) -> None:
        """Give unused memory back and forget the peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB that were allocated at most since `free`."""
        return round(torch.cuda.max_memory_allocated() / GIB, 2) if self.cuda else None

    def ms(self, function: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
        """Median milliseconds of a call."""
        for _ in range(warmup if self.cuda else 0):
            function()
        times = []
        for _ in range(repeats if self.cuda else 1):
            if self.cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()  # type: ignore[no-untyped-call]
                function()
                end.record()  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                function()
                times.append((time.perf_counter() - begun) * 1e3)
        return sorted(times)[len(times) // 2]


def flops_per_token(size: Size, square: bool = False) -> float:
    """Of forward and backward pass, recomputation left out."""
    c, length = size.config, size.length
    assert c.head_dim is not None
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    experts = 2 * 3 * c.hidden_size * c.intermediate_size * c.num_experts_per_tok
    projections = 2 * c.hidden_size * (2 * width + 2 * kv)
    total = 2.0 * c.vocab_size * c.hidden_size
    for window in windows_of(c):
        seen = min(window or length, length)
        keys = length if square else (seen * (seen + 1) / 2 + (length - seen) * seen) / length
        total += experts + projections + 4 * width * keys
    return 3 * total


def rates(size: Size, ms: float, tokens: int) -> dict[str, float]:
    """Tokens per second and MFU by both conventions."""
    per_second = tokens / ms * 1e3
    mfu = {
        name: round(100 * per_second * flops_per_token(size, square) / PEAK, 2)
        for name, square in (("causal", False), ("square", True))
    }
    return {"ms": round(ms, 2), "tokens_per_s": round(per_second), "mfu_causal": mfu["causal"], "mfu_square": mfu["square"]}
