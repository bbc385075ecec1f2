"""The configuration: published defaults, what it refuses, and the parameter count in closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keural.model import KeuralConfig, KeuralMoECausalLM, count_parameters
from tests.helpers.tiny_network import MakeConfig


def test_defaults_are_the_published_model() -> None:
    config = KeuralConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim, config.intermediate_size) == (24, 4096, 128, 5632)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    assert (config.num_local_experts, config.num_experts, config.num_experts_per_tok) == (8, 8, 2)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    assert (config.max_position_embeddings, config.sliding_window, config.rms_norm_eps) == (4096, 513, 1e-5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 131_073)
    assert config.tie_word_embeddings


def test_even_layers_slide_and_odd_layers_are_full() -> None:
    types = KeuralConfig().layer_types
    assert types[0::2] == ["sliding_attention"] * 12
    assert types[1::2] == ["full_attention"] * 12


def test_without_a_window_every_layer_is_full(tiny_config: MakeConfig) -> None:
    assert set(tiny_config(sliding_window=None).layer_types) == {"full_attention"}


@pytest.mark.parametrize(("vocabulary", "total"), [(131_074, 14_832_054_272), (131_072, 14_832_046_080)])
def test_published_parameter_counts(vocabulary: int, total: int) -> None:
    count = count_parameters(KeuralConfig(vocab_size=vocabulary))
    assert count.total == total
    assert total - count.active == 24 * 6 * 3 * 4096 * 5632


def test_published_active_parameters() -> None:
    assert count_parameters(KeuralConfig()).active == 4_866_387_968


def numel(config: KeuralConfig) -> int:
    with torch.device("meta"):
        model = KeuralMoECausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_count_is_the_size_of_the_built_model() -> None:
    assert numel(KeuralConfig()) == 14_832_054_272


@pytest.mark.parametrize("tied", [True, False])
def test_count_holds_for_other_shapes(tiny_config: MakeConfig, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    assert numel(config) == count_parameters(config).total


@pytest.mark.parametrize(("vocabulary", "eos"), [(131_074, 131_073), (131_072, 2), (61, 60)])
def test_end_of_turn_is_the_last_id_of_a_chat_vocabulary(tiny_config: MakeConfig, vocabulary: int, eos: int) -> None:
    assert tiny_config(vocab_size=vocabulary).eos_token_id == eos


def test_given_ids_are_kept(tiny_config: MakeConfig) -> None:
    assert tiny_config(eos_token_id=[2, 60]).eos_token_id == [2, 60]
    assert tiny_config(eos_token_id=None).eos_token_id is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "3 entries for num_hidden_layers = 4"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "linear_attention"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_experts_per_tok": 6}, "exceeds num_local_experts"),
        ({"head_dim": 7}, "must be even"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "give head_dim"),
        ({"sliding_window": 0}, "sliding_window of at least 1"),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "sliding_window of at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"eos_token_id": 61}, "outside the vocabulary"),
    ],
)
def test_impossible_combinations_are_refused(tiny_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_configuration_survives_the_disk(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(rope_theta=10_000.0, router_z_loss_coef=0.5)
    config.save_pretrained(tmp_path)
    assert KeuralConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.rope_parameters["rope_theta"] == 10_000.0
