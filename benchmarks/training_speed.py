"""Tokens per second of one training step, beside transformers' Mixtral of the same shape in the same run.

    python benchmarks/training_speed.py [--threads 2] [--rounds 7]

Both sides: forward, cross-entropy, router balance loss, backward, AdamW, float32, rows packed alike. Ours is the stage's own step
(`train_step`: chunked log-probabilities, z-loss and metrics included). Mixtral runs with each experts implementation that is usable
on a CPU; the better one is the peer. Rounds alternate between the sides, and medians are compared, so that a noisy machine hits
both alike. FLOPs are not counted; only the ratio is claimed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from keural.data.tokens.store import StoreWriter
from keural.model import KeuralConfig
from keural.recipe import StageSpec
from keural.train.loop import train_step
from keural.train.processes.ranks import session
from keural.train.stage.job import StageJob
from keural.train.stage.signals import StopSignals
from keural.train.stage.training import open_stage

SHAPES = {
    "toy": {"vocab_size": 902, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_local_experts": 4},
    "laptop": {"vocab_size": 8194, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 6, "num_local_experts": 8},
}
ROWS, LENGTH, DOCUMENT = 16, 256, 64


def shape(name: str) -> dict[str, int]:
    """The configuration both models share."""
    heads = SHAPES[name]["hidden_size"] // 32
    common = {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 32, "max_position_embeddings": LENGTH}
    return SHAPES[name] | common


def our_step(name: str, directory: Path) -> Callable[[], None]:
    """A function that does one optimizer step of a stage."""
    generator = np.random.default_rng(0)
    writer = StoreWriter(directory / "store", "0" * 64, shape(name)["vocab_size"], "documents")
    for _ in range(ROWS * LENGTH // DOCUMENT * 4):
        writer.add(generator.integers(4, shape(name)["vocab_size"], DOCUMENT).astype(np.uint32), None)
    writer.close()
    spec = {
        "name": "speed",
        "objective": "next_token",
        "data": {"sequence_length": LENGTH, "sources": [{"name": "random", "adapter": "text"}]},
        "train": {"steps": 10_000, "batch_tokens": ROWS * LENGTH, "lr": 1e-4},
    }
    config = KeuralConfig(**shape(name), sliding_window=LENGTH, eos_token_id=2)
    job = StageJob(StageSpec.model_validate(spec), 0, config, None, directory / "store", None, "0" * 64, directory, "speed")
    with session() as ranks:
        run = open_stage(job, ranks, StopSignals(), time.monotonic())
    steps = iter(range(10_000))
    return lambda: void(train_step(run.trainer, next(steps)))


def mixtral_step(name: str, experts: str) -> Callable[[], None]:
    """One step of transformers' Mixtral on rows of the same size, packed alike."""
    torch.manual_seed(0)
    config = MixtralConfig(**shape(name), tie_word_embeddings=True, output_router_logits=True, use_cache=False)
    config._experts_implementation = experts
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(4, config.vocab_size, (ROWS, LENGTH))
    positions = (torch.arange(LENGTH) % DOCUMENT).expand(ROWS, -1).contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def void(_: object) -> None:
    """Drop a result."""


def seconds(function: Callable[[], None]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Print one table row per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| shape | ours, tokens/s | Mixtral eager | Mixtral grouped_mm | ratio to the better |\n|---|---|---|---|---|")
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            sides = [our_step(name, Path(directory)), mixtral_step(name, "eager"), mixtral_step(name, "grouped_mm")]
            times: list[list[float]] = [[seconds(side) for side in sides] for _ in range(arguments.rounds + 1)][1:]
        ours, eager, grouped = (ROWS * LENGTH / statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {ours:,.0f} | {eager:,.0f} | {grouped:,.0f} | {ours / max(eager, grouped):.2f} |", flush=True)


if __name__ == "__main__":
    main()
