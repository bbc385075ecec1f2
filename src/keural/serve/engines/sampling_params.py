"""How the next token is to be chosen: the settings, which are there before any engine is.

In: what a command line or a model's record says. Out: settings that are possible, or `UserError`.
"""

import math
from dataclasses import dataclass

from keural.card import CARD
from keural.errors import UserError


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
        finite = math.isfinite(self.temperature) and math.isfinite(self.repetition_penalty)
        possible = self.temperature >= 0 and 0 <= self.top_p <= 1 and self.repetition_penalty > 0 and self.max_new_tokens >= 1
        if not (finite and possible and 0 <= (self.seed or 0) < 2**63):
            raise UserError(
                f"impossible sampling settings {self}: use temperature >= 0, 0 <= top_p <= 1, repetition_penalty > 0, "
                "max_new_tokens >= 1, 0 <= seed < 2**63"
            )
