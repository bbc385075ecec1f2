"""What choosing a token costs at the published vocabulary, beside transformers' processors in the same run, in processor time.

    python benchmarks/sampling_speed.py [--tokens 200]

Ours is `keural.serve.engines.sampling.choose`, one row at a time. The peer is what `generate` does with one row: repetition
penalty, temperature, top-p by a full sort, softmax, multinomial. Logits are normal with the given standard deviation: trained
models lie around 2 to 4; below 0.5 the nucleus is nearly the whole vocabulary. The prompt has 500 ids. Rounds alternate; medians
are given.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from keural.serve.engines.sampling import Sampler, choose
from keural.serve.engines.sampling_params import SamplingParams

VOCABULARY = 131_074
SPREADS = (0.02, 0.5, 1.0, 2.0, 4.0, 8.0)
SETTINGS = {"card": SamplingParams(seed=0), "greedy": SamplingParams(temperature=0.0, seed=0)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, {tokens} tokens\n")
    print("| settings | spread | ours ms | transformers ms | ratio |\n|---|---:|---:|---:|---:|")
    for name, sampling in SETTINGS.items():
        for spread in SPREADS:
            ours, theirs = compare(sampling, spread, tokens)
            print(f"| {name} | {spread} | {ours * 1e3:.2f} | {theirs * 1e3:.2f} | {theirs / ours:.1f} |", flush=True)


def compare(sampling: SamplingParams, spread: float, tokens: int) -> tuple[float, float]:
    """Median seconds of a token, ours and theirs, on the same logits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, 500), generator=generator)
    sampler = Sampler(sampling, ids[0].tolist(), VOCABULARY)
    warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)] if sampling.temperature else []
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty), *warpers])
    sides: tuple[list[float], list[float]] = ([], [])
    for _ in range(tokens):
        logits = torch.randn(1, VOCABULARY, generator=generator) * spread
        sides[0].append(seconds(lambda: choose(logits, [sampler])))  # noqa: B023
        sides[1].append(seconds(lambda: _theirs(processors(ids, logits), bool(warpers))))  # noqa: B023
    return statistics.median(sides[0]), statistics.median(sides[1])


def _theirs(scores: torch.Tensor, sampled: bool) -> torch.Tensor:
    return torch.multinomial(scores.softmax(-1), 1) if sampled else scores.argmax(-1)


def seconds(function: Callable[[], object]) -> float:
    """Processor seconds of this thread."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
