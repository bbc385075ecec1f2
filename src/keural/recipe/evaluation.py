"""What is measured at the end, and how the final model chats."""

from pydantic import Field

from keural.recipe.base import Spec

MAX_TEMPERATURE = 100.0
MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
MAX_NEW_TOKENS = 1_000_000
MAX_SEED = 2**63 - 1
"""Bounds of how an answer is sampled, for recipes, options and engines."""


class ExactMatchSpec(Spec):
    """Held-out exact match, greedy: the toy world's items, by task and language, and its preference pairs."""

    items_per_task: int = Field(60, gt=0, le=1_000_000)
    pairs: int = Field(200, gt=0, le=1_000_000)
    max_new_tokens: int = Field(48, gt=0, le=MAX_NEW_TOKENS)


class BitsPerByteSpec(Spec):
    """Bits per byte on held-out text, with `xz -9` on the same text beside it."""

    name: str
    stage: str
    """The stage whose held-out documents are measured."""
    language: str | None = None
    """Only documents of this language."""
    max_bytes: int = Field(200_000, gt=0)


class EvaluationSpec(Spec):
    """What is measured at the end (and, for before-and-after figures, on the models named by each measure)."""

    exact_match: ExactMatchSpec | None = None
    bits_per_byte: list[BitsPerByteSpec] = Field(default_factory=list)


class ChatSpec(Spec):
    """Defaults of a chat with the final model, and the prompts whose answers the report shows."""

    system: str | None = None
    temperature: float = Field(0.7, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(0.9, gt=0, le=1)
    repetition_penalty: float = Field(1.1, ge=MIN_PENALTY, le=MAX_PENALTY)
    max_new_tokens: int = Field(256, gt=0, le=MAX_NEW_TOKENS)
    samples: list[str] = Field(default_factory=list)
