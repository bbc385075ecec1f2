"""The charts of a report, from a run's metrics.

In: a `Run`. Out: `Panel`s in the order of the page. The stages lie one after the other on a common axis of optimizer steps; a panel
whose metric was never written does not appear.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from keural.recipe import OBJECTIVES, STORES
from keural.report.charts import HALF_WIDTH, Band, Line, Reference, heatmap, line_chart, smooth
from keural.report.collect import Run, Stage
from keural.report.format import percent

OTHER_COLOR = "c4"
"""Of a stage whose objective is not known."""
SMOOTHING_SHARE = 0.04
"""The smooth curve averages over this share of a stage's steps."""
SMALL = 190
"""Height of all charts but the first."""
LOG_FROM = 20
"""Learning rates whose peaks differ by more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Panel:
    """A chart with its title, a remark, and what its colors mean (class of the page, text)."""

    title: str
    chart: Markup
    note: str = ""
    legend: Sequence[tuple[str, str]] = field(default_factory=tuple)


@dataclass(frozen=True)
class _Placed:
    """A stage and where it starts on the common axis."""

    stage: Stage
    offset: int

    @property
    def color(self) -> str:
        return objective_color(self.stage.objective)

    def x(self, steps: Sequence[int]) -> list[float]:
        first = int(self.stage.steps[0]["step"]) if self.stage.steps else 0
        return [float(self.offset + step - first) for step in steps]


def objective_label(name: str) -> str:
    """What a report calls an objective; a name that is not known stays as it is."""
    return OBJECTIVES[name].label if name in OBJECTIVES else name


def objective_color(name: str) -> str:
    """The class of an objective's color."""
    return OBJECTIVES[name].color if name in OBJECTIVES else OTHER_COLOR


def curves(run: Run) -> list[Panel]:
    """Loss, learning rate, gradient norm, router losses and speed of all stages, each on the common axis."""
    placed = _place(run)
    bands = [Band(one.stage.name, one.offset, one.offset + max(len(one.stage.steps), 1), one.color) for one in placed]
    used = {one.stage.objective for one in placed}
    legend = [(kind.color, kind.label) for name, kind in OBJECTIVES.items() if name in used]
    panels = [_loss(placed, bands, legend), _learning_rate(placed, bands, legend)]
    for title, key, log, note in (
        ("Gradient norm", "gradient_norm", True, "Before clipping; logarithmic."),
        ("Router balance loss", "balance_loss", False, "1 is a perfectly even load."),
        ("Router z-loss", "z_loss", False, "Mean squared log-partition of the router's logits."),
        ("Tokens per second", "tokens_per_second", False, ""),
    ):
        lines = [line for one in placed for line in _lines(one, key, noisy=True)]
        panels.append(Panel(title, line_chart(title, lines, bands, log=log, height=SMALL), note, legend))
    return [panel for panel in panels if panel.chart]


def expert_load(run: Run) -> list[Panel]:
    """The most and least loaded expert of every layer over the steps, and the whole table at the end of each stage."""
    placed = [one for one in _place(run) if any("expert_load" in step for step in one.stage.steps)]
    if not placed:
        return []
    bands = [Band(one.stage.name, one.offset, one.offset + max(len(one.stage.steps), 1), one.color) for one in placed]
    lines = [line for one in placed for line in _load_lines(one)]
    balanced = 1 / len(_last_load(placed[0].stage)[0])
    title = "Most and least loaded expert of each layer"
    chart = line_chart(title, lines, bands, [Reference(f"balanced: {percent(balanced)}", balanced)], height=230)
    legend = [("over", "most loaded"), ("under", "least loaded")]
    return [Panel(title, chart, "Share of a layer's token assignments that an expert receives.", legend)]


def load_maps(run: Run) -> list[Panel]:
    """One map per stage: shares of all experts (columns) in all layers (rows) over its last steps."""
    panels = []
    for stage in run.stages:
        shares = _last_load(stage)
        if shares:
            chart = heatmap(f"Expert load at the end of {stage.name}", shares, 1 / len(shares[0]))
            spread = f"{percent(min(map(min, shares)))} to {percent(max(map(max, shares)))}"
            panels.append(Panel(stage.name, chart, spread))
    return panels


JUDGED = dict.fromkeys(STORES, ("chosen", "rejected")) | {"answers": ("desirable", "undesirable")}
"""What metrics call good and bad answers, by the kind of store."""


def preferences(run: Run) -> list[Panel]:
    """Rewards, margins and accuracies of each stage that learns from judged answers."""
    panels = []
    for stage in run.stages:
        better, worse = JUDGED[OBJECTIVES[stage.objective].store if stage.objective in OBJECTIVES else "pairs"]
        sides = [("c2", better), ("c4", worse)]
        rewards = [_smoothed(stage, "reward_margin", "margin", "c3")]
        rewards += [_smoothed(stage, f"reward_{side}", side, color) for color, side in sides]
        chart = line_chart(f"Rewards in {stage.name}", rewards, references=[Reference("", 0.0)], width=HALF_WIDTH, height=SMALL)
        legend = [("c3", "margin"), *sides]
        panels.append(Panel(f"{stage.name}: rewards and their margin", chart, "β · log-ratio to the reference model.", legend))
        answers = [_smoothed(stage, f"logprob_{side}", side, color) for color, side in sides]
        chart = line_chart(f"Log-probabilities in {stage.name}", answers, width=HALF_WIDTH, height=SMALL)
        note = "Of whole answers. Both may fall while the margin grows."
        panels.append(Panel(f"{stage.name}: log-probabilities", chart, note, sides))
        title = f"{stage.name}: divergence from the reference"
        chart = line_chart(title, [_smoothed(stage, "kl", "divergence", "c1")], width=HALF_WIDTH, height=SMALL)
        panels.append(
            Panel(title, chart, "On answers to other prompts, nats per answer; what good and bad ones are measured against.")
        )
        title = f"{stage.name}: pairs ranked right"
        accuracy = [_smoothed(stage, "reward_accuracy", "accuracy", "c3")]
        chance = [Reference("chance", 0.5)]
        chart = line_chart(title, accuracy, references=chance, y_range=(0, 1), width=HALF_WIDTH, height=SMALL)
        panels.append(Panel(title, chart, "Share of a step's pairs whose chosen answer has the higher reward."))
    return [panel for panel in panels if panel.chart]


def _place(run: Run) -> list[_Placed]:
    placed, offset = [], 0
    for stage in run.stages:
        if stage.steps:
            placed.append(_Placed(stage, offset))
            offset += int(stage.steps[-1]["step"]) - int(stage.steps[0]["step"]) + 1
    return placed


def _loss(placed: Sequence[_Placed], bands: Sequence[Band], legend: Sequence[tuple[str, str]]) -> Panel:
    lines = [line for one in placed for line in _lines(one, "loss", noisy=True)]
    heldout = [line for one in placed if (line := _heldout(one)).xs]
    note = "Thin: every step. Bold: moving average. Nats per token"
    note += "".join(f"; {start}" for start in _starts(placed)) + "."
    if heldout:
        note += " Dots: held-out data."
    return Panel("Loss", line_chart("Loss", lines + heldout, bands, height=300), note, legend)


def _starts(placed: Sequence[_Placed]) -> list[str]:
    """Where the losses of preference stages begin, of each objective whose stages all begin there."""
    found = []
    for objective, (begins, text) in _BEGINNINGS.items():
        given = [one.stage.settings.get(objective, {}) for one in placed if one.stage.objective == objective]
        if given and all(map(begins, given)):
            found.append(text)
    return found


_BEGINNINGS: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "dpo": (lambda settings: settings.get("loss", "sigmoid") == "sigmoid", "the DPO loss starts at ln 2 = 0.693"),
    "kto": (
        lambda settings: all(settings.get(f"{label}_weight", 1.0) == 1.0 for label in ("desirable", "undesirable")),
        "the KTO loss starts at 0.5",
    ),
}
"""Whether a stage's loss begins where the objective's own does before anything is learned, by its settings; and where that is."""


def _learning_rate(placed: Sequence[_Placed], bands: Sequence[Band], legend: Sequence[tuple[str, str]]) -> Panel:
    """Linear, or logarithmic when one stage's rates would lie on the floor beside another's; their ends then leave the axis."""
    title, lines = "Learning rate", [line for one in placed for line in _lines(one, "learning_rate", noisy=False)]
    peaks = [peak for line in lines if (peak := max(line.ys)) > 0]
    if peaks and max(peaks) > LOG_FROM * min(peaks):
        limits = (min(peaks) / 10, max(peaks))
        return Panel(title, line_chart(title, lines, bands, y_range=limits, log=True, height=SMALL), "Logarithmic.", legend)
    return Panel(title, line_chart(title, lines, bands, height=SMALL), "", legend)


def _heldout(one: _Placed) -> Line:
    pairs = [(line["step"], line["heldout"].get("loss")) for line in one.stage.heldout]
    pairs = [(step, loss) for step, loss in pairs if isinstance(loss, int | float)]
    xs = one.x([step for step, _ in pairs])
    return Line(f"{one.stage.name}, held out", xs, [loss for _, loss in pairs], one.color, "points")


def _lines(one: _Placed, key: str, noisy: bool) -> Iterator[Line]:
    """The metric as a curve; a noisy one as a thin curve under its moving average."""
    steps, values = one.stage.series(key)
    if not steps:
        return
    if noisy and len(values) > 8:
        yield Line("", one.x(steps), values, one.color, "faint")
        values = smooth(values, _window(values))
    yield Line(one.stage.name, one.x(steps), values, one.color)


def _smoothed(stage: Stage, key: str, label: str, color: str) -> Line:
    steps, values = stage.series(key)
    return Line(label, steps, smooth(values, _window(values)), color)


def _window(values: Sequence[float]) -> int:
    return max(3, math.ceil(len(values) * SMOOTHING_SHARE))


def _load_lines(one: _Placed) -> Iterator[Line]:
    written = [step for step in one.stage.steps if step.get("expert_load")]
    xs = one.x([int(step["step"]) for step in written])
    sides: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (("over", "most", max), ("under", "least", min))
    for layer in range(len(written[0]["expert_load"])):
        for color, label, extreme in sides:
            values = [extreme(step["expert_load"][layer]) for step in written]
            yield Line(f"layer {layer}, {label}", xs, smooth(values, _window(values)), color, "fine")


def _last_load(stage: Stage) -> list[list[float]]:
    """Mean load over the last steps of a stage (the smoothing window), `[layer][expert]`; empty where none was written."""
    written = [step["expert_load"] for step in stage.steps if step.get("expert_load")]
    recent = written[-_window(written) :]
    if not recent:
        return []
    layers, experts = len(recent[0]), len(recent[0][0])
    return [[sum(load[layer][e] for load in recent) / len(recent) for e in range(experts)] for layer in range(layers)]
