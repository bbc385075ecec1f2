"""The routers in alignment: losses as in pretraining, none, or the routers frozen; SFT and DPO on the toy world, side by side.

    python benchmarks/router_arms.py [--seeds 1 2 3] [--out DIR] [--small]

For each seed the toy recipe is pretrained once; then each arm runs SFT and DPO from that very model, on the same data in the same
order. Printed for each arm: held-out loss after SFT, share of held-out tasks answered right after SFT and after DPO, held-out DPO
loss and share of pairs ranked right, share of pairs whose better answer is the more probable, and the balance loss (1 is even) over
the last ten steps of both stages; then means and standard deviations over the seeds. `--small` tries the script, not the arms.
A seed trains about twice as much as the toy recipe does up to its first DPO stage. With `--out` finished parts are not run again.
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

from keural.files import read_object
from keural.pipeline.run import run
from keural.pipeline.run_directory import SUMMARY
from keural.recipe import Recipe, RouterSpec, load_recipe
from keural.recipe.shipped import shipped
from keural.train.stage.metrics import read_metrics

ARMS: dict[str, Callable[[RouterSpec], RouterSpec]] = {
    "as pretrained": lambda router: router,
    "no losses": lambda router: RouterSpec(balance_coef=0.0, z_coef=0.0),
    "frozen": lambda router: RouterSpec(balance_coef=0.0, z_coef=0.0, freeze=True),
    "frozen, with losses": lambda router: router.model_copy(update={"freeze": True}),
}
"""Settings of the routers in SFT and DPO, made from those of the recipe. The last says what the losses do to the layers below."""
START, STAGES = "pretrain-2", ("sft-1", "dpo-1")
SMALL = (
    "train.steps=4", "train.warmup_steps=0", "evaluation.exact_match.items_per_task=2", "evaluation.exact_match.pairs=4",
)  # fmt: skip
COLUMNS = {
    "SFT held out": 3, "accuracy after SFT": 3, "accuracy after DPO": 3, "DPO held out": 3, "pairs ranked right": 3,
    "preferred more probable": 3, "balance, SFT": 3, "balance, DPO": 3,
}  # fmt: skip
"""Figures of a run, and their decimals."""


def pretrained(recipe: Recipe, out: Path) -> Path:
    """Run the recipe up to the stage that the arms start from; gives the run directory."""
    quietly(lambda: run(recipe, out, until=START))
    return out


def arm_recipe(recipe: Recipe, base: Path, change: Callable[[RouterSpec], RouterSpec]) -> Recipe:
    """The recipe's SFT and DPO alone, from the pretrained model and with its tokenizer, with these routers."""
    tokenizer = recipe.spec.tokenizer.model_copy(update={"path": str((base / "tokenizer").absolute()), "sources": []})
    first, second = (recipe.stage(name) for name in STAGES)
    starts = {first.name: str((base / START / "model").absolute()), second.name: first.name}
    stages = tuple(
        stage.model_copy(update={"router": change(stage.router), "init_from": starts[stage.name]}) for stage in (first, second)
    )
    spec = recipe.spec.model_copy(update={"stages": list(STAGES), "tokenizer": tokenizer})
    return dataclasses.replace(recipe, spec=spec, stages=stages)


def figures(out: Path) -> dict[str, float]:
    """What a finished run of an arm came to."""
    summary: dict[str, Any] = read_object(out / SUMMARY)
    sft, dpo = (stage["heldout"] for stage in summary["stages"])
    measured = summary["evaluation"]
    values = (
        sft["loss"], measured["before"]["accuracy"], measured["accuracy"], dpo["loss"], dpo["reward_accuracy"],
        measured["preference_accuracy"], *(balance(out / name) for name in STAGES),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


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
    lines = [row("arm, seed", list(COLUMNS)), "|" + "---|" * (1 + len(COLUMNS))]
    for arm, runs in found.items():
        for seed, values in zip(seeds, runs, strict=False):
            lines.append(row(f"{arm}, {seed}", [f"{values[name]:.{digits}f}" for name, digits in COLUMNS.items()]))
    for arm, runs in found.items():
        if len(runs) > 1:
            cells = [
                f"{statistics.fmean(column):.{digits}f} ± {statistics.stdev(column):.{digits}f}"
                for name, digits in COLUMNS.items()
                if (column := [values[name] for values in runs])
            ]
            lines.append(row(f"**{arm}**", cells))
    return lines


def main() -> None:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("--small", action="store_true", help="a few steps of each stage: tries the script")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            out = (arguments.out or Path(scratch)) / str(seed)
            recipe = load_recipe(shipped("toy"), (f"seed={seed}", *(SMALL if arguments.small else ())))
            base = pretrained(recipe, out / "pretrained")
            for arm, change in ARMS.items():
                arm_out = out / arm.replace(",", "").replace(" ", "-")
                quietly(
                    lambda change=change, arm_out=arm_out, base=base, recipe=recipe: run(arm_recipe(recipe, base, change), arm_out)
                )
                found[arm].append(figures(arm_out))
                print(f"seed {seed}, {arm}: done", flush=True)
    print("\n".join(table(found, arguments.seeds)))


if __name__ == "__main__":
    main()
