"""The parts one after another, each in a process of its own that is stopped at its limit.

In: the command line's arguments. Out: a file of results, complete after every figure.
"""

import argparse
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_parts.align import align
from benchmarks.gpu_parts.baselines import baselines
from benchmarks.gpu_parts.bench import REAL, SMALL, Bench, OutOfTime, Size
from benchmarks.gpu_parts.check import check
from benchmarks.gpu_parts.parts import parts
from benchmarks.gpu_parts.serve import engines, serve
from benchmarks.gpu_parts.stack import stack
from benchmarks.gpu_parts.toy import toy
from benchmarks.gpu_parts.whole import whole

PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "check": (check, 75),
    "stack": (stack, 140),
    "whole": (whole, 190),
    "baselines": (baselines, 50),
    "parts": (parts, 60),
    "align": (align, 100),
    "toy": (toy, 60),
    "serve": (serve, 130),
    "engines": (engines, 110),
}
"""Each with the seconds it may take at most; what is left over goes to the later ones."""


def run_part(name: str, out: Path, size: Size, deadline: float, small: bool) -> None:
    """In a process of its own."""
    started = time.monotonic()
    bench = Bench(name, out, size, deadline, small)
    try:
        PARTS[name][0](bench)
    except OutOfTime:
        print(f"{name}: no time for the rest", flush=True)
    except Exception as error:
        bench.record("stopped", error=f"{type(error).__name__}: {str(error)[:400]}", where=traceback.format_exc()[-800:])
    bench.record("part", seconds=round(time.monotonic() - started, 1))


def main(description: str) -> None:
    """Run the parts one after another."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--seconds", type=float, default=900, help="for everything together")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"argument --parts: {', '.join(map(repr, unknown))}: no such part; there are {', '.join(PARTS)}")
    if not math.isfinite(options.seconds):
        parser.error(f"argument --seconds: {options.seconds}: is no time")
    if not options.small and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --small tries the parts on a CPU")
    try:
        options.out.unlink(missing_ok=True)
        options.out.touch()
        options.out.unlink()
    except OSError as error:
        parser.error(f"argument --out: {options.out}: cannot be written ({error.strerror})")
    ends = time.monotonic() + options.seconds
    context = multiprocessing.get_context("fork")  # imports are done once; CUDA is first touched in the child
    for name in names:
        limit = min(PARTS[name][1] * (3 if options.small else 1), ends - time.monotonic())
        if limit < 10:
            print(f"{name}: no time left", flush=True)
            continue
        deadline = time.monotonic() + limit
        child = context.Process(
            target=run_part, args=(name, options.out, SMALL if options.small else REAL, deadline, options.small)
        )
        child.start()
        child.join(limit)
        if child.is_alive():
            child.kill()
            child.join()
            print(f"{name}: stopped after {limit:.0f} s", flush=True)
        elif child.exitcode:
            print(f"{name}: ended with {child.exitcode}", flush=True)
