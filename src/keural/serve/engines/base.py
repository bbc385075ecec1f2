"""What an engine is: something that continues token ids."""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from keural.serve.engines.sampling_params import SamplingParams
from keural.tokenizer import KeuralTokenizer

Finish = Literal["stop", "length", "context"]
"""Why an answer ended: a stop token, `max_new_tokens`, or the end of the context."""


class Engine(Protocol):
    """Something that continues token ids."""

    tokenizer: KeuralTokenizer
    context_length: int
    """Tokens of prompt and answer together."""
    unverified: str | None
    """One line for the user where not all that was read could be compared with checksums."""

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams, stop: Collection[int]) -> Generator[int, None, Finish]:
        """Yield the answer's ids without the stop token, then return why it ended; closing the generator cancels.

        Raises `UserError` when the prompt leaves no room for an answer.
        """


@dataclass(frozen=True)
class EngineKind:
    """An engine that can be asked for by name."""

    suits: Callable[[Path], bool]
    """Whether a path looks like something it runs."""
    find: Callable[[Path], Path]
    """What it would run of a path: a directory or a file. Raises `UserError`, saying what to do, when there is nothing for it."""
    open: Callable[[Path, int | None], Engine]
    """Loads what `find` gave, to run on so many threads; None leaves the number to the engine. Raises `UserError`."""
