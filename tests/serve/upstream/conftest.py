"""Fixtures around our server before fakes."""

from collections.abc import Iterator
from functools import partial

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
def shared_front(kind: str, front: Front, tokenizer: KeuralTokenizer) -> Iterator[Fronted]:
    with front(kind, an_engine(tokenizer, cached=None)) as fronted:
        yield fronted


@pytest.fixture
def fronted(shared_front: Fronted, tokenizer: KeuralTokenizer) -> Iterator[Fronted]:
    """A front whose fake is as it was in the beginning; for tests that change nothing else."""
    yield shared_front
    engine, fresh = shared_front.engine, an_engine(tokenizer, cached=None)
    for name, value in vars(fresh).items():
        setattr(engine, name, value)
    wait_until(lambda: shared_front.upstreams.servers[0].trouble is None)
