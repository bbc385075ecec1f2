"""Charts as inline SVG that follows the page's colors, light or dark.

In: numbers. Out: markup. Colors and fonts are classes that the page's style sheet defines; positions are worked out here. The
script of the page reads the scales back from `data-x` and `data-y` to show values under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

FULL_WIDTH, HALF_WIDTH = 960, 520
"""Drawing units of a chart over the whole page or half of it; a unit is about a pixel."""
LEFT, RIGHT, BOTTOM = 58, 14, 30
LABEL_ROW = 15
MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """A curve. `style` is a class of the page: main, faint, dashed, or points for single marks."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    style: str = "main"


@dataclass(frozen=True)
class Band:
    """A labelled stretch of the horizontal axis: a stage."""

    label: str
    start: float
    end: float
    color: str


@dataclass(frozen=True)
class Reference:
    """A horizontal line at a value that means something."""

    label: str
    value: float


@dataclass(frozen=True)
class _Scale:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def attribute(self) -> str:
        return json.dumps([self.low, self.high, round(self.start, 2), round(self.end, 2), self.log])


def line_chart(
    title: str,
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    references: Sequence[Reference] = (),
    *,
    x_label: str = "optimizer step",
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    width: int = FULL_WIDTH,
    height: int = 250,
) -> Markup:
    """Curves over a common horizontal axis; points that are not finite (or not positive, when `log`) are left out.

    Returns empty markup when there is nothing to draw. `y_range` fixes the vertical axis; otherwise it fits the values.
    """
    lines = [clean for line in lines if (clean := _clean(line, log)).xs]
    if not lines:
        return Markup("")
    x = _x_scale(lines, bands, width)
    rows, placed = _place_labels(bands, x)
    top = 10 + LABEL_ROW * rows
    y = _y_scale(lines, references, y_range, log, top, height - BOTTOM)
    parts = [_band(band, row, x, top, height) for band, row in zip(bands, placed, strict=True)]
    parts += [_y_tick(tick, x, y) for tick in ticks(y.low, y.high, log)]
    parts += [_x_tick(tick, x, height) for tick in ticks(x.low, x.high) if tick == int(tick)]
    parts += [_curve(line, x, y) for line in lines]
    parts += [_reference(reference, x, y) for reference in references]
    parts.append(_text(x.end, height - 3, x_label, "end"))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f"data-x='{x.attribute()}' data-y='{y.attribute()}'>{''.join(parts)}</svg>"
    )


def heatmap(title: str, rows: Sequence[Sequence[float]], balanced: float) -> Markup:
    """Shares as cells, one row per layer and one column per expert: one color above the balanced share, another below it.

    The color saturates at twice the balanced share and at zero.
    """
    if not rows or not rows[0]:
        return Markup("")
    cell, gap, left, top = 22, 2, 26, 16
    width = left + len(rows[0]) * (cell + gap)
    height = top + len(rows) * (cell + gap)
    parts = []
    for column in range(len(rows[0])):
        parts.append(_text(left + column * (cell + gap) + cell / 2, top - 4, str(column), "middle"))
    for row, shares in enumerate(rows):
        y = top + row * (cell + gap)
        parts.append(_text(left - 6, y + cell / 2 + 4, str(row), "end"))
        for column, share in enumerate(shares):
            excess = max(-1.0, min(1.0, share / balanced - 1)) if math.isfinite(share) else 0.0
            side = "over" if excess > 0 else "under"
            x = left + column * (cell + gap)
            parts.append(
                f'<rect class="cell {side}" x="{x}" y="{y}" width="{cell}" height="{cell}" rx="3" '
                f'style="--weight:{abs(excess):.2f}">'
                f"<title>layer {row}, expert {column}: {share:.1%} of the tokens' assignments</title></rect>"
            )
    return Markup(
        f'<svg class="heatmap" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over the finite values; the window is cut off at the ends."""
    reach = max(window // 2, 0)
    result = []
    for index in range(len(values)):
        near = [value for value in values[max(0, index - reach) : index + reach + 1] if math.isfinite(value)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most about `most` points: means of equal runs of neighbours, so that a long run stays a small page."""
    run = -(-len(xs) // most)
    if run <= 1:
        return list(xs), list(ys)
    groups = [slice(start, start + run) for start in range(0, len(xs), run)]
    return [sum(xs[g]) / len(xs[g]) for g in groups], [sum(ys[g]) / len(ys[g]) for g in groups]


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round values between `low` and `high`: multiples of 1, 2 or 5 times a power of ten; powers of ten when `log`."""
    if log:
        exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [10.0**exponent for exponent in exponents] if len(exponents) > 1 else [low, high]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def compact(value: float) -> str:
    """A short number for an axis."""
    if value == 0:
        return "0"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.4g}{name}"
    if abs(value) < 1e-2:  # 0.001 beside 1e-4 would be two ways to write one axis
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _clean(line: Line, log: bool) -> Line:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y) and (y > 0 or not log)]
    xs, ys = thin([x for x, _ in pairs], [y for _, y in pairs])
    return Line(line.label, xs, ys, line.color, line.style)


def _x_scale(lines: Sequence[Line], bands: Sequence[Band], width: int) -> _Scale:
    low = min([band.start for band in bands] or [line.xs[0] for line in lines])
    high = max([band.end for band in bands] or [line.xs[-1] for line in lines])
    return _Scale(low, high if high > low else low + 1, LEFT, width - RIGHT)


def _y_scale(
    lines: Sequence[Line], references: Sequence[Reference], fixed: tuple[float, float] | None, log: bool, top: float, bottom: float
) -> _Scale:
    values = [value for line in lines for value in line.ys] + [reference.value for reference in references]
    low, high = fixed or (min(values), max(values))
    if fixed is None and not log:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < margin * 4 else low - margin), high + margin
    elif log:
        low, high = low / 1.3, high * 1.3
    return _Scale(low, high, bottom, top, log)


def _place_labels(bands: Sequence[Band], x: _Scale) -> tuple[int, list[int]]:
    """The number of label rows above the chart, and each band's row: the first one with room."""
    ends: list[float] = []
    placed = []
    for band in bands:
        start = min(x(band.start), _latest_start(band, x))
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        if row == len(ends):
            ends.append(0.0)
        ends[row] = start + 6.4 * len(band.label) + 8
        placed.append(row)
    return len(ends), placed


def _latest_start(band: Band, x: _Scale) -> float:
    """Where a label must start at the latest to end inside the drawing."""
    return x.end + RIGHT - 6.4 * len(band.label)


def _band(band: Band, row: int, x: _Scale, top: float, height: int) -> str:
    start, end = x(band.start), x(band.end)
    y = 8 + LABEL_ROW * row
    return (
        f'<g class="band {band.color}"><rect x="{start:.1f}" y="{top - 4:.1f}" width="{max(end - start, 0.5):.1f}" '
        f'height="{height - BOTTOM - top + 4:.1f}"/>'
        f'<line x1="{start:.1f}" x2="{start:.1f}" y1="{y + 5:.1f}" y2="{height - BOTTOM}"/>'
        f'<text x="{min(start + 4, _latest_start(band, x)):.1f}" y="{y + 5:.1f}">{escape(band.label)}</text></g>'
    )


def _y_tick(value: float, x: _Scale, y: _Scale) -> str:
    at = y(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>{_text(LEFT - 7, at + 4, compact(value), "end")}'
    )


def _x_tick(value: float, x: _Scale, height: int) -> str:
    return _text(x(value), height - BOTTOM + 15, compact(value), "middle")


def _reference(reference: Reference, x: _Scale, y: _Scale) -> str:
    at = y(reference.value)
    return (
        f'<line class="reference" x1="{LEFT}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="axis halo" x="{x.end - 2}" y="{at - 4:.1f}" text-anchor="end">{escape(reference.label)}</text>'
    )


def _curve(line: Line, x: _Scale, y: _Scale) -> str:
    low, high = sorted((y.start, y.end))
    points = [(x(a), min(max(y(b), low), high)) for a, b in zip(line.xs, line.ys, strict=True)]
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    if line.style == "points" or len(points) == 1:
        marks = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.4"/>' for a, b in points)
        return f'<g class="marks {line.color}" data-label="{escape(line.label)}" data-points="{joined}">{marks}</g>'
    return f'<polyline class="{line.style} {line.color}" data-label="{escape(line.label)}" points="{joined}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
