"""What is measured at the end, and how the final model chats."""

from pydantic import Field

from keural.recipe.base import Spec
from keural.recipe.sampling import CARD


class ExactMatchSpec(Spec):
    """Held-out exact match, greedy: the toy world's items, by task and language, and its preference pairs."""

    items_per_task: int = Field(60, gt=0)
    pairs: int = Field(200, gt=0)
    max_new_tokens: int = Field(48, gt=0)


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
    temperature: float = Field(CARD.temperature, ge=0)
    top_p: float = Field(CARD.top_p, gt=0, le=1)
    repetition_penalty: float = Field(CARD.repetition_penalty, gt=0)
    max_new_tokens: int = Field(CARD.max_new_tokens, gt=0)
    samples: list[str] = Field(default_factory=list)
