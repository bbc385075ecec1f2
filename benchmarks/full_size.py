"""The 14.83B model on a small machine: made, exported, run and imported again, with the peak memory of every step.

    python benchmarks/full_size.py WORK_DIR [--recipe recipes/keural-14b-published] [--tokens 48] [data=DIR …]

The steps are the commands a user would type, each in a process of its own, whose peak resident memory and seconds are the system's
account of that process (`wait4`). Pages of a mapped GGUF file count as resident there: they can be dropped at any time.

Decoding and reading are then timed in one process per file, alternating between `LlamaCppEngine` (our loop, our sampler) and the
bare loop of llama.cpp's C interface (`llama_decode` and its own greedy sampler) on the same loaded model: in each round every side
continues the same short prompt, in an order that turns from round to round, and the ratio is the median of the rounds' own. Only
the ratio is claimed; rates depend on the memory of the machine. Weights are random, so routing is as even as it gets, which is the
slow case.

The work directory needs about 62 GB; files are removed as soon as no later step reads them.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

KEURAL = Path(sys.executable).with_name("keural")
PROMPT = "대한민국의 수도는 어디인가요? Answer in one sentence, please."
READ, CONTINUED = 256, 16
"""Tokens of the prompt whose reading is timed, and of the one whose continuation is."""
READ_ROUNDS = 3


class Step(NamedTuple):
    """What one command took."""

    command: str
    seconds: float
    peak_gb: float
    size_gb: float


def run(arguments: list[str], made: Path) -> Step:
    """Run a command; its seconds, its peak resident memory, and the size of what it made."""
    started = time.monotonic()
    process = subprocess.Popen([str(KEURAL), *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"failed: keural {' '.join(arguments)}")
    files = [made] if made.is_file() else [file for file in made.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    step = Step(" ".join(arguments), time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9, size / 1e9)
    print(step, file=sys.stderr, flush=True)  # a later step may fail
    return step


def time_file(directory: Path, tokens: int, rounds: int) -> str:
    """A row of rates: reading and decoding by our engine and by llama.cpp's own loop, alternating."""
    import ctypes

    import llama_cpp
    import torch

    from keural.serve.engines.llama_cpp import LlamaCppEngine
    from keural.serve.engines.sampling_params import SamplingParams

    engine = LlamaCppEngine(directory, verify=False)
    context = engine._context
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=tokens + 1)
    card = SamplingParams(max_new_tokens=tokens + 1, seed=1)
    sampler = llama_cpp.llama_sampler_init_greedy()
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        return torch.randint(260, engine.tokenizer.vocab_size - 2, (length,), generator=generator).tolist()

    def ours(sampling: SamplingParams, ids: list[int], more: int) -> tuple[float, float]:
        """Seconds until the first token, and for `more` others."""
        engine._forget()
        started = time.perf_counter()
        stream = engine.stream(ids, sampling, set())
        next(stream)
        first = time.perf_counter()
        for _ in range(more):
            next(stream)
        return first - started, time.perf_counter() - first

    def theirs(ids: list[int], more: int) -> tuple[float, float]:
        engine._forget()
        batch = llama_cpp.llama_n_batch(context)

        def step(ids: list[int]) -> int:
            for start in range(0, len(ids), batch):
                part = ids[start : start + batch]
                array = (llama_cpp.llama_token * len(part))(*part)
                assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part))) == 0
            return int(llama_cpp.llama_sampler_sample(sampler, context, ctypes.c_int32(-1)))

        started = time.perf_counter()
        token = step(ids)
        first = time.perf_counter()
        for _ in range(more):
            token = step([token])
        return first - started, time.perf_counter() - first

    sides: dict[str, Callable[[list[int], int], tuple[float, float]]] = {
        "llama.cpp": theirs,
        "ours, greedy": lambda ids, more: ours(greedy, ids, more),
        "ours, card's sampling": lambda ids, more: ours(card, ids, more),
    }
    reading: list[dict[str, float]] = []
    decoding: list[dict[str, float]] = []
    theirs(prompt(READ), 0)  # the file's pages come into memory
    for number in range(rounds):
        order = deque(sides)
        order.rotate(number)
        ids = prompt(CONTINUED)
        decoding.append({name: tokens / sides[name](ids, tokens)[1] for name in order})
        if number < READ_ROUNDS:
            ids = prompt(READ)
            reading.append({name: READ / sides[name](ids, 0)[0] for name in order})
    llama_cpp.llama_sampler_free(sampler)
    columns = [f"{_middle(reading, name, '.1f')} / {_middle(decoding, name, '.2f')}" for name in sides]
    return f"| {next(directory.glob('*.gguf')).name} | " + " | ".join(columns) + " |"


def _middle(rounds: list[dict[str, float]], name: str, form: str) -> str:
    """The median rate of a side, with the median of its ratios to llama.cpp's in the same round."""
    rate = statistics.median(rates[name] for rates in rounds)
    ratio = statistics.median(rates[name] / rates["llama.cpp"] for rates in rounds)
    return f"{rate:{form}}" if name == "llama.cpp" else f"{rate:{form}} (x{ratio:.3f})"


def main() -> None:
    """Run every step and print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value for the recipe, e.g. data=DIR")
    parser.add_argument("--recipe", default="recipes/keural-14b-published")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quantize", default="q8_0,q4_k_m", help="GGUF formats, with commas")
    parser.add_argument("--time-only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time_only:
        print(time_file(options.time_only, options.tokens, options.rounds), flush=True)
        return
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    base, steps, rates = work / "base", [], []
    steps.append(run(["init", options.recipe, str(base), *options.overrides], base))
    for quantize in options.quantize.split(","):
        out = work / quantize
        steps.append(run(["export", str(base), str(out), "--format", "gguf", "--quantize", quantize], out))
        chat = ["generate", str(out), "--engine", "llama.cpp", "--prompt", PROMPT, "--max-new-tokens", "32"]
        steps.append(run(chat, next(out.glob("*.gguf"))))
        again = [sys.executable, __file__, str(work), "--tokens", str(options.tokens), "--rounds", str(options.rounds)]
        done = subprocess.run([*again, "--time-only", str(out)], stdout=subprocess.PIPE, text=True, check=True)
        rates.append(done.stdout.strip())
        print(rates[-1], file=sys.stderr, flush=True)
        shutil.rmtree(out)
    pt, back = work / "pt", work / "again"
    steps.append(run(["export", str(base), str(pt), "--format", "pt"], pt))
    shutil.rmtree(base)
    steps.append(run(["import", str(pt), str(back)], back))
    shutil.rmtree(pt)
    steps.append(run(["inspect", str(back), "--verify"], back))
    shutil.rmtree(back)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "gguf", "llama-cpp-python"))
    print(f"commit {commit}, {versions}, {len(os.sched_getaffinity(0))} cores\n")
    print("| command | seconds | peak memory, GB | files, GB |\n|---|---|---|---|")
    for step in steps:
        command = step.command.replace(str(work), "WORK")
        print(f"| `keural {command}` | {step.seconds:.0f} | {step.peak_gb:.2f} | {step.size_gb:.2f} |")
    print("\n| reading / decoding, tokens/s | llama.cpp's own loop | ours, greedy | ours, the card's sampling |\n|---|---|---|---|")
    print("\n".join(rates))


if __name__ == "__main__":
    main()
