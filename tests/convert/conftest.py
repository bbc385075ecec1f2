"""Foreign checkpoints, made by an independent model with the published names."""

from pathlib import Path

import pytest
import torch

from keural.tokenizer import KeuralTokenizer
from tests.helpers.published_model import SHAPE, PublishedModel, Tensors, training_checkpoint


@pytest.fixture(scope="session")
def published() -> PublishedModel:
    """A random published-style model with the ids of the `tokenizer` fixture."""
    torch.manual_seed(3)
    return PublishedModel(SHAPE).eval()


@pytest.fixture
def state_dict(published: PublishedModel) -> Tensors:
    """Its tensors, a copy to change."""
    return {name: tensor.detach().clone() for name, tensor in published.state_dict().items()}


@pytest.fixture
def published_pt(tmp_path: Path, state_dict: Tensors, tokenizer: KeuralTokenizer) -> Path:
    """A published training checkpoint with its tokenizer beside it."""
    source = tmp_path / "source"
    source.mkdir()
    torch.save(training_checkpoint(state_dict), source / "checkpoint_29112.pt")
    tokenizer.save(source)
    (source / "tokenizer.model").rename(source / "keural_tokenizer.model")
    return source / "checkpoint_29112.pt"
