"""The user's kind of error.

Anything the user can mend (a wrong recipe, a missing file, bad rows, a full disk) is raised as `UserError`, whose message says on
one line what is wrong, where, and what to do. The command line prints that line and exits with code 2. What only a programming
mistake can cause is an `assert` or an ordinary exception.
"""

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; `str(error)` is one line: what, where, what to do."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # What the message quotes may come from a stranger's file, and a terminal obeys escape sequences.
        super().__init__("".join(character for character in line if unicodedata.category(character) != "Cc"))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the known name most like `name`, or nothing when none is like it."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" (did you mean {match[0]!r}?)" if match else ""
