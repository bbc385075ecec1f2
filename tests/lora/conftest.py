"""Adapters need PEFT; the number of threads is fixed as for all training."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("peft", reason="adapters are trained through PEFT: pip install 'keural[lora]'")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-identical results are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
