"""`keural plan`: what a recipe needs before it is run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keural.cli.options import Overrides, RecipeDir, open_recipe
from keural.errors import UserError
from keural.terminal import show, show_json, show_table

if TYPE_CHECKING:
    from keural.plan.plan import Plan

MOST_GPUS = 65_536
LEAST = 0.001
"""Of an MFU, and of GB/s to other nodes: what is slower is a slip, and makes figures without end."""
MOMENTS = {
    "head": "where the head makes logits",
    "layer": "in the last layer's backward pass",
    "later layer": "in a layer's backward pass, while the last one's gradients are summed",
    "reduction": "where a layer's gradients are summed",
}
app = typer.Typer(no_args_is_help=True)


@app.command(rich_help_panel="Recipes and runs")
def plan(
    recipe: RecipeDir,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h200, h100 or a100")] = "h200",
    gpus: Annotated[int, typer.Option(min=1, max=MOST_GPUS, metavar="N", help="how many")] = 1,
    mfu: Annotated[float | None, typer.Option(help="share of the card's FLOP/s that a whole step makes, e.g. 0.4")] = None,
    measured: Annotated[Path | None, typer.Option(metavar="FILE", help="what `benchmarks/gpu.py --out FILE` wrote")] = None,
    network: Annotated[float | None, typer.Option(metavar="GB/s", help="of one GPU to other nodes, as it is attained")] = None,
    price: Annotated[float | None, typer.Option(help="of one GPU for an hour, in any currency")] = None,
    json: Annotated[bool, typer.Option("--json", help="print data instead of tables")] = False,
) -> None:
    """Say what a recipe needs on so many GPUs: memory, the mode that fits, time, cost."""
    from keural.plan.plan import Speed, make_plan, refusal

    if mfu is not None and measured is not None:
        raise UserError("give --mfu or --measured, not both")
    if mfu is not None and not LEAST <= mfu <= 1:
        raise UserError(f"--mfu {mfu}: is a share, at least {LEAST} and at most 1")
    if network is not None and not LEAST <= network <= 1e5:
        raise UserError(f"--network {network}: give the GB/s of one GPU to other nodes, e.g. 40")
    if network is not None and mfu is not None:
        raise UserError("--mfu is of a whole step, communication too: give it or --network, not both")
    if price is not None and not 0 <= price <= 1e9:
        raise UserError(f"--price {price}: give what one GPU costs for an hour")
    loaded, _ = open_recipe(recipe, overrides, None)
    found = make_plan(loaded, gpu, gpus, Speed(mfu, measured, None if network is None else network * 1e9), price)
    data = found.data()
    if json:
        show_json(data)
    else:
        _print(found, data)
        show(f"run it: {command(recipe, gpus, [*(overrides or ()), *found.overrides])}")
    if (error := refusal(found)) is not None:
        raise error


def _print(plan: "Plan", data: dict[str, Any]) -> None:
    flops = data["flops_per_token"]
    show(f"{data['recipe']} on {data['gpus']} {data['gpu']}", "bold")
    show(
        f"parameters: {data['parameters']:,} in all, {data['parameters_active']:,} active; the embedding is "
        f"{data['parameters_embedding']:,} of them; {data['parameters_per_gpu']:,} on a GPU"
    )
    show(
        f"work per token: {flops['with_attention'] / 1e9:.2f} GFLOP with attention (rows of {flops['row']:,}), "
        f"{flops['6n_active'] / 1e9:.2f} as 6 x active"
    )
    show(f"mode: {_mode(data, plan.largest.laid.layout.way.engine)}")
    _print_memory(data)
    _print_stages(data)
    if "published" in data:
        _print_published(data)
    for note in data["notes"]:
        show(f"note: {note}")


def _mode(data: dict[str, Any], engine: bool) -> str:
    said = [f"{key} {data[key]} ({why})" for key, why in data["reasons"].items()]
    said += [f"{number} layers {mode}" for mode, number in (data["layers"] or {}).items() if number]
    said += [f"micro-batches of {data['micro_batch_tokens']:,} tokens", "compiled" if data["compile"] else "not compiled"]
    return ", ".join([*said, "by the training engine" if engine else "by the model's own layers"])


def _print_memory(data: dict[str, Any]) -> None:
    memory, host = data["memory_gib"], data["host_gib"]
    rows = [(name, f"{size:.2f}") for name, size in memory.items() if size or name == "total"]
    rows += [("available", f"{data['available_gib']:.2f}"), ("fits", "yes" if data["fits"] else "NO")]
    show(f"memory of one GPU at its height, in {data['stage_of_the_peak']}, {MOMENTS[data['peak_at']]}:")
    show_table("memory", {"part": "left", "GiB": "right"}, rows)
    show(f"of the host's memory: {host['per_process']:.1f} GiB per process")


def _print_stages(data: dict[str, Any]) -> None:
    names = ("stage", "steps", "tokens", "tokens/s", "MFU", "waiting", "days", "GPU-hours", "cost")
    rows = [
        (
            stage["name"],
            _number(stage["steps"]),
            *(_short(stage[key]) for key in ("tokens", "tokens_per_s")),
            f"{100 * stage['mfu']:.1f}%",
            f"{100 * stage['communication']:.1f}%",
            _number(stage["days"], 2),
            _number(stage["gpu_hours"], 1),
            _number(stage["cost"], 2),
        )
        for stage in data["stages"]
    ]
    total = data["total"]
    rows.append(
        ("in all", "", _short(total["tokens"]), "", "", "", *(_number(total[key], 2) for key in ("days", "gpu_hours", "cost")))
    )
    show_table("stages", {name: "left" if name == "stage" else "right" for name in names}, rows)
    for source in dict.fromkeys(stage["mfu_from"] for stage in data["stages"]):
        show(f"MFU: {source}")
    for stage in data["stages"]:
        show(f"length of {stage['name']}: {stage['tokens_from']}")
    if total["stages_left_out"]:
        show(f"not in the sums: {', '.join(total['stages_left_out'])}")


def _print_published(data: dict[str, Any]) -> None:
    published, ours = data["published"], {stage["name"]: stage for stage in data["stages"]}
    rows = []
    for stage in published["stages"]:
        hours = f"{stage['gpu_hours']:,.0f}{'' if stage['hours_stated'] else ' *'}"
        own = ours.get(stage["name"], {})
        rows.append(
            (
                stage["name"],
                f"{stage['steps']:,}",
                _short(stage["tokens"]),
                hours,
                _short(own.get("tokens")),
                _number(own.get("gpu_hours")),
            )
        )
    rows.append(
        ("in all", "", "", f"{published['gpu_hours']:,.0f}", _short(data["total"]["tokens"]), _number(data["total"]["gpu_hours"]))
    )
    names = ("published stage", "steps", "tokens", "GPU-hours", "tokens here", "GPU-hours here")
    title = f"published: {published['gpus']} {published['gpu']}, {published['tokens_per_s']:,} tokens/s, {published['precision']}"
    show_table(title, {name: "left" if name == names[0] else "right" for name in names}, rows)
    own = data["total"]
    show(
        f"* not stated; at the stated tokens/s. Tokens of this plan take {published['gpu_hours_of_these_tokens']:,.0f} GPU-hours "
        f"at that rate, {own['gpu_hours']:,.0f} here"
    )


def command(recipe: Path, gpus: int, overrides: Sequence[str]) -> str:
    """The command that runs a recipe as it was planned; on several nodes where there are more than eight."""
    from keural.plan.communication import cards_of_a_node

    start, each = "keural", cards_of_a_node(gpus)
    if gpus > 1:
        nodes = "" if gpus == each else f"--nnodes {gpus // each} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        start = f"python -m keural.launch {nodes}--nproc-per-node {each}"
    return f"{start} run {shlex.join([str(recipe), *overrides])}"


def _short(value: float | None) -> str:
    """A large number in thousands, millions or billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value is not None and value >= size:
            return f"{value / size:.1f}{unit}"
    return _number(value)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
