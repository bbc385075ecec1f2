"""The routers in alignment: losses as in pretraining, none, or the routers frozen; SFT and DPO from one model, side by side.

    python benchmarks/router_arms.py [--data DIR] [--seeds 1 2 3] [--arms NAME ...] [--out DIR] [--small]

For each seed a recipe is pretrained once; then each arm runs SFT and DPO from that very model, on the same data in the same
order. Without `--data` it is the toy recipe, and a seed trains about twice as much as that does up to its first DPO stage. With
`--data`, the data directory of the laptop recipe, it is that one with a few steps of each stage: real conversations and pairs,
half a minute of a core for each arm and seed. `--small` tries the script, not the arms. With `--out` finished parts are not run
again.

Printed for each arm and seed, then as means and standard deviations over the seeds: held-out loss after SFT; held-out DPO loss and
the share of pairs ranked right; the balance loss (1 is even) over the last ten steps of both stages. Of the toy world also the
share of held-out tasks answered right after SFT and after DPO, and of pairs whose better answer is the more probable; of real data
bits per byte of held-out text after DPO, which says what alignment cost.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keural.evaluate.heldout_text import measured_texts
from keural.evaluate.measures import bits_per_byte
from keural.files import read_object
from keural.pipeline.run import run
from keural.pipeline.run_directory import SUMMARY
from keural.pipeline.workspace import find_stage_data
from keural.pretrained.stored_model import load_model
from keural.recipe import EvaluationSpec, Recipe, RouterSpec, load_recipe
from keural.recipe.shipped import shipped
from keural.tokenizer import KeuralTokenizer
from keural.train.stage.metrics import read_metrics

ARMS: dict[str, Callable[[RouterSpec], RouterSpec]] = {
    "as pretrained": lambda router: router,
    "no losses": lambda router: RouterSpec(balance_coef=0.0, z_coef=0.0),
    "frozen": lambda router: RouterSpec(balance_coef=0.0, z_coef=0.0, freeze=True),
    "frozen, with losses": lambda router: router.model_copy(update={"freeze": True}),
}
"""Settings of the routers in SFT and DPO, made from those of pretraining. The last says what the losses do to the layers below."""
START, STAGES = "pretrain-2", ("sft-1", "dpo-1")
SMALL = (
    "train.steps=4", "train.warmup_steps=0", "evaluation.exact_match.items_per_task=2", "evaluation.exact_match.pairs=4",
)  # fmt: skip
STEPS = {"pretrain-1": 40, "pretrain-2": 20, "sft-1": 24, "dpo-1": 14}
"""Optimizer steps of each stage on real data."""
TEXT_BYTES = 30_000
"""Of each held-out text that is measured."""


def recipe_of(data: Path | None, seed: int, small: bool) -> Recipe:
    """The toy recipe, or with `data` the laptop's up to its first DPO stage, with fixed numbers of steps."""
    if data is None:
        return load_recipe(shipped("toy"), (f"seed={seed}", *(SMALL if small else ())))
    overrides = [f"data={data}", f"seed={seed}"]
    for name, steps in STEPS.items():
        overrides += [f"{name}.train.steps={4 if small else steps}", f"{name}.train.budget_share=null"]
        overrides += [f"{name}.train.warmup_steps=2", f"{name}.train.save_every=1000"]
    return load_recipe(shipped("laptop"), overrides)


def pretrained(recipe: Recipe, out: Path) -> Path:
    """Run the recipe up to the stage that the arms start from; gives the run directory."""
    quietly(lambda: run(recipe, out, until=START))
    return out


def with_tokenizer(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with a tokenizer that is there already."""
    tokenizer = recipe.spec.tokenizer.model_copy(update={"path": str(directory.absolute()), "sources": []})
    return dataclasses.replace(recipe, spec=recipe.spec.model_copy(update={"tokenizer": tokenizer}))


def arm_recipe(recipe: Recipe, change: Callable[[RouterSpec], RouterSpec], base: Path) -> Recipe:
    """The recipe's SFT and DPO alone, from the pretrained model, with these routers."""
    first, second = (recipe.stage(name) for name in STAGES)
    starts = {first.name: str((base / START / "model").absolute()), second.name: first.name}
    stages = tuple(
        stage.model_copy(update={"router": change(recipe.stage(START).router), "init_from": starts[stage.name]})
        for stage in (first, second)
    )
    changes: dict[str, Any] = {"stages": list(STAGES)}
    if recipe.spec.evaluation.bits_per_byte:
        changes["evaluation"] = EvaluationSpec()  # of pretraining's text, which is measured here
    spec = recipe.spec.model_copy(update=changes)
    return dataclasses.replace(recipe, spec=spec, stages=stages)


def figures(recipe: Recipe, base: Path, out: Path) -> dict[str, float]:
    """What a finished run of an arm came to."""
    summary: dict[str, Any] = read_object(out / SUMMARY)
    sft, dpo = (stage["heldout"] for stage in summary["stages"])
    found = {"SFT held out": sft["loss"], "DPO held out": dpo["loss"], "pairs ranked right": dpo["reward_accuracy"]}
    if measured := summary["evaluation"]:
        found |= {
            "accuracy after SFT": measured["before"]["accuracy"],
            "accuracy after DPO": measured["accuracy"],
            "preferred more probable": measured["preference_accuracy"],
        }
    found |= text_figures(recipe, base, out / STAGES[-1] / "model")
    return found | {f"balance, {name}": balance(out / name) for name in STAGES}


def text_figures(recipe: Recipe, base: Path, model: Path) -> dict[str, float]:
    """Bits per byte of the recipe's held-out texts."""
    found, network = {}, load_model(model)
    tokenizer = KeuralTokenizer.load(Path(str(recipe.spec.tokenizer.path)))
    for spec in recipe.spec.evaluation.bits_per_byte:
        if spec.overlap:
            continue
        stage = recipe.stage(spec.stage)
        prepared = find_stage_data(recipe, stage, base)
        assert prepared is not None, "it was trained on"
        texts = measured_texts(spec.model_copy(update={"max_bytes": TEXT_BYTES}), prepared)
        found[spec.name] = bits_per_byte(network, tokenizer, texts, stage.data.sequence_length)["bits_per_byte"]
    return found


def balance(stage: Path) -> float:
    """Mean balance loss of a stage's last ten steps."""
    lines, _ = read_metrics(stage / "metrics.jsonl")
    return statistics.fmean([line["balance_loss"] for line in lines if "loss" in line][-10:])


def quietly(work: Callable[[], object]) -> None:
    """Run `work` without its lines."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()


def row(first: str, cells: list[str]) -> str:
    """One line of the table."""
    return f"| {' | '.join([first, *cells])} |"


def table(found: dict[str, list[dict[str, float]]], seeds: list[int]) -> list[str]:
    """A line for each arm and seed, then mean and standard deviation of each arm."""
    columns = list(next(iter(found.values()))[0])
    lines = [row("arm, seed", columns), "|" + "---|" * (1 + len(columns))]
    for arm, runs in found.items():
        for seed, values in zip(seeds, runs, strict=False):
            lines.append(row(f"{arm}, {seed}", [f"{values[name]:.3f}" for name in columns]))
    for arm, runs in found.items():
        if len(runs) > 1:
            cells = [
                f"{statistics.fmean(column):.3f} ± {statistics.stdev(column):.3f}"
                for name in columns
                if (column := [values[name] for values in runs])
            ]
            lines.append(row(f"**{arm}**", cells))
    return lines


def main() -> None:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--data", type=Path, help="the data directory of the laptop recipe; without it the toy world")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("--small", action="store_true", help="a few steps of each stage: tries the script")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
    tokenizer: Path | None = None  # of the first seed
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            out = (arguments.out or Path(scratch)) / str(seed)
            recipe = recipe_of(arguments.data, seed, arguments.small)
            tokenizer = tokenizer or out / "pretrained" / "tokenizer"
            if tokenizer.exists():
                recipe = with_tokenizer(recipe, tokenizer)
            base = pretrained(recipe, out / "pretrained")
            recipe = with_tokenizer(recipe, tokenizer)
            for arm in arguments.arms:
                change = ARMS[arm]
                arm_out = out / arm.replace(",", "").replace(" ", "-")
                quietly(
                    lambda change=change, arm_out=arm_out, base=base, recipe=recipe: run(arm_recipe(recipe, change, base), arm_out)
                )
                found[arm].append(figures(recipe, base, arm_out))
                print(f"seed {seed}, {arm}: done", flush=True)
    print("\n".join(table(found, arguments.seeds)))


if __name__ == "__main__":
    main()
