"""Figures of a task as a reader wants to see them: shares in percent, bits, intervals, differences with their sign.

In: what `summary.json` says of a task. Out: text; a dash for what is not there or no finite number.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from keural.report.format import ABSENT

LANGUAGES = {"ko": "Korean", "en": "English", "ja": "Japanese", "zh": "Chinese"}
BITS = "rolling"
"""The kind of task whose score is bits per byte."""
PERCENT, PLAIN = 100, 1
"""What a score is multiplied by to be read: shares, and bits per byte."""
Figures = Mapping[str, Any]
Measured = Mapping[str, Mapping[str, Figures]]
"""Figures by stage and task."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_bits(figures: Figures) -> bool:
    """Whether a task's score is bits per byte and no share."""
    return figures.get("kind") == BITS


def part(figures: Figures, key: str) -> Figures:
    """An object within figures; an empty one where there is none."""
    found = figures.get(key)
    return found if isinstance(found, Mapping) else {}


def seen_items(figures: Figures) -> int:
    """How many of a task's items training data held, as far as it is known."""
    found = part(figures, "contamination").get("found")
    return found if isinstance(found, int) else 0


def scaled(value: Any, scale: int = PERCENT) -> str:
    """A score: in percent with one digit, or as it is with three."""
    if not is_number(value):
        return ABSENT
    return f"{value * scale:.1f}" if scale == PERCENT else f"{value:.3f}"


def signed(value: Any, scale: int = PERCENT) -> str:
    """A difference of scores, with its sign; zero has none."""
    if not is_number(value):
        return ABSENT
    text = scaled(abs(value), scale)
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"


def half_interval(figures: Figures, scale: int = PERCENT) -> str:
    """Half the interval, as it stands behind a score."""
    low, high = figures.get("low"), figures.get("high")
    return f"± {scaled((high - low) / 2, scale)}" if is_number(low) and is_number(high) else ""


def interval(figures: Figures, scale: int = PERCENT) -> str:
    """An interval of a score."""
    return f"{scaled(figures.get('low'), scale)} to {scaled(figures.get('high'), scale)}"


def signed_interval(figures: Figures, scale: int = PERCENT) -> str:
    """An interval of a difference."""
    return f"[{signed(figures.get('low'), scale)}, {signed(figures.get('high'), scale)}]"


def probability(value: Any) -> str:
    """A p-value; below a thousandth it is only said that it is."""
    if not is_number(value):
        return ABSENT
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def language_name(code: Any) -> str:
    """A language as a reader calls it; a code that is not known stays as it is."""
    return LANGUAGES.get(str(code or ""), str(code or ""))


def language_order(code: str) -> tuple[int, str]:
    """Sorts the known languages first, in their order."""
    known = list(LANGUAGES)
    return (known.index(code) if code in known else len(known), code)


def latest_of(measured: Measured, task: str) -> Figures:
    """A task's figures of the last stage that has it."""
    return next(tasks[task] for tasks in reversed(list(measured.values())) if task in tasks)
