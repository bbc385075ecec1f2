"""What the stages after pretraining cost and teach: trials of the laptop recipe's SFT stages, one after the other, at equal tokens.

    OMP_NUM_THREADS=1 python benchmarks/stages_sweep.py DATA RUN [--out DIR] [--tokens 128000] [--start DIR] [--only NAME ...]

DATA is the data directory of the laptop recipe, RUN a run of it whose pretraining is finished: every trial starts from its
`pretrain-2` and trains a stage for every number of `--tokens`, each from where the one before it ends. A variant has one setting of
everything; the rates of several stages are given one by one. Measured before the first and after every stage are bits per byte of
RUN's held-out texts, the loss on held-out answers of all sources (at most `MOST` of each, always the same) with the standard error
of its change over conversations, each against itself, and greedy answers to the recipe's sample prompts, all of them. A line per
trial is kept in DIR/trials.jsonl, and what is there already is not run again.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.learning_sweep import trainer_of
from benchmarks.speaking_sweep import bits
from keural.data.loading.mixture import Mixture, SequenceRange, mix
from keural.data.loading.stream import Stream
from keural.data.prepare import prepare
from keural.data.tokens.store import TokenStore
from keural.evaluate.scorecard import sample_answers
from keural.pipeline.workspace import build_config
from keural.recipe import MixingSpec, Recipe, StageSpec, load_recipe
from keural.recipe.shipped import shipped
from keural.tokenizer import KeuralTokenizer
from keural.train.loop import train_step
from keural.train.micro_batches import micro_batches
from keural.train.optimization.schedule import learning_rate
from keural.train.stage.heldout import heldout_batches, sources_of
from keural.train.trainer import Trainer

PRETRAINED, STAGE = "pretrain-2", "sft-3"
"""Where trials start, and the stage whose sources they know: the last one has all of them."""
HELD_OUT, MOST = 30, 40
"""Per mille of every source, and of these so many conversations."""
Losses = dict[str, NDArray[np.float64]]
"""By source, ``[conversations, 2]``: the sum of the loss over its labels, and how many these are."""


@dataclass(frozen=True)
class Variant:
    """What a trial changes of another one: settings of the stage, and the weights of its sources."""

    changes: str | None
    settings: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    """Where the learning rate of each stage begins, and where that of the last one ends."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of sources by name; 0: the source is left out."""
    of_stages: tuple[dict[str, float], ...] = ()
    """Weights of a stage alone, by its place."""


PASSAGES = {
    "ko_petitions_again": 0.3, "ko_python_docs_again": 0.15, "ko_rust_book_again": 0.15, "en_novels_again": 0.3,
    "en_rust_book_again": 0.15, "en_reasoning_again": 0.2, "en_wikipedia_again": 0.15,
}  # fmt: skip
"""What weights the passages of pretraining's texts had."""
VARIANTS: dict[str, Variant] = {
    "before": Variant(
        None,
        ("train.optimizer=muon", "train.warmup_steps=5"),
        rates=(2e-3, 0.0),
        weights={"en_about": 0.0, "en_what": 0.0, "ko_sae4k": 0.0, **PASSAGES},
    ),
    "english": Variant("before", weights={"en_about": 0.4, "en_what": 0.4}),
    "english, 1e-3": Variant("english", rates=(1e-3, 0.0)),
    "english, 5e-4": Variant("english", rates=(5e-4, 0.0)),
    "english, adamw 1e-3": Variant("english, 1e-3", ("train.optimizer=adamw",)),
    "adamw, passages doubled": Variant("english, adamw 1e-3", weights={name: 2 * weight for name, weight in PASSAGES.items()}),
    "three stages": Variant(
        "adamw, passages doubled",
        rates=(1e-3, 7e-4, 4e-4, 0.0),
        weights={"ko_rust_book_again": 0.4},
        of_stages=({}, {}, {"ko_sae4k": 0.4}),
    ),
    "second stage, gentler": Variant(
        "three stages", ("train.warmup_steps=10",), rates=(5e-4, 3e-4), weights={"ko_rust_book_again": 0.5}, of_stages=({},)
    ),
}
"""What is tried."""


def lineage(name: str) -> list[Variant]:
    """A variant after all that it changes."""
    variant = VARIANTS[name]
    return [*(lineage(variant.changes) if variant.changes else []), variant]


def stage_of(variants: Sequence[Variant], data: Path) -> tuple[Recipe, StageSpec]:
    """The recipe with the settings of variants, and its stage; all sources have a weight."""
    settings = [f"{STAGE}.{each}" for variant in variants for each in variant.settings]
    recipe = load_recipe(shipped("laptop"), (f"data={data}", *settings))
    stage = recipe.stage(STAGE)
    return recipe, stage.model_copy(update={"data": stage.data.model_copy(update={"heldout_per_mille": HELD_OUT})})


def mixture_of(stage: StageSpec, variants: Sequence[Variant], store: TokenStore, place: int) -> Mixture:
    """The sources by their weights, without those that a variant leaves out."""
    weights = {source.name: source.weight or 1.0 for source in stage.data.sources}
    for variant in variants:
        weights |= variant.weights | (variant.of_stages[place] if variant.of_stages else {})
    spec = MixingSpec(max_repeat=16.0)
    return mix(store, {name: weight for name, weight in weights.items() if weight}, spec)


def trial(
    name: str, data: Path, run: Path, start: Path, out: Path, seed: int, tokens: Sequence[int], most_bytes: int
) -> dict[str, Any]:
    """Train the stages of a variant one after the other and measure each."""
    variants = lineage(name)
    recipe, stage = stage_of(variants, data)
    rates = next(variant.rates for variant in reversed(variants) if variant.rates)
    assert len(rates) == len(tokens) + 1, "a rate where each stage begins, and one where the last ends"
    tokenizer, weights = KeuralTokenizer.load(run / "tokenizer"), start
    prepared = prepare(stage.data, stage.objective, data, tokenizer, out / "data", recipe.spec.seed)
    assert prepared.heldout is not None
    config = build_config(recipe, tokenizer)
    store = prepared.corpus.open(tokenizer.sha256, config.vocab_size)
    assert isinstance(store, TokenStore)
    line: dict[str, Any] = {"variant": name, "seed": seed, "tokens": list(tokens), "stages": []}
    previous: Losses = {}
    for place, most in enumerate(tokens):
        train = stage.train.model_copy(update={"lr": rates[place], "min_lr": rates[place + 1]})
        own = stage.model_copy(update={"train": train})
        mixed = dataclasses.replace(prepared, mixture=mixture_of(stage, variants, store, place))
        trainer = trainer_of(own, mixed, config, tokenizer, run, seed + place, weights)
        held = some_of(TokenStore.open(prepared.heldout), own)
        if not place:
            previous = losses(trainer, held)
            line["before"] = {"bits": bits(recipe, trainer, tokenizer, run, most_bytes)}
        train_tokens(trainer, own, most)
        trainer.policy.eval()
        found = losses(trainer, held)
        answers = sample_answers(recipe, trainer.policy.model, tokenizer)
        measured = {"bits": bits(recipe, trainer, tokenizer, run, most_bytes), "losses": changes(previous, found)}
        line["stages"].append({**measured, "samples": {each["prompt"]: each["answer"] for each in answers}})
        weights, previous = out / name.replace(" ", "-").replace(",", "") / str(place), found
        trainer.policy.model.save_pretrained(weights)
    return line


def some_of(store: TokenStore, stage: StageSpec) -> Stream:
    """The first conversations of each section, which lie in an order of their own: a fixed random choice."""
    ranges = []
    for first, stop in store.sections.values():
        end = min(stop, first + MOST)
        ranges.append(SequenceRange(first, end, store.extent(first)[0], store.extent(end - 1)[1]))
    return Stream(store, "sft", stage.data.sequence_length, 8, mixture=Mixture(tuple(ranges), {}))


def train_tokens(trainer: Trainer, stage: StageSpec, most: int) -> None:
    """Train on so many tokens, with the stage's schedule over as many steps as these are."""
    spec = stage.train
    assert spec.batch_tokens
    steps = round(most / spec.batch_tokens)

    def rate(step: int) -> float:
        return learning_rate(
            step, steps=steps, peak=spec.lr, minimum=spec.min_lr, warmup_steps=spec.warmup_steps, decay=spec.decay,
            decay_share=spec.decay_share,
        )  # fmt: skip

    object.__setattr__(trainer, "learning_rate", rate)
    trainer.policy.train()
    for step in range(steps):
        train_step(trainer, step)


@torch.no_grad()
def losses(trainer: Trainer, held: Stream) -> Losses:
    """The loss of every conversation of a held-out store, by source."""
    trainer.policy.eval()
    sources = sources_of(held)
    assert sources is not None
    sums = np.zeros((int(sources.stops[-1]), 2))
    for batch in heldout_batches(trainer.stage, held, trainer.ranks):
        for micro in micro_batches(batch, None, trainer.ranks.device):
            logprobs = trainer.policy(micro).logprobs.double().numpy()
            known = batch.labels >= 0
            np.add.at(sums, batch.sequence_ids[known], np.stack([-logprobs[known], np.ones(known.sum())], 1))
    starts = [0, *sources.stops[:-1]]
    parts = zip(sources.names, starts, sources.stops, strict=True)
    return {name: found[found[:, 1] > 0] for name, start, stop in parts for found in [sums[start:stop]]}


def changes(before: Losses, after: Losses) -> dict[str, dict[str, float]]:
    """Mean loss per label before and after, and the standard error of the difference over conversations."""
    found = {}
    for name, first in before.items():
        second, labels = after[name], first[:, 1].sum()
        difference = (second[:, 0] - first[:, 0]).sum() / labels
        rest = second[:, 0] - first[:, 0] - difference * first[:, 1]
        error = float(np.sqrt((rest**2).sum() * len(first) / max(len(first) - 1, 1)) / labels)
        found[name] = {
            "before": float(first[:, 0].sum() / labels), "after": float(second[:, 0].sum() / labels), "error": error,
            "conversations": len(first), "labels": int(labels),
        }  # fmt: skip
    return found


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A column for every stage of every trial: bits per byte, change of the loss of every source; below it all answers."""
    stages = [(f"{line['variant']} {place}", line, stage) for line in lines for place, stage in enumerate(line["stages"], start=1)]
    rows = [["", "before", *(name for name, _, _ in stages)], ["---"] * (len(stages) + 2)]
    before = lines[0]["before"]["bits"]
    for name, value in before.items():
        figures = (f"{stage['bits'][name]:.3f} ({stage['bits'][name] - value:+.3f})" for _, _, stage in stages)
        rows.append([f"bits, {name}", f"{value:.3f}", *figures])
    for name, first in lines[0]["stages"][0]["losses"].items():
        found = [stage["losses"][name] for _, _, stage in stages]
        changed = (f"{each['after']:.3f} ({each['after'] - each['before']:+.3f} ± {each['error']:.3f})" for each in found)
        rows.append([f"{name} ({first['conversations']})", f"{first['before']:.3f}", *changed])
    shown = [f"| {' | '.join(row)} |" for row in rows]
    for name, _, stage in stages:
        answers = "; ".join(f"{prompt} → {answer!r}" for prompt, answer in stage["samples"].items())
        shown.append(f"\n**{name}**: {answers}")
    return shown


def main() -> None:
    """Run the trials that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/stages-sweep"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[128_000], help="of each stage")
    parser.add_argument("--start", type=Path, help="weights to start from instead, for trials of a later stage alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    parser.add_argument("--bytes", type=int, default=15_000, help="of each held-out text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "trials.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for name in arguments.only:
        if any((line["variant"], line["seed"], line["tokens"]) == (name, arguments.seed, arguments.tokens) for line in lines):
            continue
        start = arguments.start or arguments.run / PRETRAINED / "model"
        own = (arguments.out, arguments.seed, arguments.tokens, arguments.bytes)
        line = trial(name, arguments.data, arguments.run, start, *own)
        with kept.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        lines.append(line)
        print(json.dumps(line, ensure_ascii=False), flush=True)
    if lines:
        print("\n".join(table(lines)))


if __name__ == "__main__":
    main()
