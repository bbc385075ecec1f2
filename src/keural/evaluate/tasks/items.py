"""What is asked: one item of a task with its prompt made, and what a scorer is asked about it.

In: nothing; these are the types that kinds, scorers and results share. An `Item` is text; a `Request` is token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from keural.data.records import Document, EvaluationItem, PreferencePair
from keural.errors import UserError
from keural.serve.batching.requests import End
from keural.tokenizer import Message


@dataclass(frozen=True)
class Item:
    """One item of a task."""

    id: str
    """Of its content; of items that are the same the later ones have a number added."""
    number: int
    """Its place in the set, from 0."""
    cluster: str | None
    prompt: str
    """The question as text, with what stands before it."""
    choices: tuple[str, ...]
    """Texts of which the more probable ones are looked for; none for other kinds."""
    right: tuple[bool, ...]
    """Which of the choices are right."""
    record: EvaluationItem | PreferencePair | Document
    """What was read from the set."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What templates know of it."""
    messages: tuple[Message, ...] = ()
    """The conversation that the choices answer, where it is one."""


@dataclass(frozen=True)
class Draft:
    """What a kind makes of a record before examples and numbers are added."""

    question: str
    choices: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    shown: str | None = None
    """Question and answer, as an example for other items; None where it cannot be one."""
    preamble: str = ""
    """What stands before examples and question."""


class Unusable(Exception):
    """An item that is not asked; `reason` is what it is counted under, a short word, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Likelihood:
    """How probable are these tokens after those?"""

    context: tuple[int, ...]
    """At least one token."""
    continuation: tuple[int, ...]
    """At least one token."""

    @property
    def length(self) -> int:
        """Tokens that a network reads for it: the last one is only predicted."""
        return len(self.context) + len(self.continuation) - 1


@dataclass(frozen=True)
class LogProb:
    """The answer to a `Likelihood`."""

    total: float
    """Sum of the tokens' log-probabilities, in nats."""
    greedy: bool
    """Whether each of them was the most probable token."""


@dataclass(frozen=True)
class Writing:
    """What would be written after these tokens?"""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts before which it ends."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Written(NamedTuple):
    """The answer to a `Writing`: its text, how many tokens were written, and why it ended."""

    text: str
    tokens: int
    end: End


def refuse_no_items(task: str, left_out: Mapping[str, int], first: str) -> UserError:
    """What to say of a task of which nothing can be asked."""
    counted = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    why = [f" ({counted})"] if counted else [] if first else [" (the set is empty)"]
    return UserError(f"task {task}: no item can be asked{''.join(why)}{f': {first}' if first else ''}")
