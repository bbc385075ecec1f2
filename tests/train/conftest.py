"""Makes this folder's helper module importable, for tests and for the processes they start, and fixes the number of threads."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-identical results are compared between processes, so all of them use as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
