"""Stop strings over a stream: what may be shown already, and where the text ends.

In: pieces of text as they come. Out: text that no stop string can begin in any more. How the text was cut into pieces does not
matter: together they give what stands before the first stop string of the whole text.
"""

from collections.abc import Sequence


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None
        """The string that ended the text; where two begin at the same place, the one that was whole first."""

    def push(self, piece: str) -> str:
        """What of the text up to here may be shown: all but its longest end that a stop string begins with."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        place, stop = self._first(text)
        if stop is not None:
            self.found, self._held = stop, ""
            return text[:place]
        shown = len(text) - self._open_end(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str | None]:
        """The stop string that is whole first, as if the text came by single characters, and where it begins."""
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if not found:
            return -1, None
        end, length, stop = min(found)
        return end + length, stop

    def _open_end(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
