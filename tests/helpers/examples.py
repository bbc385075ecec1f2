"""How many examples a property is tried with: few in the quick suite, the same ones each time; others and many in the slow one."""

from hypothesis import settings

RANDOM = "random"
"""The profile of the slow suite (`--hypothesis-profile=random`)."""
QUICK = 25
"""Examples of the quick suite for a property that does not say."""
MANY = 20
"""Examples of the slow suite for each of the quick one."""


def examples(quick: int) -> settings:
    """Decorates a property: so many examples in the quick suite, `MANY` times as many in the slow one."""
    return settings(max_examples=quick * (MANY if settings.get_current_profile_name() == RANDOM else 1))
