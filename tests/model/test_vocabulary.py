"""Rows for added tokens start at the mean of the others."""

import pytest
import torch

from keural.model import grow_vocabulary
from tests.helpers.tiny_network import MakeModel, Tokens


def test_new_embedding_rows_start_at_the_mean_of_the_others(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    before, embedding = model(ids).logits, model.get_input_embeddings().weight.detach().clone()

    grow_vocabulary(model, embedding.shape[0] + 2)

    grown = model.get_input_embeddings().weight
    assert model.config.vocab_size == grown.shape[0] == embedding.shape[0] + 2
    assert model.lm_head.weight is grown
    assert torch.equal(grown[:-2], embedding)
    torch.testing.assert_close(grown[-2:], embedding.mean(0).expand(2, -1))
    torch.testing.assert_close(model(ids).logits[..., :-2], before)
    torch.testing.assert_close(model(ids).logits[..., -1], before.mean(-1))


def test_a_vocabulary_does_not_shrink(tiny_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="cannot shrink"):
        grow_vocabulary(tiny_model(), 10)
