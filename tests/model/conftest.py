"""A tiny Keural model whose window is short and whose weights are large enough that every mistake shows."""

from typing import Any

import pytest
import torch

from keural.model import KeuralConfig, KeuralMoECausalLM
from tests.helpers.shapes import TINY
from tests.helpers.tiny_network import MakeConfig, MakeModel, Tokens


@pytest.fixture
def tiny_config() -> MakeConfig:
    """Make a tiny configuration; keyword arguments replace its values."""
    return lambda **changes: KeuralConfig(**(TINY | {"max_position_embeddings": 1024, "initializer_range": 0.3} | changes))


@pytest.fixture
def tiny_model(tiny_config: MakeConfig) -> MakeModel:
    """Make a tiny model in evaluation mode with eager experts; norms are drawn too, so that they matter."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> KeuralMoECausalLM:
        torch.manual_seed(seed)
        config = tiny_config(experts_implementation="eager", **changes)
        model = KeuralMoECausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        converted: KeuralMoECausalLM = model.to(dtype).eval()
        return converted

    return make


@pytest.fixture
def tokens() -> Tokens:
    """Draw token ids ``[rows, length]``."""

    def draw(rows: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))

    return draw
