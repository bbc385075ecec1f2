"""The course of a task over the stages, as a drawing that stands in a line of the table.

In: a task's figures by stage. Out: an SVG whose colors are classes of the page.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from keural.report.scores.figures import Figures, is_number, scaled

WIDTH, HEIGHT, MARGIN = 108, 30, 4
"""In pixels."""
_DRAWING = Markup(
    '<svg class="course" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
    "<title>{label}</title>{parts}</svg>"
)


def course(task: str, figures: Sequence[Figures | None], chance: Any) -> Markup:
    """Scores from left to right with their intervals, on an axis from 0 to 1; chance as a dashed line; empty without any score.

    `figures` has None for a stage that was not measured, whose place stays free.
    """
    points = [(_x(at, len(figures)), one) for at, one in enumerate(figures) if one is not None and is_number(one.get("score"))]
    if not points:
        return Markup("")
    parts = [_level("floor", 0.0)]
    if is_number(chance):
        parts.append(_level("chance", chance))
    parts += [_line("spread", x, x, _y(one["low"]), _y(one["high"])) for x, one in points if _has_interval(one)]
    joined = " ".join(f"{x:.1f},{_y(one['score']):.1f}" for x, one in points)
    parts.append(f'<polyline class="main c1" points="{joined}"/>')
    last = points[-1][0]
    parts += [f'<circle cx="{x:.1f}" cy="{_y(one["score"]):.1f}" r="{2.8 if x == last else 1.6}"/>' for x, one in points]
    label = f"{task}: from {scaled(points[0][1]['score'])} to {scaled(points[-1][1]['score'])}"
    return _DRAWING.format(width=WIDTH, height=HEIGHT, label=label, parts=Markup("".join(parts)))


def _has_interval(figures: Figures) -> bool:
    return is_number(figures.get("low")) and is_number(figures.get("high"))


def _x(at: int, count: int) -> float:
    return MARGIN + 2 + at * (WIDTH - 2 * MARGIN - 4) / max(count - 1, 1)


def _y(value: float) -> float:
    return HEIGHT - MARGIN - min(max(value, 0.0), 1.0) * (HEIGHT - 2 * MARGIN)


def _level(kind: str, value: float) -> str:
    return _line(kind, 0, WIDTH, _y(value), _y(value))


def _line(kind: str, left: float, right: float, bottom: float, top: float) -> str:
    return f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
