"""From the tokens of one answer to its text, piece by piece, with stop strings and log-probabilities.

In: tokens as the scheduler gives them. Out: text that may be shown, and with it the tokens that it begins with. What is given
together does not depend on how the tokens came: streamed or not, an answer is the same.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from keural.serve.batching.requests import Chosen
from keural.serve.calls import Places, StopsBesideCalls
from keural.serve.stops import StopStrings
from keural.tokenizer import KeuralTokenizer


@dataclass(slots=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    """Those whose text begins in what was given so far."""
    starts: list[int] = field(default_factory=list)
    """For each of them where in the text of the answer it begins, in characters."""

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Pieces:
    """The text of one answer."""

    def __init__(self, tokenizer: KeuralTokenizer, spell: Callable[[str], str], stops: Sequence[str], places: Places = "") -> None:
        """`places`: there may be calls of tools in it, which no stop string cuts."""
        self._decoder, self._spell = tokenizer.stream_decoder(), spell
        self._stops = StopsBesideCalls(stops, places) if places else StopStrings(stops)
        self._decoded = self._given = 0
        """Characters of the answer, and those that were given."""
        self._waiting: deque[tuple[int, Chosen]] = deque()
        self.count = 0
        """Tokens so far: up to the one that completed a stop string."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that the answer came to."""
        return self._stops.found

    def push(self, tokens: Sequence[Chosen]) -> Piece:
        """What may be shown after these tokens; those after a stop string are dropped."""
        text = ""
        for token in tokens:
            if self.stopped_by is not None:
                break
            self.count += 1
            self._waiting.append((self._decoded, token))
            text += self._decode(self._decoder.push(token.id))
        return self._piece(text)

    def finish(self) -> Piece:
        """What is left at the end: held back for a stop string that did not come, or half a character."""
        if self.stopped_by is not None:
            self._waiting.clear()
            return Piece()
        text = self._decode(self._decoder.flush())
        if self.stopped_by is None:
            text += self._stops.flush()
        if self.stopped_by is not None:
            return self._piece(text)
        self._given += len(text)
        tokens, self._waiting = [*self._waiting], deque()
        return Piece(text, [token for _, token in tokens], [start for start, _ in tokens])

    def _decode(self, text: str) -> str:
        text = self._spell(text)
        self._decoded += len(text)
        return self._stops.push(text)

    def _piece(self, text: str) -> Piece:
        self._given += len(text)
        piece = Piece(text)
        while self._waiting and self._waiting[0][0] < self._given:
            start, token = self._waiting.popleft()
            piece.tokens.append(token)
            piece.starts.append(start)
        return piece
