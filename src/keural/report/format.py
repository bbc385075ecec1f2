"""Values as a reader wants to see them."""

import math
from typing import Any

ABSENT = "–"


def number(value: Any) -> str:
    """Integers with separators, other numbers with four significant digits, a dash for nothing."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return ABSENT if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15 and (isinstance(value, int) or abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def large(value: float) -> str:
    """A count in thousands, millions or billions."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def percent(share: Any) -> str:
    """A share of one as a percentage."""
    return f"{share:.1%}" if isinstance(share, int | float) and math.isfinite(share) else ABSENT


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
