"""Adapters need PEFT; the number of threads is fixed as for all training."""

import pytest

from tests.helpers.threads import one_thread

__all__ = ["one_thread"]

pytest.importorskip("peft", reason="adapters are trained through PEFT: pip install 'keural[lora]'")
