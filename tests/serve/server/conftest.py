"""Servers that tests can hold up, and strict clients of those that write what a file's `slots` say."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from keural.serve.batching import scheduler
from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import LaterClock, Running
from tests.helpers.serving import PATIENCE, Writing, service_of, serving

STRICT: dict[str, Any] = {"api_key": "none", "_strict_response_validation": True, "max_retries": 0, "timeout": PATIENCE}
"""Settings of clients that take no answer which their library does not describe, and that fail at the first error."""


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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> LaterClock:
    """What the scheduler of an embedded network reads the time from; deadlines pass when a test says so."""
    later = LaterClock()
    told = SimpleNamespace(monotonic=later.monotonic, perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr(scheduler, "time", told)
    return later


@pytest.fixture(scope="module")
def plain(tokenizer: KeuralTokenizer, slots: Writing) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, slots, trained_on_tools=True)) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(plain: httpx.Client) -> OpenAI:
    return OpenAI(
        base_url=f"{plain.base_url}/v1", api_key="none", _strict_response_validation=True, max_retries=0, timeout=PATIENCE
    )


@pytest.fixture(scope="module")
def claude(plain: httpx.Client) -> Anthropic:
    return Anthropic(
        base_url=str(plain.base_url), api_key="none", _strict_response_validation=True, max_retries=0, timeout=PATIENCE
    )
