"""How the next token is to be chosen: the settings, which are there before any engine is.

In: what a command line or a model's record says. Out: settings that are possible, or `UserError`.
"""

from dataclasses import dataclass
from typing import Any

from keural.card import CARD
from keural.errors import UserError, quoted
from keural.limits import LARGEST_ANSWER, LARGEST_PENALTY, LARGEST_SEED, LARGEST_TEMPERATURE, SMALLEST_PENALTY


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are the model card's."""

    temperature: float = CARD.temperature
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = CARD.top_p
    """Sample from the smallest set of tokens with at least this probability."""
    repetition_penalty: float = CARD.repetition_penalty
    """Tokens of the prompt and the answer so far: positive logits are divided by it, negative ones multiplied."""
    max_new_tokens: int = CARD.max_new_tokens
    seed: int | None = None
    """Makes sampling repeatable; None draws a new seed for every answer."""

    def __post_init__(self) -> None:
        for name, (kinds, low, high) in _RANGES.items():
            value: Any = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"impossible sampling settings: {name} {quoted(value)}; use a number from {low} to {high:,}")


_NUMBER = (int, float)
_RANGES: dict[str, tuple[Any, float, float]] = {
    "temperature": (_NUMBER, 0, LARGEST_TEMPERATURE),
    "top_p": (_NUMBER, 0, 1),
    "repetition_penalty": (_NUMBER, SMALLEST_PENALTY, LARGEST_PENALTY),
    "max_new_tokens": ((int,), 1, LARGEST_ANSWER),
    "seed": ((int,), 0, LARGEST_SEED),
}
