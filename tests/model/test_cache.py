"""Cached decoding, padding, and the logits that are asked for."""

from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from keural.model import KeuralMoECausalLM
from keural.model.modeling_keural import CACHE_NAME
from tests.helpers.tiny_network import MakeModel, Tokens, decoder_layers


def make_cache(kind: str, model: KeuralMoECausalLM) -> Cache:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [[1] * 24, [5] + [1] * 19, [15] + [1] * 9, [7, 6, 11], [12, 12]])
@torch.no_grad()
def test_cached_decoding_across_the_window_is_recomputing(
    tiny_model: MakeModel, tokens: Tokens, kind: str, pieces: list[int], attention: str
) -> None:
    model, ids = tiny_model(torch.float64, attn_implementation=attention), tokens(2, 24)
    expected = model(ids, use_cache=False).logits
    cache = make_cache(kind, model)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_made_cache_holds_only_the_window_on_sliding_layers(tiny_model: MakeModel, tokens: Tokens) -> None:
    cache = tiny_model()(tokens(1, 30), use_cache=True).past_key_values
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [8, 30, 8, 30]  # the token to come is the ninth


def test_no_cache_is_returned_unless_used(tiny_model: MakeModel, tokens: Tokens) -> None:
    assert tiny_model()(tokens(1, 4), use_cache=False).past_key_values is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padding_changes_nothing(tiny_model: MakeModel, tokens: Tokens, attention: str) -> None:
    model, long, short = tiny_model(torch.float64, attn_implementation=attention), tokens(1, 20), tokens(1, 13, seed=2)
    batch = torch.cat((long, torch.nn.functional.pad(short, (7, 0))))
    mask = torch.ones_like(batch)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0], model(long).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, 7:], model(short).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prepared_masks_are_taken_as_they_are(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    mask = (torch.arange(20) >= 4).long()[None]
    arguments = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": mask,
        CACHE_NAME: None,
    }
    prepared = {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }
    torch.testing.assert_close(model(ids, attention_mask=prepared).logits, model(ids, attention_mask=mask).logits)


def test_embeddings_can_take_the_place_of_ids(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(1, 6)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
    cases: tuple[dict[str, Any], ...] = ({}, {"input_ids": ids, "inputs_embeds": embeddings})
    for nothing_or_both in cases:
        with pytest.raises(ValueError, match="exactly one"):
            model(**nothing_or_both)


Keep = int | torch.Tensor
KEEP: list[tuple[Keep, slice | list[int]]] = [
    (1, slice(-1, None)),
    (3, slice(-3, None)),
    (0, slice(None)),
    (torch.tensor([0, 4]), [0, 4]),
]


@pytest.mark.parametrize(("keep", "expected"), KEEP)
@pytest.mark.parametrize("recorded", [{}, {"output_hidden_states": True}, {"output_router_logits": True}])
def test_only_the_logits_asked_for_are_computed(
    tiny_model: MakeModel, tokens: Tokens, keep: Keep, expected: slice | list[int], recorded: dict[str, bool]
) -> None:
    model, ids = tiny_model(), tokens(2, 6)
    output = model(ids, logits_to_keep=keep, **recorded)
    torch.testing.assert_close(output.logits, model(ids).logits[:, expected])
    if "output_hidden_states" in recorded:
        assert {tuple(states.shape[:2]) for states in output.hidden_states} == {(2, 6)}
    if "output_router_logits" in recorded:
        assert [logits.shape[0] for logits in output.router_logits] == [12] * len(model.model.layers)


def test_the_last_block_mixes_experts_only_for_the_logits_asked_for(tiny_model: MakeModel, tokens: Tokens) -> None:
    model = tiny_model()
    seen: list[int] = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    cache = model(tokens(2, 6), logits_to_keep=1, use_cache=True).past_key_values
    assert seen == [6] * (len(model.model.layers) - 1) + [1]
    assert cache.get_seq_length() == 6
