"""From the engine's ids to text on a screen.

In: prompt ids. Out: pieces of text, passed to a function as they arrive: whole characters only, none that a terminal would obey.
"""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from keural.serve.engine import Engine, Finish, Sampling


class Answer(NamedTuple):
    """What was written, and why it ended (`cancelled`: by Ctrl-C)."""

    text: str
    finish: Finish | Literal["cancelled"]


def stream_answer(engine: Engine, prompt_ids: Sequence[int], sampling: Sampling, write: Callable[[str], None]) -> Answer:
    """Generate until `<|im_end|>` or `</s>`, handing every piece of text to `write`; Ctrl-C ends the answer, not the program.

    Bytes that never become a character are not written. Raises `UserError` when the prompt does not fit.
    """
    decoder = engine.tokenizer.stream_decoder()
    parts: list[str] = []
    stream = engine.stream(prompt_ids, sampling, {engine.tokenizer.im_end_id, engine.tokenizer.eos_id})
    try:
        while True:
            try:
                piece = printable(decoder.push(next(stream)))
            except StopIteration as end:
                return Answer("".join(parts), end.value)
            if piece:
                parts.append(piece)
                write(piece)
    except KeyboardInterrupt:
        return Answer("".join(parts), "cancelled")
    finally:
        stream.close()


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the block quietly when nobody reads standard output any more, as in `… | head -1`."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered is written when the program ends; it must not fail there again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Text without control characters (a terminal obeys escape sequences), newline and tab excepted."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")
