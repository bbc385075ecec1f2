"""What an evaluation came to: one record an item, and the records of a task.

In: what a scorer found of an item. Out: plain values that are written as JSON and read back unchanged. Everything that a table, a
comparison or a report says of a task is computed from these records, so that nothing in them can be said that is not kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["choice", "rolling", "pair", "generate"]
"""How a task is asked: which of several texts is most probable, how many bits a text takes, which of two answers is preferred,
what is answered.
"""


@dataclass(frozen=True)
class ItemResult:
    """One item of a task, asked and judged."""

    id: str
    """Of the item's content: the same in every model's results, whatever was left out or how many examples stood before it."""
    cluster: str | None
    """What the item shares with others that are not independent of it (a subject, a passage); None where it shares nothing."""
    score: float
    """In [0, 1]; for `rolling` the bits that the text takes, whose bytes are `details["bytes"]`."""
    question: str
    """The prompt as text, examples included."""
    expected: str
    """The right answer as text; empty where there is none."""
    given: str
    """What the model answered or chose."""
    logprobs: tuple[float, ...] | None
    """In nats, one for each choice or side, in their order; None where nothing was compared."""
    tokens: int
    """That the model read for this item."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is known of it, as JSON values: other rules' scores, counts of tokens and characters, what was cut."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object that `from_json` reads back."""
        return asdict(self) | {"logprobs": None if self.logprobs is None else list(self.logprobs)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ItemResult":
        """What `to_json` made. Raises `pydantic.ValidationError` for anything else."""
        checked = _ItemFile.model_validate(value).model_dump()
        return cls(**checked | {"logprobs": None if checked["logprobs"] is None else tuple(checked["logprobs"])})


class _ItemFile(BaseModel):
    """The types of an item's keys in a file."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    id: str
    cluster: str | None
    score: float
    question: str
    expected: str
    given: str
    logprobs: list[float] | None
    tokens: int
    details: dict[str, Any]


@dataclass(frozen=True)
class TaskResults:
    """A task's items as one model answered them."""

    task: str
    """Its name, lm-eval's where lm-eval has it."""
    language: str
    """ISO 639-1 code of what is asked."""
    kind: Kind
    chance: float | None
    """Score of who knows nothing; None where there is no such thing."""
    digest: str
    """Of everything that determines what is asked: the task's settings, its examples, the contents of its files."""
    items: Sequence[ItemResult]
    """In the order of the set."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Items that were not asked, counted by reason."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Scores of who does not read: the length's of pairs, the packers' bits per byte of texts."""
