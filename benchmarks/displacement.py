"""How far weights move at a small learning rate, by what they are stored in, beside float32: a table and a plot.

    python -m benchmarks.displacement [--steps 1000] [--svg docs/displacement.svg]

Every way gets the same start, gradients and AdamW; what 1,000 steps at 2e-7 move is compared with what they move in float32: the
norm of the difference over the norm of float32's displacement. 0 is float32, 1 is not to move at all. Gradients have a drift and
noise, and their scales spread over some decades inside every block of 256 that shares a scale in `split`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from keural.report.charts import Line, line_chart
from keural.train.optimization.half_moments import HalfMomentAdamW
from keural.train.optimization.optimizer import set_step
from keural.train.optimization.split import SplitAdamW

RATE, BETAS = 2e-7, (0.9, 0.95)
NUMBER = 1 << 13
Step = Callable[[Tensor], Tensor]
"""Takes a gradient; gives the weights after it, in float32."""


def torch_adamw(start: Tensor, kind: type[torch.optim.AdamW], dtype: torch.dtype) -> Step:
    """One of torch's kind, over weights of `dtype`."""
    weight = nn.Parameter(start.to(dtype, copy=True))
    optimizer = kind([weight], lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)
    set_step(optimizer, 0)

    def step(gradient: Tensor) -> Tensor:
        weight.grad = gradient.to(dtype)
        optimizer.step()
        return weight.detach().float()

    return step


def split_adamw(start: Tensor) -> Step:
    """`train.precision: split`."""
    weight = nn.Parameter(start.bfloat16())
    optimizer = SplitAdamW([weight], betas=BETAS, weight_decay=0.0)

    def step(gradient: Tensor) -> Tensor:
        weight.grad = gradient
        optimizer.step(RATE)
        return optimizer.master(weight)

    return step


def rounded(start: Tensor) -> Step:
    """Weights rounded to bfloat16 after each step, moments in float32."""
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)

    def step(gradient: Tensor) -> Tensor:
        weight.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            weight.copy_(weight.bfloat16())
        return weight.detach()

    return step


WAYS: dict[str, Callable[[Tensor], Step]] = {
    "split": split_adamw,
    "fp32-bf16m": lambda start: torch_adamw(start, HalfMomentAdamW, torch.float32),
    "bfloat16 weights": rounded,
    "published": lambda start: torch_adamw(start, torch.optim.AdamW, torch.bfloat16),
}
"""By name: modes of `train.precision`, and weights in bfloat16 with nothing beside them."""


def distances(decades: float, ways: Sequence[str], steps: int = 1000, every: int = 1000) -> dict[str, list[float]]:
    """Relative distance from float32 of what each way has moved, after every `every` steps."""
    draw = torch.Generator().manual_seed(0)
    start = (torch.randn(NUMBER, generator=draw) * 0.02).bfloat16().float()
    drift = torch.randn(NUMBER, generator=draw) * 0.3
    scale = 1e-3 * 10 ** (-decades * torch.rand(NUMBER, generator=draw))
    whole, others = torch_adamw(start, torch.optim.AdamW, torch.float32), {name: WAYS[name](start) for name in ways}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1, steps + 1):
        gradient = ((drift + torch.randn(NUMBER, generator=draw)) * scale).bfloat16()
        expected = whole(gradient) - start
        for name, step in others.items():
            moved = step(gradient) - start
            if number % every == 0:
                found[name].append(float((moved - expected).norm() / expected.norm()))
    return found


LABELS = {
    "bfloat16 weights": ("weights in bfloat16, moments in float32", "c4"),
    "published": ("published: weights, gradients and moments in bfloat16", "c3"),
    "fp32-bf16m": ("fp32-bf16m", "c2"),
    "split": ("split", "c1"),
}
STYLE = """
svg { font: 12px system-ui, sans-serif; --ink: #222; --grid: #ddd; --c1: #2c6ecb; --c2: #17845a; --c3: #b7561a; --c4: #7650b8; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #ddd; --grid: #444; --c1: #6ea5f2; --c2: #4cc493; --c3: #f09a5b; --c4: #b598ee; }
}
text { fill: var(--ink); } .grid { stroke: var(--grid); } polyline, .key { fill: none; stroke-width: 2; }
.c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); stroke-dasharray: 6 4; } .c4 { stroke: var(--c4); }
"""
HEAD = 22


def plot(found: dict[str, list[float]], every: int) -> str:
    """The distances as an SVG of its own, for a light page and a dark one; the curves of the report's charts, with a legend."""
    lines = [
        Line(label, [every * (k + 1) for k in range(len(found[name]))], found[name], color)
        for name, (label, color) in LABELS.items()
    ]
    chart = str(line_chart("Distance of the displacement from float32", lines, log=True, width=720, height=300))
    size = HEAD * (len(lines) + 1)
    keys = [
        f'<line class="key {line.color}" x1="60" x2="90" y1="{HEAD * k - size + 14}" y2="{HEAD * k - size + 14}"/>'
        f'<text x="98" y="{HEAD * k - size + 18}">{line.label}: {line.ys[-1]:.2%} after {line.xs[-1]:,.0f} steps</text>'
        for k, line in enumerate(lines)
    ]
    head, _, body = chart.partition(">")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-size} 735 {300 + size}" role="img"'
    return f"{head}><style>{STYLE}</style>{''.join(keys)}{body}\n"


def main() -> None:
    """Print the table, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--svg", type=Path, help="where to write the plot of scales that spread over one decade")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = list(WAYS)
    print(f"| decades | {' | '.join(f'`{name}`' for name in names)} |\n|---|{'---:|' * len(names)}")
    for decades in (0, 1, 2, 3):
        found = distances(decades, names, given.steps, given.steps)
        print(f"| {decades} | {' | '.join(f'{found[name][-1]:.2%}' for name in names)} |", flush=True)
    if given.svg is not None:
        every = math.ceil(given.steps / 100)
        given.svg.write_text(plot(distances(1, names, given.steps, every), every), encoding="utf-8")


if __name__ == "__main__":
    main()
