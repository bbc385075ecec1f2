"""Bounds on work where work is only seen by the time that it takes."""

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes no more time of the processor in this thread, whatever else the machine does meanwhile.

    What grows with the square of its input takes a hundred times as long as it should; a slow machine takes some times as long. So
    `seconds` is far from both.
    """
    begun = time.thread_time()
    yield
    assert time.thread_time() - begun < seconds
