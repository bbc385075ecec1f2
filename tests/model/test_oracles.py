"""The network against two independent implementations of transformers: Mixtral and GraniteMoeSWA."""

from typing import Any

import pytest
import torch
from transformers import GraniteMoeSWAConfig, GraniteMoeSWAForCausalLM, MixtralConfig, MixtralForCausalLM

from keural.model import KeuralConfig
from tests.helpers.tiny_network import MakeModel, Tokens

Weights = dict[str, torch.Tensor]

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
    "tie_word_embeddings", "head_dim",
)  # fmt: skip


def shared(config: KeuralConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED}


@torch.no_grad()
def test_mixtral_with_full_attention_is_the_same_network(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(layer_types=["full_attention"] * 4), tokens(2, 40)
    mixtral = MixtralForCausalLM(MixtralConfig(**shared(model.config), sliding_window=None)).eval()
    mixtral.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, mixtral(ids).logits, atol=1e-5, rtol=1e-4)


def as_granite(state_dict: Weights, heads: int) -> Weights:
    """Our weights under Granite's names, with sinks so low that no probability drains into them."""
    names = {".mlp.gate.": ".block_sparse_moe.router.", ".mlp.experts.": ".block_sparse_moe.experts."}
    renamed = {}
    for name, weight in state_dict.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = weight
        if name.endswith("q_proj.weight"):
            renamed[name.replace("q_proj.weight", "sinks")] = torch.full((heads,), -1e4)
    return renamed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_granite_moe_swa_with_silent_sinks_is_the_same_network(tiny_model: MakeModel, tokens: Tokens, attention: str) -> None:
    model, ids = tiny_model(attn_implementation=attention), tokens(2, 40)
    assert model.config.head_dim is not None
    config = GraniteMoeSWAConfig(
        **shared(model.config),
        sliding_window=model.config.sliding_window,
        layer_types=model.config.layer_types,
        attention_multiplier=model.config.head_dim**-0.5,
        attn_implementation="eager",
    )
    granite = GraniteMoeSWAForCausalLM(config).eval()
    granite.load_state_dict(as_granite(model.state_dict(), model.config.num_attention_heads))
    torch.testing.assert_close(model(ids).logits, granite(ids).logits, atol=1e-5, rtol=1e-4)
