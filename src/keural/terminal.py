"""What is said while a command works."""

from keural.errors import UserError


def say(text: str) -> None:
    """A line about the work on standard output; what it quotes is made harmless as in an error."""
    print(UserError(text), flush=True)
