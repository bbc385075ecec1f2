"""Tokens per second of one training step, beside transformers' Mixtral of the same shape in the same run.

    python -m benchmarks.training_speed [--threads 2] [--rounds 7] [--before CHECKOUT]

Forward, cross-entropy, router balance loss, backward, clipping, AdamW, float32. Ours is the stage's own step (`train_step`:
chunked log-probabilities, z-loss and metrics included). Mixtral runs with each experts implementation that is usable on a CPU; the
better one is the peer. Rounds alternate between the sides and medians are compared, by the clock and by processor time, so that a
noisy machine hits both alike. FLOPs are not counted; only ratios are claimed.

- Rows of one document each, and rows of four (which Mixtral gets as positions that begin anew): tokens per second.
- Lengths of the published SFT data (mean 621, log-normal): ours packed into rows of 4,096, Mixtral's padded to 4,096, as the
  published scripts do. Only tokens that are no padding are counted.
- With `--before`, a checkout of an earlier commit (`git worktree add DIR 2fc1b30c` has the first engine): its own step, in a
  process of its own, on rows of four documents.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.packing import draw
from keural.data.tokens.store import StoreWriter
from keural.model import KeuralConfig
from keural.recipe import StageSpec
from keural.train.loop import train_step
from keural.train.processes.ranks import session
from keural.train.stage.job import StageJob
from keural.train.stage.signals import StopSignals
from keural.train.stage.training import open_stage
from keural.train.trainer import Trainer

SHAPES = {
    "toy": {"vocab_size": 902, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_local_experts": 4},
    "laptop": {"vocab_size": 8194, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 6, "num_local_experts": 8},
}
ROWS, LENGTH, DOCUMENT = 16, 256, 64
WINDOW, WIDTH, PADDED_ROWS = 4096, 1.0, 8
EXPERTS = ("eager", "grouped_mm")
END = 2
Step = Callable[[], int]
"""Does an optimizer step; gives its tokens, padding not counted."""


def shape(name: str, length: int = LENGTH) -> dict[str, int]:
    """The configuration both models share."""
    heads = SHAPES[name]["hidden_size"] // 32
    common = {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 32, "max_position_embeddings": length}
    return SHAPES[name] | common


def stage(name: str, directory: Path, lengths: Sequence[int], window: int, tokens: int, objective: str = "next_token") -> Trainer:
    """A stage on random sequences of these lengths, before its first step."""
    generator = np.random.default_rng(0)
    kind = "documents" if objective == "next_token" else "conversations"
    with StoreWriter(directory / "store", "0" * 64, shape(name)["vocab_size"], kind) as writer:  # type: ignore[arg-type]
        for length in lengths:
            ids = generator.integers(4, shape(name)["vocab_size"], length).astype(np.uint32)
            ids[-1] = END
            writer.add(ids, None if kind == "documents" else np.ones(length, dtype=int))
    spec = {
        "name": "speed",
        "objective": objective,
        "data": {"sequence_length": window, "sources": [{"name": "random", "adapter": "text"}]},
        "train": {"steps": 10_000, "batch_tokens": tokens, "lr": 1e-4, "micro_batch_tokens": min(tokens, 2 * WINDOW)},
    }
    config = KeuralConfig(**shape(name, window), sliding_window=window, eos_token_id=END)
    job = StageJob(StageSpec.model_validate(spec), 0, config, None, directory / "store", None, "0" * 64, directory, "speed")
    with session() as ranks:
        return open_stage(job, ranks, StopSignals(), time.monotonic()).trainer


def our_step(name: str, directory: Path, document: int = DOCUMENT) -> Step:
    """One of ours, on rows of documents of that length."""
    trainer = stage(name, directory, [document] * (ROWS * LENGTH // document * 4), LENGTH, ROWS * LENGTH)
    steps = iter(range(10_000))
    return lambda: train_step(trainer, next(steps)).tokens


def our_packed_step(name: str, directory: Path) -> Step:
    """One of ours, on two rows into which sequences of the card's lengths are packed."""
    trainer = stage(name, directory, card_lengths(400), WINDOW, 2 * WINDOW, "sft")
    steps = iter(range(10_000))
    return lambda: train_step(trainer, next(steps)).tokens


def card_lengths(number: int) -> list[int]:
    """Evenly spaced quantiles of the card's lengths, cut to the window."""
    drawn = np.sort(draw(100_000, WIDTH))
    chosen = drawn[((np.arange(number) + 0.5) / number * len(drawn)).astype(int)]
    return [int(length) for length in np.minimum(chosen, WINDOW)]


def mixtral(name: str, experts: str, length: int) -> tuple[MixtralForCausalLM, torch.optim.AdamW]:
    """transformers' Mixtral of that shape, and its optimizer."""
    torch.manual_seed(0)
    config = MixtralConfig(**shape(name, length), tie_word_embeddings=True, output_router_logits=True, use_cache=False)
    config._experts_implementation = experts
    model = MixtralForCausalLM(config).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)


def mixtral_step(name: str, experts: str, document: int = DOCUMENT) -> Step:
    """One step of it on rows of the same size, packed alike."""
    model, optimizer = mixtral(name, experts, LENGTH)
    ids = torch.randint(4, model.config.vocab_size, (ROWS, LENGTH))
    positions = (torch.arange(LENGTH) % document).expand(ROWS, -1).contiguous()

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return ids.numel()

    return step


def padded_step(name: str, experts: str) -> Step:
    """One step of it on sequences of the card's lengths, each padded to the window, two at a time."""
    model, optimizer = mixtral(name, experts, WINDOW)
    lengths = torch.tensor(card_lengths(PADDED_ROWS))
    mask = (torch.arange(WINDOW) < lengths[:, None]).long()
    ids = torch.randint(4, model.config.vocab_size, mask.shape)
    labels = ids.masked_fill(mask == 0, -100)

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        for rows in torch.arange(PADDED_ROWS).split(2):
            loss = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
            (loss * 2 / PADDED_ROWS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return int(lengths.sum())

    return step


SERVER = """
import sys, time, tempfile, torch
from pathlib import Path
from benchmarks.training_speed import our_step
torch.set_num_threads(int(sys.argv[2]))
with tempfile.TemporaryDirectory() as directory:
    step = our_step(sys.argv[1], Path(directory))
    print("ready", flush=True)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.process_time()
        step()
        print(time.perf_counter() - clock, time.process_time() - processor, flush=True)
"""


@contextmanager
def earlier_step(checkout: Path, name: str, threads: int) -> Iterator[Callable[[], tuple[float, float]]]:
    """The step of an earlier commit, in a process of its own: seconds by the clock and of the processor."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}:{checkout}"}
    command = [sys.executable, "-c", SERVER, name, str(threads)]
    with subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = process.stdout
        while (line := lines.readline()).strip() != "ready":
            assert line, "the earlier commit's benchmark does not run here"

        def step() -> tuple[float, float]:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            clock, processor = map(float, lines.readline().split())
            return clock, processor

        yield step
        process.stdin.close()


def timed(step: Step) -> tuple[float, float]:
    """Tokens of a step per second by the clock, and per second of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    tokens = step()
    return tokens / (time.perf_counter() - clock), tokens / (time.process_time() - processor)


Speeds = list[tuple[float, float]]


def alternate(sides: Sequence[Callable[[], tuple[float, float]]], rounds: int) -> Speeds:
    """Medians of both speeds of each side; the first round is not counted."""
    found = [[side() for side in sides] for _ in range(rounds + 1)][1:]
    medians = []
    for column in zip(*found, strict=True):
        clock, processor = zip(*column, strict=True)
        medians.append((statistics.median(clock), statistics.median(processor)))
    return medians


def row(name: str, rows: str, ours: tuple[float, float], theirs: Speeds) -> str:
    """A line of a table: tokens per second, and ratios to the best of the others."""
    best = tuple(max(speed[k] for speed in theirs) for k in (0, 1))
    speeds = " | ".join(f"{speed[0]:,.0f}" for speed in (ours, *theirs))
    return f"| {name} | {rows} | {speeds} | {ours[0] / best[0]:.2f} | {ours[1] / best[1]:.2f} |"


def main() -> None:
    """Print one table row per shape and kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    columns = "ours, tokens/s | Mixtral eager | Mixtral grouped_mm | ratio to the better | by processor time"
    print(f"| shape | rows of 256 | {columns} |\n|---|---|---:|---:|---:|---:|---:|")
    better = {}
    for name in SHAPES:
        for document in (LENGTH, DOCUMENT):
            with tempfile.TemporaryDirectory() as directory:
                steps = [our_step(name, Path(directory), document), *(mixtral_step(name, kind, document) for kind in EXPERTS)]
                ours, *theirs = alternate([lambda step=step: timed(step) for step in steps], given.rounds)
            better[name] = EXPERTS[theirs.index(max(theirs))]
            print(row(name, "one document" if document == LENGTH else "four documents", ours, theirs), flush=True)
    columns = "ours packed, useful tokens/s | Mixtral padded to 4,096 | ratio | by processor time"
    print(f"\n| shape | lengths | {columns} |\n|---|---|---:|---:|---:|---:|")
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            steps = [our_packed_step(name, Path(directory)), padded_step(name, better[name])]
            ours, *theirs = alternate([lambda step=step: timed(step) for step in steps], max(1, given.rounds // 3))
        print(row(name, "of the card", ours, theirs), flush=True)
    if given.before is None:
        return
    columns = "now, tokens/s | before | ratio | by processor time"
    print(f"\n| shape | rows of 256 | {columns} |\n|---|---|---:|---:|---:|---:|")
    for name in SHAPES:
        with ExitStack() as stack:
            ours_step = our_step(name, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            before = stack.enter_context(earlier_step(given.before.resolve(), name, given.threads))

            def earlier(step: Callable[[], tuple[float, float]] = before) -> tuple[float, float]:
                clock, processor = step()
                return ROWS * LENGTH / clock, ROWS * LENGTH / processor

            ours, *theirs = alternate([lambda step=ours_step: timed(step), earlier], given.rounds)
        print(row(name, "four documents", ours, theirs), flush=True)


if __name__ == "__main__":
    main()
