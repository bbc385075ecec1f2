"""A stream of an engine, taken to its end."""

from collections.abc import Generator

from keural.serve.engines.base import Finish


def run(stream: Generator[int, None, Finish]) -> tuple[list[int], Finish]:
    """All ids of a stream, and why it ended."""
    ids: list[int] = []
    while True:
        try:
            ids.append(next(stream))
        except StopIteration as end:
            return ids, end.value
