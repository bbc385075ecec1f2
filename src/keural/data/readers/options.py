"""Options of adapters and of readers: what each may be, what it means, and what holds where a recipe does not give it.

In: nothing. Out: `Option`, of which every adapter and every format has a table by name. `keural.data.sources` checks recipes
against it, and the reference prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAME = (str, int)
"""Kinds of an option that names a field, or a column by number."""
NAMES = (str, int, list)
"""Kinds of an option that names a field, or several whose texts are joined by line ends."""
SWITCH, TEXT, COUNT, NUMBER, LIST, MAP = (bool,), (str,), (int,), (float,), (list,), (dict,)
_WORDS: dict[type, str] = {
    bool: "true or false",
    str: "a text",
    int: "a column number",
    list: "a list of names",
    float: "a number",
    dict: "a map of names",
}


@dataclass(frozen=True)
class Option:
    """One option."""

    kinds: tuple[type, ...]
    """What its value may be: `NAME`, `NAMES`, `SWITCH`, `TEXT`, `COUNT`, `NUMBER`, `LIST`, `MAP`."""
    meaning: str
    """What it does, in one line that has no full stop."""
    default: Any = None
    """What holds where it is not given; a tuple: the names of fields that are looked for. None: nothing does."""
    choices: tuple[str, ...] = ()
    """The only values that it may have; empty: any of its kinds."""

    @property
    def kind(self) -> str:
        """What its value may be, in words."""
        if self.choices:
            return f"{'list of ' if self.kinds == LIST else ''}{' or '.join(self.choices)}"
        return "a whole number" if self.kinds == COUNT else " or ".join(_WORDS[kind] for kind in self.kinds)

    @property
    def names_fields(self) -> bool:
        """Whether its value names a field or several."""
        return self.kinds in (NAME, NAMES)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence that begins with the option's name."""
        kinds = (float, int) if self.kinds == NUMBER else self.kinds
        fits = isinstance(value, kinds) and isinstance(value, bool) == (self.kinds == SWITCH)
        if isinstance(value, list):
            fits = fits and bool(value) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in value)
        if not fits:
            return f"must be {' or '.join(_WORDS[kind] for kind in self.kinds)}, got {value!r}"
        if self.choices and any(item not in self.choices for item in (value if isinstance(value, list) else [value])):
            return f"must be one of {', '.join(self.choices)}, got {value!r}"
        return None


OptionTable = Mapping[str, Option]
"""Options by name."""
