"""What is measured at the end, and how the final model chats."""

from pydantic import Field

from keural.card import CARD
from keural.limits import LARGEST, LARGEST_ANSWER, LARGEST_PENALTY, LARGEST_TEMPERATURE, SMALLEST_PENALTY
from keural.recipe.base import Spec, not_for


class ExactMatchSpec(Spec):
    """Held-out exact match, greedy: the toy world's items, by task and language, and its preference pairs."""

    items_per_task: int = Field(60, gt=0, le=1_000_000)
    """Held-out items of each task and language whose greedy answers are compared."""
    pairs: int = Field(200, gt=0, le=1_000_000)
    """Held-out preference pairs; counted is how often the better answer is the more probable one."""
    max_new_tokens: int = Field(48, gt=0, le=LARGEST_ANSWER)
    """Longest answer in tokens; one that is cut off is wrong."""


class BitsPerByteSpec(Spec):
    """Bits per byte on held-out text, with `xz -9` on the same text beside it."""

    name: str
    """What the report calls the measure."""
    stage: str
    """The stage whose held-out documents are measured."""
    language: str | None = None
    """Only documents of this language."""
    sources: list[str] = Field(default_factory=list)
    """Only documents of the sources with these names; none: of all."""
    max_bytes: int = Field(200_000, gt=0)
    """Measure on at most this many bytes of text (UTF-8), whole documents from the first on."""
    overlap: int = Field(0, ge=0, le=LARGEST)
    """Documents are read in windows of the stage's data.sequence_length; so many tokens of a window are those that the one before
    ended with, which are not counted again: every token but the first ones is predicted from at least so many."""


class EvaluationSpec(Spec):
    """What is measured at the end (and, for before-and-after figures, on the models named by each measure)."""

    exact_match: ExactMatchSpec | None = None
    """Exact match and preferences on the toy world; for a model of other data there is no use in it."""
    bits_per_byte: list[BitsPerByteSpec] = Field(default_factory=list)
    """Measures on held-out text; each shows the untrained model, the last pretraining stage and the final model."""


class ChatSpec(Spec):
    """Defaults of a chat with the final model, and the prompts whose answers the report shows."""

    system: str | None = None
    """System message of a chat that names none; none by default."""
    temperature: float = not_for(("evaluation",), CARD.temperature, ge=0, le=LARGEST_TEMPERATURE)
    """Logits are divided by it before a token is drawn; 0 always takes the most probable one."""
    top_p: float = not_for(("evaluation",), CARD.top_p, gt=0, le=1)
    """Draw from the smallest set of tokens with at least this probability."""
    repetition_penalty: float = not_for(("evaluation",), CARD.repetition_penalty, ge=SMALLEST_PENALTY, le=LARGEST_PENALTY)
    """Logits of tokens that were there already: positive ones are divided by it, negative ones multiplied; 1 is none."""
    max_new_tokens: int = Field(CARD.max_new_tokens, gt=0, le=LARGEST_ANSWER)
    """Longest answer in tokens."""
    samples: list[str] = Field(default_factory=list)
    """Prompts that the final model answers, greedily and in at most 64 tokens, for the summary and the report."""
