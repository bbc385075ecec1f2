"""Fixtures around our server before fakes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial

import pytest

from keural.tokenizer import KeuralTokenizer
from tests.helpers.fronting import KINDS, Front, Fronted, an_engine, fronting
from tests.helpers.serving import wait_until


@pytest.fixture(scope="session")
def front(tokenizer: KeuralTokenizer) -> Front:
    """Puts our server before fakes of a kind."""
    return partial(fronting, tokenizer)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def shared_fronts(front: Front, tokenizer: KeuralTokenizer) -> Iterator[Callable[[str], Fronted]]:
    """A front of each kind that is asked for, once for all tests of a file: to start and end one takes longer than most of them."""
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(front(kind, an_engine(tokenizer, cached=None))))


@pytest.fixture
def fronted(kind: str, shared_fronts: Callable[[str], Fronted], tokenizer: KeuralTokenizer) -> Iterator[Fronted]:
    """A front whose fake is as it was in the beginning; for tests that change nothing else."""
    found = shared_fronts(kind)
    yield found
    engine, fresh = found.engine, an_engine(tokenizer, cached=None)
    for name, value in vars(fresh).items():
        setattr(engine, name, value)
    wait_until(lambda: found.upstreams.servers[0].trouble is None)
