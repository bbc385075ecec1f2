"""Where a stage's first weights come from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keural.errors import UserError
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.train.initial.weights import initial_model

CPU = torch.device("cpu")
SHA = "0" * 64


def saved_base(make_config: Callable[..., KeuralConfig], directory: Path, missing: int) -> KeuralMoECausalLM:
    """A base model whose vocabulary lacks the last `missing` ids."""
    size = make_config().vocab_size - missing
    base = KeuralMoECausalLM(make_config(vocab_size=size, eos_token_id=2))
    base.save_pretrained(directory)
    return base


def test_a_base_model_without_chatml_rows_gets_them_at_the_mean(make_config: Callable[..., KeuralConfig], tmp_path: Path) -> None:
    base = saved_base(make_config, tmp_path, missing=2)
    model = initial_model(make_config(), tmp_path, seed=0, device=CPU, compiled=False, tokenizer_sha=SHA)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.config.vocab_size == make_config().vocab_size
    assert torch.equal(rows[:-2], base.get_input_embeddings().weight)
    torch.testing.assert_close(rows[-2:], base.get_input_embeddings().weight.mean(0).expand(2, -1))


def test_any_other_vocabulary_is_refused(make_config: Callable[..., KeuralConfig], tmp_path: Path) -> None:
    saved_base(make_config, tmp_path, missing=3)
    with pytest.raises(UserError, match="vocab_size"):
        initial_model(make_config(), tmp_path, seed=0, device=CPU, compiled=False, tokenizer_sha=SHA)


def test_random_weights_depend_on_the_seed_alone(make_config: Callable[..., KeuralConfig]) -> None:
    weights = [initial_model(make_config(), None, seed, CPU, compiled=False, tokenizer_sha=SHA) for seed in (1, 1, 2)]
    first, again, other = (model.state_dict() for model in weights)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
