"""Servers that tests can hold up, and strict clients of those that write what a file's `slots` say."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import Running
from tests.helpers.serving import Writing, service_of, serving


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


@pytest.fixture(scope="module")
def plain(tokenizer: KeuralTokenizer, slots: Writing) -> Iterator[httpx.Client]:
    with serving(service_of(tokenizer, slots, trained_on_tools=True)) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(plain: httpx.Client) -> OpenAI:
    return OpenAI(base_url=f"{plain.base_url}/v1", api_key="none", _strict_response_validation=True, max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def claude(plain: httpx.Client) -> Anthropic:
    return Anthropic(base_url=str(plain.base_url), api_key="none", _strict_response_validation=True, max_retries=0, timeout=20)
