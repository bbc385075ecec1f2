"""The `granite` export against the readers of vLLM 0.33 and SGLang 0.5.23, whose sources say what they take from a checkpoint.

Both have GraniteMoeSWA built in and read the file layout of transformers' class. Neither runs without a GPU, so this is a table:
the tensors that fill the parameters of their class, each of which must be there and none besides, and the configuration keys that
they read, with the place that reads them.

With KEURAL_VLLM_SOURCE or KEURAL_SGLANG_SOURCE set to the package directory of an unpacked release, its own rule for windows,
positions and sinks runs on the exported configuration too.
"""

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from keural.convert.export import ExportOptions, export
from keural.convert.granite import granite_config
from keural.model import KeuralConfig, KeuralMoECausalLM

VLLM = "vllm/model_executor/models/"
SGLANG = "sglang/srt/"


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model_dir, tmp_path_factory.mktemp("granite") / "out", "granite", ExportOptions())


@pytest.fixture(scope="module")
def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "config.json").read_text()))


class Read(NamedTuple):
    """A parameter of the engines' class: the tensors it is filled from, and the shape of each for a configuration."""

    parameter: str
    sources: tuple[str, ...]
    shapes: Callable[[KeuralConfig], list[tuple[int, ...]]]


def query_key_value(c: KeuralConfig) -> list[tuple[int, ...]]:
    width = c.hidden_size // c.num_attention_heads  # neither engine's class reads head_dim
    return [(heads * width, c.hidden_size) for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)]


LAYER = (
    Read("input_layernorm", ("input_layernorm.weight",), lambda c: [(c.hidden_size,)]),
    Read("qkv_proj", tuple(f"self_attn.{name}_proj.weight" for name in "qkv"), query_key_value),
    Read("o_proj", ("self_attn.o_proj.weight",), lambda c: [(c.hidden_size, c.hidden_size)]),
    Read("sinks", ("self_attn.sinks",), lambda c: [(c.num_attention_heads,)]),
    Read("post_attention_layernorm", ("post_attention_layernorm.weight",), lambda c: [(c.hidden_size,)]),
    Read("gate", ("block_sparse_moe.router.weight",), lambda c: [(c.num_local_experts, c.hidden_size)]),
    Read(
        "experts.w13_weight",
        ("block_sparse_moe.experts.gate_up_proj",),
        lambda c: [(c.num_local_experts, 2 * c.intermediate_size, c.hidden_size)],
    ),
    Read(
        "experts.w2_weight",
        ("block_sparse_moe.experts.down_proj",),
        lambda c: [(c.num_local_experts, c.hidden_size, c.intermediate_size)],
    ),
)
"""Read through `hf_to_vllm_mapper` of granitemoe.py and `hf_to_sglang_mapper` of models/granitemoe.py."""


def test_tensors_are_exactly_those_that_fill_the_engines_parameters(
    tensors: dict[str, torch.Tensor], model: KeuralMoECausalLM
) -> None:
    shape = model.config
    expected = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size), "model.norm.weight": (shape.hidden_size,)}
    for layer in range(shape.num_hidden_layers):
        for read in LAYER:
            names = [f"model.layers.{layer}.{source}" for source in read.sources]
            expected |= dict(zip(names, read.shapes(shape), strict=True))

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_gate_rows_come_before_up_rows(tensors: dict[str, torch.Tensor], model: KeuralMoECausalLM) -> None:
    """Both engines halve the rows and call the first half w1, which goes through the activation."""
    w1, w3 = tensors["model.layers.1.block_sparse_moe.experts.gate_up_proj"][2].chunk(2, dim=0)
    ours = model.model.layers[1].mlp.experts.gate_up_proj[2]

    assert torch.equal(w1, ours[: model.config.intermediate_size])
    assert torch.equal(w3, ours[model.config.intermediate_size :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sinks_take_no_attention_in_any_precision_an_engine_casts_them_to(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """SGLang keeps them in bfloat16 (`build_attention_sinks`), vLLM in the model's precision."""
    sinks = tensors["model.layers.0.self_attn.sinks"].to(dtype).float()
    lowest_score = torch.full_like(sinks, -1000.0)

    assert torch.stack([lowest_score, sinks]).softmax(dim=0)[1].eq(0).all()


KEYS: dict[str, tuple[Any, str]] = {
    "architectures": (["GraniteMoeSWAForCausalLM"], f"{VLLM}registry.py; {SGLANG}configs/model_config.py SWA_SINK_ARCHS"),
    "model_type": ("granitemoe_swa", f"{SGLANG}models/granite.py SWA_MODEL_TYPES; transformers' AutoConfig in both"),
    "vocab_size": (402, "embedding and head of both"),
    "hidden_size": (32, "both; the width of a head is hidden_size // num_attention_heads"),
    "intermediate_size": (24, "width of one expert in both"),
    "num_hidden_layers": (2, "both"),
    "num_attention_heads": (4, "both"),
    "num_key_value_heads": (2, "both"),
    "head_dim": (8, "vllm/transformers_utils/model_arch_config_convertor.py; model_config.py of SGLang: sizes of the cache"),
    "num_local_experts": (4, "both"),
    "num_experts_per_tok": (2, "both"),
    "hidden_act": ("silu", "assumed by both for experts, checked for shared ones only"),
    "rms_norm_eps": (1e-5, "both"),
    "max_position_embeddings": (160, "both: rotary tables and the longest context"),
    "sliding_window": (9, "granite_layer_attn_params: vLLM counts the token itself, SGLang subtracts one for its exclusive bound"),
    "layer_types": (["sliding_attention", "full_attention"], "granite_layer_attn_params of both; its presence means sinks in vLLM"),
    "layer_rope_theta": ([500_000.0, 500_000.0], "granite_layer_attn_params; SGLang has no other source of it"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 500_000.0}, f"{VLLM}granitemoe.py get_rope"),
    "attention_multiplier": (8**-0.5, "the scale of attention in both"),
    "embedding_multiplier": (1.0, "both"),
    "residual_multiplier": (1.0, "both"),
    "logits_scaling": (1.0, "both divide by it"),
    "shared_intermediate_size": (0, "0 stands for no shared expert in both"),
    "tie_word_embeddings": (True, "both: the head is the embedding, and no lm_head is looked for"),
    "eos_token_id": (401, f"{SGLANG}configs/model_config.py; vLLM takes it from generation_config.json"),
    "dtype": ("float32", "both, when no precision is asked for"),
}
"""Key: its value for the model of these tests, and who reads it."""

ABSENT = {
    "auto_map": "would let trust_remote_code take precedence over the built-in class",
    "attention_sinks": "vLLM: false makes it refuse the sinks that SGLang and transformers need",
    "sliding_window_size": "SGLang reads it before sliding_window",
    "attention_chunk_size": "both would take it for chunked attention",
    "quantization_config": "both would look for scales",
}


@pytest.mark.parametrize("key", KEYS)
def test_configuration_has_every_key_the_engines_read(config: dict[str, Any], key: str) -> None:
    assert config[key] == KEYS[key][0]


@pytest.mark.parametrize("key", ABSENT)
def test_configuration_has_no_key_that_an_engine_would_misread(config: dict[str, Any], key: str) -> None:
    assert key not in config


def test_the_published_model_is_one_that_both_engines_can_hold() -> None:
    config = granite_config(KeuralConfig())

    assert config.sliding_window == 513
    assert config.attention_multiplier == 128**-0.5
    assert config.hidden_size // config.num_attention_heads == 128
    assert {int(theta) for theta in config.layer_rope_theta} == {500_000}  # SGLang cuts the fraction off


class Engine(NamedTuple):
    """Where an engine keeps its rule, and how it says "full attention" and counts a window of 9 keys."""

    variable: str
    file: str
    full: int | None
    window: int


ENGINES = {
    "vllm": Engine("KEURAL_VLLM_SOURCE", "model_executor/models/granite.py", None, 9),
    "sglang": Engine("KEURAL_SGLANG_SOURCE", "srt/models/granite.py", -1, 8),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_engines_own_rule_gives_our_windows_positions_and_a_sink(config: dict[str, Any], name: str) -> None:
    engine = ENGINES[name]
    if engine.variable not in os.environ:
        pytest.skip(f"{engine.variable} does not name the package directory of an unpacked release")
    source = ast.parse((Path(os.environ[engine.variable]) / engine.file).read_text(encoding="utf-8"))
    wanted = ("granite_layer_attn_params", "SWA_MODEL_TYPES")
    rule = [node for node in source.body if getattr(node, "name", None) in wanted or ast.unparse(node).startswith(wanted)]
    scope: dict[str, Any] = {"PreTrainedConfig": object, "PretrainedConfig": object, "Tuple": tuple}
    exec(compile(ast.Module(rule, []), engine.file, "exec"), scope)

    layers = [scope["granite_layer_attn_params"](SimpleNamespace(**config), layer) for layer in range(2)]

    assert layers == [(engine.window, 500_000.0, True), (engine.full, 500_000.0, True)]
