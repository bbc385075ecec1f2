"""Preference pairs per second, packed and padded, in the same run; and how many positions of packed rows hold a token.

    python benchmarks/pair_packing.py --data DIR [--seconds 240] [--out pair_packing.json]

DIR holds the sets of the recipe `laptop` (`keural data fetch laptop DIR`); without it lengths are drawn as real pairs have them.
A step is the same pairs for every side, forward, loss, backward and AdamW, by a model of 14.9M parameters (what `laptop` was until
2026-11-27), float32, random weights:

- packed: as a stage does it, in one row, and in rows of at most 4,096 tokens;
- padded 32, padded 2: a row for each side, 64 or 4 of them padded to the longest, gradients added up; TRL batches pairs like that.
  Losses, head and attention are ours here, too, and a padded row needs no mask for its causal attention, so what is compared is
  packing alone.

Rounds alternate between the sides; medians are compared, so that a noisy machine hits all alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keural.data.loading.epoch_order import EpochOrder
from keural.data.loading.packing import pack
from keural.data.loading.row_layout import RowShape, lay_out
from keural.data.loading.stream import Stream
from keural.data.prepare import prepare
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pipeline.workspace import prepare_tokenizer
from keural.recipe import StageSpec, load_recipe
from keural.recipe.shipped import recipe_directory
from keural.train.gradients import Totals, forward_backward
from keural.train.loop import train_step
from keural.train.micro_batches import MicroBatch, PairIndices
from keural.train.network.policy import Policy
from keural.train.objectives.registry import LOSSES
from keural.train.optimization.optimizer import build_optimizer, gradient_norm, take_step
from keural.train.processes.ranks import Ranks
from keural.train.stage.step_plan import no_learning, no_references
from keural.train.trainer import Trainer

CPU = Ranks(0, 1, torch.device("cpu"))
PAIRS, LENGTH = 32, 512
SETS: list[dict[str, Any]] = [
    {"name": "hh_rlhf", "adapter": "hh_rlhf", "path": "pref_hh_rlhf/harmless-base/test.jsonl.gz", "language": "en"},
    {"name": "polite", "adapter": "preference", "path": "pref_rasbt_1100", "language": "en"},
]
LAPTOP = {
    "vocab_size": 8194, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 129,
    "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = LAPTOP | {
    "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
CARD_MEAN, CARD_LONGEST, CARD_WINDOW = 621, 8192, 4096


def real_pairs(data: Path, out: Path) -> TokenStore:
    """The pairs of the laptop recipe's last stage, long ones too, by a tokenizer trained on a part of its prose."""
    overrides = ["tokenizer.max_bytes=2000000", "tokenizer.vocab_size=8192", f"dpo-2.data.sources={json.dumps(SETS)}"]
    recipe = load_recipe(recipe_directory(Path("laptop")), [f"data={data}", *overrides])
    tokenizer = prepare_tokenizer(recipe, out)
    found = prepare(recipe.stage("dpo-2").data, "dpo", data, tokenizer, out / "data", seed=0)
    return TokenStore.open(found.corpus.paths[0])


def drawn_pairs(out: Path, number: int, vocabulary: int) -> TokenStore:
    """Random tokens of lengths as real pairs have them: 144 a side in the mean, the median 96, a tenth above 322."""
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(4.6, 0.88, (number, 2)).astype(int).clip(12, LENGTH)
    with StoreWriter(out / "drawn", "0" * 64, vocabulary, "pairs") as writer:
        for sides in lengths:
            prompt = draw.integers(4, vocabulary, min(sides) // 2)
            for side in sides:
                answer = draw.integers(4, vocabulary, side - len(prompt))
                writer.add(np.concatenate([prompt, answer]), [0] * len(prompt) + [1] * len(answer))
    return TokenStore.open(out / "drawn")


def make_trainer(store: TokenStore, shape: dict[str, int], pairs: int, rows: RowShape) -> Trainer:
    """A stage of DPO that learns nothing: its references are zero, its learning rate is, too."""
    spec = {
        "name": "speed", "objective": "dpo", "init_from": "x/y", "router": {"load": "lagged"},
        "data": {"sequence_length": LENGTH, "sources": [{"name": "none", "adapter": "preference"}]},
        "train": {"steps": 10_000, "batch_pairs": pairs, "lr": 1e-4},
    }  # fmt: skip
    stage = StageSpec.model_validate(spec)
    torch.manual_seed(0)
    model = KeuralMoECausalLM(KeuralConfig(**shape))
    model.config._experts_implementation = "eager"
    policy = Policy(model, torch.float32, by_documents=True).train()
    stream = Stream(store, "dpo", LENGTH, batch_pairs=pairs, pair_rows=rows)
    objective, optimizer = LOSSES["dpo"](stage), build_optimizer(model, stage.train)
    return Trainer(stage, policy, optimizer, objective, stream, CPU, no_learning, no_references(CPU.device))


def padded(store: TokenStore, pairs: Sequence[int]) -> MicroBatch:
    """A row for each side of these pairs, padded to the longest; a pair's sides follow each other, which costs the head less."""
    sides = [2 * pair + side for pair in pairs for side in (0, 1)]
    length = max(len(store.sequence(side)) for side in sides)
    ids, labels = np.zeros((len(sides), length), np.int64), np.full((len(sides), length), -100, np.int64)
    mask, positions, numbers = np.zeros((len(sides), length), bool), [], []
    for row, side in enumerate(sides):
        tokens, trained = store.sequence(side).astype(np.int64), store.loss_mask(side) > 0
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        labels[row, : len(tokens) - 1] = np.where(trained[1:], tokens[1:], -100)
        positions.append(row * length + np.arange(len(tokens)))
        numbers.append(np.full(len(tokens), row // 2 + row % 2 * len(pairs)))
    places = np.tile(np.arange(length), (len(sides), 1))
    indices = PairIndices(
        np.array(sides).reshape(-1, 2).T, torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(numbers))
    )
    tensors = [torch.from_numpy(array) for array in (ids, places, labels, mask)]
    return MicroBatch(*tensors, positions=places, pairs=indices)


def totals_of(micros: Sequence[MicroBatch], pairs: int) -> Totals:
    """What the losses of a step of so many pairs are divided by."""
    tokens, positions = (sum(int(numbers) for numbers in found) for found in zip(*map(_sizes, micros), strict=True))
    return Totals(denominator=pairs, tokens=tokens, positions=positions, forwards=len(micros))


def _sizes(micro: MicroBatch) -> tuple[int, int]:
    return int(micro.token_mask.sum()), micro.token_mask.numel()


def padded_step(trainer: Trainer, step: int, together: int) -> None:
    """What `train_step` does, with the step's pairs padded, `together` of them in a forward pass."""
    store, pairs = trainer.stream.store, (trainer.stream.batch(step).pair_sequences[0] // 2).tolist()
    assert isinstance(store, TokenStore)
    pairs = np.random.default_rng(step).permutation(pairs).tolist()  # rows have them by length
    trainer.optimizer.zero_grad(set_to_none=True)
    micros = [padded(store, pairs[start : start + together]) for start in range(0, len(pairs), together)]
    totals = totals_of(micros, len(pairs))
    for micro in micros:
        forward_backward(trainer, micro, totals, trainer.previous_load())
    parameters = list(trainer.policy.parameters())
    take_step(trainer.optimizer, parameters, 0.0, gradient_norm(parameters), 1.0)


def speeds(store: TokenStore, shape: dict[str, int], pairs: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Medians over rounds, at least `rounds`, until `seconds` are over."""
    whole, limited = (make_trainer(store, shape, pairs, rows) for rows in (RowShape(None), RowShape(4096)))
    sides: dict[str, Callable[[int], object]] = {
        "packed": lambda step: train_step(whole, step),
        "packed_4096": lambda step: train_step(limited, step),
        f"padded_{pairs}": lambda step: padded_step(whole, step, pairs),
        "padded_2": lambda step: padded_step(whole, step, 2),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    tokens: list[int] = []
    started, step = time.perf_counter(), 0
    while len(tokens) < rounds or time.perf_counter() - started < seconds:
        for name, run in sides.items():
            begun = time.perf_counter()
            run(step)
            times[name].append(time.perf_counter() - begun)
        tokens.append(whole.stream.batch(step).num_tokens)
        step += 1
    first = 1 if len(tokens) > rounds else 0  # the first round warms up
    found: dict[str, Any] = {"rounds": len(tokens) - first, "parameters": sum(p.numel() for p in whole.policy.model.parameters())}
    for name, values in times.items():
        found[name] = {
            "pairs_per_second": pairs / statistics.median(values[first:]),
            "tokens_per_second": statistics.median(t / value for t, value in zip(tokens[first:], values[first:], strict=True)),
        }
    for name in sides:
        ratios = [other / own for other, own in zip(times[name][first:], times["packed"][first:], strict=True)]
        found[name]["packed_is_faster_by"] = statistics.median(ratios)
    return found


def padded_share(lengths: NDArray[np.int64], order: EpochOrder, together: int) -> float:
    """Real tokens per position when sides ``[pairs, 2]`` are padded, so many pairs together."""
    tokens = positions = 0
    for step in range(order.number // order.size):
        chosen = np.random.default_rng(step).permutation(order.step(step))
        for start in range(0, len(chosen), together):
            sides = lengths[chosen[start : start + together]]
            tokens, positions = tokens + int(sides.sum()), positions + int(sides.max()) * sides.size
    return tokens / positions


def shares(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Real tokens per position of pairs whose sides are so long ``[pairs, 2]``, for several steps and ranks."""
    found, both = {}, lengths.sum(1)
    for size in (8, 32, 64):
        order = EpochOrder(len(both), size, 0, both)
        for ranks, shape in ((1, RowShape(None)), (1, RowShape(4096)), (2, RowShape(None)), (4, RowShape(None))):
            tokens = positions = 0
            for step in range(len(both) // size):
                chosen = both[order.step(step)].tolist()
                rows, length = lay_out(chosen, ranks, shape)
                tokens, positions = tokens + sum(chosen), positions + len(rows) * length
            name = f"{size} pairs, {ranks} rank{'s' if ranks > 1 else ''}{'' if shape.limit is None else ', rows of 4,096 at most'}"
            found[name] = tokens / positions
        found[f"{size} pairs, padded"] = padded_share(lengths, order, size)
    return found


def card_lengths(samples: int) -> NDArray[np.int64]:
    """Conversations as the card describes them: 621 tokens in the mean, 8,192 at most; the width between is an assumption."""
    drawn = np.random.default_rng(0).lognormal(np.log(CARD_MEAN) - 0.5, 1.0, samples)
    return np.minimum(np.clip(drawn, 8, CARD_LONGEST), CARD_WINDOW).astype(np.int64)


def main() -> None:
    """Print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="a tiny model on drawn lengths, one round: a test of this file")
    arguments = parser.parse_args()
    shape, pairs = (SMALL, 8) if arguments.small else (LAPTOP, PAIRS)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        if arguments.data is not None:
            store = real_pairs(arguments.data, out / "run")
        else:
            store = drawn_pairs(out, 100 if arguments.small else 3161, shape["vocab_size"])
        lengths = store.lengths().reshape(-1, 2)
        conversations = card_lengths(2_000 if arguments.small else 100_000)
        found: dict[str, Any] = {
            "pairs": {"number": len(lengths), "mean_side": float(lengths.mean()), "drawn": arguments.data is None},
            "real_tokens_per_position": {
                **shares(lengths),
                "conversations of the card, rows of 4,096": float(conversations.sum())
                / (len(pack(conversations, CARD_WINDOW)) * CARD_WINDOW),
            },
        }
        print(json.dumps(found, indent=1), flush=True)
        shape = shape | {"vocab_size": max(shape["vocab_size"], store.vocab_size)}
        found["speed"] = speeds(store, shape, pairs, 0.0 if arguments.small else arguments.seconds, 1 if arguments.small else 3)
        found["threads"] = torch.get_num_threads()
    print(json.dumps(found["speed"], indent=1), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
