"""What makes a small model learn: trials of the laptop recipe's pretraining, each with the same processor time, on held-out text.

    OMP_NUM_THREADS=1 python benchmarks/learning_sweep.py DATA [--out DIR] [--seconds 60] [--seeds 1 2] [--only NAME ...]

DATA is the data directory of the laptop recipe. A trial is one stage of next-token training with today's code, from random
weights, until one thread has worked `--seconds` (`time.process_time`: other work on the machine slows memory down, and changes
little else); the schedule is fitted to that time. Then bits per byte of the recipe's held-out texts are measured, at most `--bytes`
of each. A line per trial is kept in DIR/trials.jsonl, and what is there already is not run again; the table compares each trial
with the one that it changes, seed by seed.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keural.data.prepared import Prepared
from keural.evaluate.heldout_text import measured_texts
from keural.evaluate.measures import bits_per_byte
from keural.evaluate.packers import packed_bits_per_byte
from keural.model import KeuralConfig
from keural.pipeline.workspace import Workspace, build_config, prepare_all
from keural.recipe import Recipe, StageSpec, load_recipe
from keural.recipe.shipped import shipped
from keural.tokenizer import KeuralTokenizer
from keural.train.loop import train_step
from keural.train.objectives.registry import LOSSES
from keural.train.optimization.schedule import learning_rate
from keural.train.processes.ranks import Ranks
from keural.train.stage.building import policy_of, stream_of
from keural.train.stage.job import StageJob
from keural.train.trainer import Trainer

STAGE = "pretrain-1"
MOMENTS = 100_000
"""Into so many steps of a schedule the time is cut."""
WARMUP = 0.04
"""Share of the time in which the learning rate rises."""


@dataclass(frozen=True)
class Variant:
    """Settings of a trial: those of the variant that it changes, and its own."""

    changes: str | None
    settings: tuple[str, ...] = ()
    prepare: Callable[[torch.nn.Module], None] | None = None
    """What is done to the weights before the first step, where a recipe has no key for it."""
    without: tuple[str, ...] = ()
    """Names of sources that are not trained on; the tokenizer has seen them."""


def zero_outputs(model: torch.nn.Module) -> None:
    """Let every block add nothing at the start: output projections of attention and experts are zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()


def shape(hidden: int, layers: int, intermediate: int, heads: int, experts: int = 8) -> tuple[str, ...]:
    """Settings of a network with heads of 32."""
    return (
        f"model.hidden_size={hidden}", f"model.num_hidden_layers={layers}", f"model.intermediate_size={intermediate}",
        f"model.num_attention_heads={heads}", "model.num_key_value_heads=2", "model.head_dim=32",
        f"model.num_local_experts={experts}",
    )  # fmt: skip


def optimizer(name: str, lr: float, tokens: int, beta2: float) -> tuple[str, ...]:
    """Settings of a step."""
    return (f"train.optimizer={name}", f"train.lr={lr}", f"train.batch_tokens={tokens}", f"train.betas=[0.9, {beta2}]")


VARIANTS: dict[str, Variant] = {
    "before": Variant(None, (*shape(256, 6, 320, 8), *optimizer("adamw", 2e-3, 4096, 0.95), "train.min_lr=4e-4")),
    "small": Variant("before", (*shape(128, 4, 192, 4), *optimizer("adamw", 4e-3, 1024, 0.98), "train.min_lr=0.0")),
    "muon": Variant("small", optimizer("muon", 6e-3, 2048, 0.98)),
    "vocabulary 4,096": Variant("muon", ("tokenizer.vocab_size=4096",)),
    "vocabulary 16,384": Variant("muon", ("tokenizer.vocab_size=16384",)),
    "lr 1.2e-2": Variant("muon", ("train.lr=1.2e-2",)),
    "lr 2.4e-2": Variant("muon", ("train.lr=2.4e-2",)),
    "initial std 0.05": Variant("lr 1.2e-2", ("model.initializer_range=0.05",)),
    "zero outputs": Variant("lr 1.2e-2", (), zero_outputs),
    "batch 1,024": Variant("lr 1.2e-2", ("train.batch_tokens=1024",)),
    "batch 4,096": Variant("lr 1.2e-2", ("train.batch_tokens=4096",)),
    "3 iterations": Variant("lr 1.2e-2", ("train.muon.iterations=3",)),
    "rows of 128": Variant("lr 1.2e-2", ("data.sequence_length=128",)),
    "wide": Variant("muon", shape(192, 4, 256, 6)),
    "stable, decay": Variant("lr 1.2e-2", ("train.decay=linear", "train.decay_share=0.4")),
    "weight decay 0": Variant("lr 1.2e-2", ("train.weight_decay=0.0",)),
    "balance 0.01": Variant("lr 1.2e-2", ("router.balance_coef=0.01",)),
    "books and manuals alone": Variant("lr 1.2e-2", without=("en_reasoning", "en_wikipedia", "en_web")),
}
"""What is tried. The first is the recipe as it was, the second what was found in an earlier trial."""


def settings(name: str) -> tuple[str, ...]:
    """All settings of a variant, those of what it changes first."""
    variant = VARIANTS[name]
    return ((*settings(variant.changes), *variant.settings)) if variant.changes else variant.settings


def preparations(name: str) -> list[Callable[[torch.nn.Module], None]]:
    """What is done to the weights of a variant."""
    variant = VARIANTS[name]
    before = preparations(variant.changes) if variant.changes else []
    return [*before, variant.prepare] if variant.prepare else before


def trial(name: str, data: Path, out: Path, seed: int, seconds: float, most_bytes: int) -> dict[str, Any]:
    """Train a variant for so long and measure it."""
    own = (f"{STAGE}.{key}" if key.startswith(("train.", "data.", "router.")) else key for key in settings(name))
    recipe = load_recipe(shipped("laptop"), (f"data={data}", *own))
    stage = without_sources(recipe.stage(STAGE), VARIANTS[name].without)
    recipe = dataclasses.replace(recipe, stages=(stage, *recipe.stages[1:]))
    workspace = prepare_all(recipe, [stage], out / f"vocabulary-{recipe.spec.tokenizer.vocab_size}")
    prepared = workspace.data[STAGE]
    trainer = trainer_of(stage, prepared, build_config(workspace.recipe, workspace.tokenizer), workspace.tokenizer, out, seed)
    for prepare in preparations(name):
        prepare(trainer.policy.model)
    tokens, steps = train_for(trainer, stage, seconds)
    trainer.policy.eval()
    parameters = sum(parameter.numel() for parameter in trainer.policy.model.parameters())
    found = {"parameters": parameters, "steps": steps, "tokens": tokens}
    return {
        "variant": name,
        "seed": seed,
        "seconds": seconds,
        **found,
        **measured(recipe, workspace, trainer, prepared, most_bytes),
    }


def without_sources(stage: StageSpec, names: Sequence[str]) -> StageSpec:
    """The stage without some of its sources."""
    sources = [source for source in stage.data.sources if source.name not in names]
    return stage.model_copy(update={"data": stage.data.model_copy(update={"sources": sources})})


def trainer_of(
    stage: StageSpec,
    prepared: Prepared,
    config: KeuralConfig,
    tokenizer: KeuralTokenizer,
    out: Path,
    seed: int,
    init: Path | None = None,
) -> Trainer:
    """What the steps of a stage work on, as the trainer makes it, with the weights of `init` or random ones; its rate is set by
    `train_for`.
    """
    job = StageJob(
        stage=stage, seed=seed, model_config=config, init=init, train_store=prepared.corpus, heldout_store=None,
        tokenizer_sha=tokenizer.sha256, run_dir=out, fingerprint="",
    )  # fmt: skip
    ranks, objective = Ranks(0, 1, torch.device("cpu")), LOSSES[stage.objective](stage)
    policy, optimizer, _ = policy_of(job, objective.uniform, ranks)
    return Trainer(
        stage, policy, optimizer, objective, stream_of(job, prepared.corpus, ranks), ranks, learning_rate=lambda step: 0.0
    )


def train_for(trainer: Trainer, stage: StageSpec, seconds: float) -> tuple[int, int]:
    """Train until this thread has worked so long; tokens and steps."""
    spec, used, tokens, steps, started = stage.train, 0.0, 0, 0, time.process_time()

    def rate(step: int) -> float:
        moment = int(min(used / seconds, 1 - 1 / MOMENTS) * MOMENTS)
        warmup = int(WARMUP * MOMENTS)
        return max(
            learning_rate(
                moment, steps=MOMENTS, peak=spec.lr, minimum=spec.min_lr, warmup_steps=warmup, decay=spec.decay,
                decay_share=spec.decay_share,
            ), spec.lr / 50,
        )  # fmt: skip

    object.__setattr__(trainer, "learning_rate", rate)
    while used < seconds:
        tokens, steps = tokens + train_step(trainer, steps).tokens, steps + 1
        used = time.process_time() - started
    return tokens, steps


def measured(recipe: Recipe, workspace: Workspace, trainer: Trainer, prepared: Prepared, most_bytes: int) -> dict[str, Any]:
    """Bits per byte of every held-out text of the recipe, read without overlap, and of `xz -9`."""
    model, length, found = trainer.policy.model, recipe.stage(STAGE).data.sequence_length, {}
    for spec in recipe.spec.evaluation.bits_per_byte:
        if spec.overlap:
            continue
        texts = cut(measured_texts(spec, prepared), most_bytes)
        found[spec.name] = bits_per_byte(model, workspace.tokenizer, texts, length)["bits_per_byte"]
        found[f"xz, {spec.name}"] = packed_bits_per_byte(texts)["xz_9"]
    return {"measures": found}


def cut(texts: Sequence[str], most: int) -> list[str]:
    """The first so many bytes of texts."""
    kept: list[str] = []
    for text in texts:
        data = text.encode()
        kept.append(data[:most].decode(errors="ignore"))
        most -= len(data)
        if most <= 0:
            break
    return kept


def table(lines: list[dict[str, Any]], measures: list[str]) -> list[str]:
    """A row per variant: means over its seeds, and against what it changes the mean of differences and their standard error."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(line["variant"], {})[line["seed"]] = line
    head = ["trial", "changes", "parameters", "steps", "tokens", "seeds", *measures, "against it"]
    rows = [head, ["---"] * len(head)]
    for name, runs in by_name.items():
        base = VARIANTS[name].changes or ""
        mean = {key: statistics.fmean(run[key] for run in runs.values()) for key in ("parameters", "steps", "tokens")}
        values = [statistics.fmean(run["measures"][measure] for run in runs.values()) for measure in measures]
        against = "; ".join(difference(runs, by_name.get(base, {}), measure) for measure in measures)
        cells = [f"{mean['parameters'] / 1e6:.2f}M", f"{mean['steps']:.0f}", f"{mean['tokens']:,.0f}", f"{len(runs)}"]
        rows.append([name, base, *cells, *(f"{value:.3f}" for value in values), against if base else ""])
    return [f"| {' | '.join(row)} |" for row in rows]


def difference(runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], measure: str) -> str:
    """In per cent, over the seeds that both have, with the standard error of the mean where there are several."""
    both = sorted(runs.keys() & base.keys())
    found = [100 * (runs[seed]["measures"][measure] / base[seed]["measures"][measure] - 1) for seed in both]
    if not found:
        return "–"
    error = f" ± {statistics.stdev(found) / len(found) ** 0.5:.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.1f}%{error}"


def parser_of(
    description: str | None, variants: Sequence[str], out: str, seconds: float, most_bytes: int
) -> argparse.ArgumentParser:
    """The command line of a sweep, after what its trials are made from; with its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seconds", type=float, default=seconds, help="of processor time for each trial")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    known, said = list(variants), "names of variants, in this order; none: the table alone"
    parser.add_argument("--only", nargs="*", default=known, choices=known, metavar="NAME", help=said)
    parser.add_argument("--bytes", type=int, default=most_bytes, help="of each held-out text")
    return parser


def run_trials(arguments: argparse.Namespace, run: Callable[[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials that are asked for, by `run` of a variant and a seed, after those that `--out` has; on one thread."""
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "trials.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(line["variant"], line["seed"], line["seconds"]) for line in lines}
    for name in arguments.only:
        for seed in arguments.seeds:
            if (name, seed, arguments.seconds) in done:
                continue
            line = run(name, seed)
            with kept.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.append(line)
            print(json.dumps(line, ensure_ascii=False), flush=True)
    return lines


def main() -> None:
    """Run the trials that are asked for and print the table of all that there are."""
    arguments = parser_of(__doc__, list(VARIANTS), "runs/learning-sweep", 60.0, 30_000).parse_args()

    def run(name: str, seed: int) -> dict[str, Any]:
        return trial(name, arguments.data, arguments.out, seed, arguments.seconds, arguments.bytes)

    lines = [line for line in run_trials(arguments, run) if line["seconds"] == arguments.seconds]
    measures = [name for name in lines[0]["measures"] if not name.startswith("xz, ")] if lines else []
    print("\n".join(table(lines, measures)))


if __name__ == "__main__":
    main()
