"""Servers that tests can hold up."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import Running
from tests.helpers.serving import serving


@pytest.fixture
def start(tokenizer: KeuralTokenizer) -> Iterator[Callable[..., tuple[Running, httpx.Client]]]:
    """Starts servers; keywords are settings."""
    with contextlib.ExitStack() as stack:

        def begin(**settings: Any) -> tuple[Running, httpx.Client]:
            running = Running(tokenizer, **settings)
            client = stack.enter_context(serving(running.service))
            stack.callback(running.held.open.set)
            return running, client

        yield begin
