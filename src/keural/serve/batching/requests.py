"""What is asked of the scheduler, and what it answers.

In: token ids with settings. Out: events: the tokens of each step, and one end.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from keural.serve.engines.base import Finish
from keural.serve.engines.sampling_params import SamplingParams

End = Finish | Literal["cancelled", "deadline", "error", "unavailable", "refused"]
"""Why an answer ended; `error`: its network failed, or its constraint did. Of servers elsewhere only: `unavailable` where none took
the request, `refused` where one found it impossible."""


class Constraint(Protocol):
    """Which tokens may come next, for answers of a given form. It has a state, so each answer has its own."""

    def allowed(self) -> NDArray[np.bool_]:
        """Marks `[V]` of the tokens that may come next, at least one."""

    def take(self, token: int) -> None:
        """Go on to the token that came."""


@dataclass(frozen=True)
class Request:
    """One answer that is asked for."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    stop_ids: Collection[int] = ()
    """An answer ends before such a token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids, before the repetition penalty."""
    top_logprobs: int | None = None
    """With every token its log-probability and those of so many most probable ones, by the network's own distribution: before bias,
    penalty and temperature. None: without."""
    constraint: Constraint | None = None
    seconds: float | None = None
    """From now on until it is cut off, waiting included."""


class Chosen(NamedTuple):
    """A token of an answer."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    """The most probable tokens with their log-probabilities, best first."""


class Event(NamedTuple):
    """What became of a request since its last event. Its last one has an `end`, and there is exactly one such."""

    tokens: Sequence[Chosen] = ()
    end: End | None = None
    error: str | None = None
    """One line for whoever asked, where the end is an error."""


class QueueFull(Exception):
    """So many requests wait that another one would wait too long. `retry_after` is in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after:.0f} s")
        self.waiting, self.retry_after = waiting, retry_after
