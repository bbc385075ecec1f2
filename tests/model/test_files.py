"""Saving, loading, and loading the two source files from beside the weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import keural.model
from keural.model import KeuralConfig, KeuralMoECausalLM, KeuralMoEModel
from tests.helpers.tiny_network import MakeConfig, MakeModel, Tokens, decoder_layers

Saved = tuple[KeuralMoECausalLM, Path]
"""A model, and the directory it is saved in."""


@pytest.fixture
def saved(tiny_model: MakeModel, tmp_path: Path) -> Saved:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_every_expert_is_three_matrices_on_disk_and_the_head_is_not_saved(saved: Saved) -> None:
    model, path = saved
    with safe_open(path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config = model.config
    layer = {
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
        "self_attn.q_proj.weight": (32, 24),
        "self_attn.k_proj.weight": (16, 24),
        "self_attn.v_proj.weight": (16, 24),
        "self_attn.o_proj.weight": (24, 32),
        "mlp.gate.weight": (5, 24),
    }
    for expert in range(config.num_local_experts):
        layer |= {f"mlp.experts.{expert}.{name}_proj.weight": (20, 24) for name in ("gate", "up")}
        layer[f"mlp.experts.{expert}.down_proj.weight"] = (24, 20)
    expected = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (61, 24), "model.norm.weight": (24,)}
    assert shapes == expected


def test_gate_rows_come_first_in_the_fused_tensor(saved: Saved) -> None:
    model, path = saved
    experts = decoder_layers(model)[1].mlp.experts
    with safe_open(path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.1.mlp.experts.3.gate_proj.weight"), experts.gate_up_proj[3, :20])
        assert torch.equal(file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight"), experts.gate_up_proj[3, 20:])
        assert torch.equal(file.get_tensor("model.layers.1.mlp.experts.3.down_proj.weight"), experts.down_proj[3])


def test_reloading_gives_every_weight_back_and_keeps_the_tie(saved: Saved) -> None:
    model, path = saved
    loaded = KeuralMoECausalLM.from_pretrained(path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_auto_classes_know_the_model_once_the_package_is_imported(saved: Saved) -> None:
    _, path = saved
    assert isinstance(AutoConfig.from_pretrained(path), KeuralConfig)
    assert isinstance(AutoModel.from_pretrained(path), KeuralMoEModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(path), KeuralMoECausalLM)


def test_the_base_model_loads_the_same_weights(saved: Saved) -> None:
    model, path = saved
    base = KeuralMoEModel.from_pretrained(path)
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in model.model.state_dict().items())


def test_a_model_made_without_memory_initialises_every_weight_and_buffer(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """from_pretrained builds on the meta device: what the file lacks must be drawn, and the rotary buffers computed."""
    expected = KeuralMoECausalLM(tiny_config())
    expected.save_pretrained(tmp_path)
    lacking = tiny_config(num_hidden_layers=5)
    loaded = KeuralMoECausalLM.from_pretrained(tmp_path, config=lacking)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    for name, weight in loaded.model.layers[4].named_parameters():
        spread = weight.std().item()
        assert weight.eq(1).all() if "norm" in name else spread == pytest.approx(0.3, rel=0.25), name


def test_initialisation_is_normal_with_one_width_everywhere(tiny_config: MakeConfig) -> None:
    torch.manual_seed(0)
    model = KeuralMoECausalLM(tiny_config(hidden_size=128, intermediate_size=64, initializer_range=0.02, vocab_size=500))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(weight.mean().item()) < 0.002, name


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
path = sys.argv[1]
assert "keural" not in sys.modules
options = {"trust_remote_code": True}
model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
assert not info["missing_keys"] and not info["unexpected_keys"], info
base = AutoModel.from_pretrained(path, **options)
expected = torch.load(path + "/expected.pt", weights_only=True)
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
torch.testing.assert_close(base(expected["ids"]).last_hidden_state @ base.embed_tokens.weight.T, expected["logits"])
model.save_pretrained(path + "/again")
assert "keural" not in sys.modules
"""


@pytest.mark.slow  # a process of its own; `make test-transformers` starts it with every release
def test_the_two_files_work_beside_the_weights_without_the_package(saved: Saved, tokens: Tokens, tmp_path: Path) -> None:
    model, path = saved
    for name in ("configuration_keural.py", "modeling_keural.py"):
        shutil.copy(Path(keural.model.__path__[0]) / name, path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_keural.KeuralConfig",
        "AutoModel": "modeling_keural.KeuralMoEModel",
        "AutoModelForCausalLM": "modeling_keural.KeuralMoECausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    ids = tokens(2, 15)
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, path / "expected.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with safe_open(path / "again" / "model.safetensors", "pt") as again, safe_open(path / "model.safetensors", "pt") as first:
        assert set(again.keys()) == set(first.keys())
