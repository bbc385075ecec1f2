"""The user's kind of error.

Anything the user can mend (a wrong recipe, a missing file, bad rows, a full disk) is raised as `UserError`, whose message says on
one line what is wrong, where, and what to do. The command line prints that line and exits with code 2. What only a programming
mistake can cause is an `assert` or an ordinary exception.
"""


class UserError(Exception):
    """A mistake the user can mend; `str(error)` is one line: what, where, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
