"""The table of what each field of the configuration is for: it is complete, and it is true of the network."""

from typing import Any

import pytest
import torch

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.model.config_fields import FIELDS, differences, foreign_ids
from tests.helpers.tiny_network import MakeConfig

OTHER: dict[str, Any] = {
    "hidden_act": "gelu",
    "rms_norm_eps": 0.1,
    "sliding_window": 3,
    "layer_types": ["full_attention"] * 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "num_experts_per_tok": 1,
    "max_position_embeddings": 9999,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "initializer_range": 0.5,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.5,
    "output_router_logits": True,
    "use_cache": False,
}
"""Another value for every field that leaves the tensors' shapes as they are."""
SHAPES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_local_experts", "tie_word_embeddings",
}  # fmt: skip
"""Fields that the tensors show."""


def declared() -> set[str]:
    """Fields that the configuration class itself declares."""
    return {name for name in KeuralConfig.__annotations__ if "ClassVar" not in str(KeuralConfig.__annotations__[name])}


def test_every_field_of_the_configuration_has_a_row() -> None:
    assert set(FIELDS) == declared(), "say in keural.model.config_fields what a new field changes, then in keural.convert.carried"
    assert set(FIELDS) == set(OTHER) | SHAPES


@pytest.mark.parametrize("name", OTHER)
@torch.no_grad()
def test_what_the_table_says_of_a_field_is_so(tiny_config: MakeConfig, name: str) -> None:
    """With the same weights: a field of the network gives other logits (or another longest context), any other gives the same."""
    config = tiny_config()
    torch.manual_seed(0)
    model = KeuralMoECausalLM(config).eval()
    changed = KeuralMoECausalLM(tiny_config(**{name: OTHER[name]})).eval()
    changed.load_state_dict(model.state_dict())
    ids = torch.arange(2, 42)[None]

    same = torch.equal(model(ids).logits, changed(ids).logits)

    assert same == (FIELDS[name] != "network" or name == "max_position_embeddings")
    assert [found.name for found in differences(config, changed.config)] == ([name] if FIELDS[name] == "network" else [])


def test_layers_are_shown_by_where_they_slide(tiny_config: MakeConfig) -> None:
    (found,) = differences(tiny_config(layer_types=OTHER["layer_types"]), tiny_config())
    assert found == ("layer_types", "full attention everywhere", "sliding on 0, 2")
    assert differences(tiny_config(layer_types=OTHER["layer_types"]), tiny_config(), ("layer_types",)) == []
    (found,) = differences(tiny_config(rope_parameters=OTHER["rope_parameters"]), tiny_config())
    assert found.first == "rope_theta 100.0, rope_type default"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"eos_token_id": 2}, []),
        ({"eos_token_id": [2, 60]}, []),
        ({"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}, []),
        ({"eos_token_id": [2, 7]}, ["eos_token_id [2, 7] instead of 2 or 60"]),
        ({"pad_token_id": 3, "bos_token_id": 0}, ["pad_token_id 3 instead of 0", "bos_token_id 0 instead of 1"]),
    ],
)
def test_special_ids_are_those_of_a_tokenizer_or_not_said(
    tiny_config: MakeConfig, changes: dict[str, Any], found: list[str]
) -> None:
    assert foreign_ids(tiny_config(**changes), 0, 1, {2, 60}) == found
