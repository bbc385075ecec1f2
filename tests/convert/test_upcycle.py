"""A dense model that becomes a mixture of experts: the same logits before anything is trained, or one line that says why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keural.convert.upcycle import upcycle
from keural.errors import UserError
from keural.model import KeuralConfig
from keural.pretrained.lineage import read_record
from keural.pretrained.stored_model import load_model
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer

CONTEXT = 64
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
KINDS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **ROPE, **more})),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**{**SHAPE, **ROPE, "sliding_window": None, **more})),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **ROPE, **more})),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **ROPE, **more})),
}


@pytest.fixture
def saved(tmp_path: Path, tokenizer: KeuralTokenizer) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """Writes a random dense model of a kind, with the tokenizer's files beside it."""

    def write(kind: str = "llama", **changes: Any) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(5)
        model = KINDS[kind](**{"vocab_size": tokenizer.vocab_size, **changes}).eval()
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(tensor)
        source = tmp_path / "dense"
        model.save_pretrained(source)
        tokenizer.save(source)
        return source, model

    return write


@pytest.fixture
def shape(tokenizer: KeuralTokenizer) -> Callable[..., KeuralConfig]:
    """The network of a recipe with four experts, two to a token, that sees its whole context."""

    def make(**changes: Any) -> KeuralConfig:
        values = {**SHAPE, **ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": CONTEXT, **changes}
        return KeuralConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.im_end_id, **values)

    return make


def made(source: Path, out: Path, config: KeuralConfig, tokenizer: KeuralTokenizer, **options: Any) -> list[str]:
    """Upcycle, and what was said."""
    lines: list[str] = []
    upcycle(source, out, config, tokenizer, recipe="r", chat=ChatSpec(), seed=1, say=lines.append, **options)
    return lines


class TestLogits:
    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
    def test_are_those_of_the_dense_model(
        self, kind: str, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, dense = saved(kind)
        made(source, tmp_path / "out", shape(), tokenizer)
        model = load_model(tmp_path / "out", dtype=None).eval()
        ids = torch.randint(4, tokenizer.vocab_size, (3, CONTEXT), generator=torch.Generator().manual_seed(0))

        with torch.no_grad():
            wanted, found = dense(input_ids=ids).logits, model(input_ids=ids).logits

        assert wanted.std() > 0.1
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

    def test_do_not_depend_on_the_experts_that_are_chosen(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, dense = saved()
        made(source, tmp_path / "out", shape(num_local_experts=3, num_experts_per_tok=1), tokenizer)
        model = load_model(tmp_path / "out", dtype=None).eval()
        ids = torch.randint(4, tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))

        with torch.no_grad():
            output = model(input_ids=ids, output_router_logits=True)
            wanted = dense(input_ids=ids).logits

        chosen = {int(expert) for logits in output.router_logits for expert in logits.argmax(-1).flatten()}
        assert chosen == {0, 1, 2}
        torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

    @pytest.mark.parametrize(
        ("kind", "settings"), [("mistral", {}), ("qwen2", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})]
    )
    def test_sliding_windows_stay(
        self,
        kind: str,
        settings: dict[str, Any],
        saved: Callable[..., Any],
        shape: Callable[..., KeuralConfig],
        tmp_path: Path,
        tokenizer: KeuralTokenizer,
    ) -> None:
        source, dense = saved(kind, sliding_window=9, **settings)
        file = source / "config.json"
        written = json.loads(file.read_text())
        for key in ("layer_types", "use_sliding_window", "max_window_layers"):  # as versions before layer_types wrote it
            written.pop(key, None)
        file.write_text(json.dumps({**written, "sliding_window": 9, **settings}))
        kinds = getattr(dense.config, "layer_types", None) or ["sliding_attention"] * SHAPE["num_hidden_layers"]
        config = shape(sliding_window=9, layer_types=kinds)
        made(source, tmp_path / "out", config, tokenizer)
        ids = torch.randint(4, tokenizer.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0))

        with torch.no_grad():
            wanted = dense(input_ids=ids).logits
            found = load_model(tmp_path / "out", dtype=None).eval()(input_ids=ids).logits

        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

    def test_of_the_old_ids_stay_where_two_are_added(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        old = tokenizer.vocab_size - 2
        source, dense = saved(vocab_size=old)
        lines = made(source, tmp_path / "out", shape(), tokenizer)
        ids = torch.randint(4, old, (1, 20), generator=torch.Generator().manual_seed(0))

        with torch.no_grad():
            wanted = dense(input_ids=ids).logits
            found = load_model(tmp_path / "out", dtype=None).eval()(input_ids=ids).logits[..., :old]

        assert any("2 new rows" in line for line in lines)
        assert read_record(tmp_path / "out")["objectives"] == ["next_token"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


class TestWritten:
    def test_routers_are_drawn_and_the_rest_is_copied(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, dense = saved()
        made(source, tmp_path / "out", shape(), tokenizer, dtype=torch.bfloat16)
        stored = load_file(tmp_path / "out" / "model.safetensors")

        routers = [stored[f"model.layers.{layer}.mlp.gate.weight"].float() for layer in range(3)]
        assert all(0.2 < float(router.std()) < 0.4 for router in routers)
        assert not torch.equal(routers[0], routers[1])
        for expert in range(4):
            up = stored[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
            assert torch.equal(up, dense.state_dict()["model.layers.1.mlp.up_proj.weight"].bfloat16())

    def test_transformers_reads_it(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, dense = saved()
        made(source, tmp_path / "out", shape(), tokenizer)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32).eval()
        ids = torch.randint(4, tokenizer.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another width": (
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5},
        {},
        "model.hidden_size is 40 there",
    ),
    "more layers": ({"num_hidden_layers": 4}, {}, "model.num_hidden_layers is 4 there and 3 in the recipe"),
    "wider experts": ({}, {"intermediate_size": 96}, "model.intermediate_size is 48 there and 96 in the recipe"),
    "another activation": ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu' there and silu"),
    "other wavelengths": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {},
        "model.rope_theta is 500000.0 there",
    ),
    "scaled wavelengths": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {},
        "rotary embedding is of kind 'linear'",
    ),
    "windows in the recipe alone": (
        {},
        {"sliding_window": 9},
        "layer 0 sees 64 keys there and 9 in the",
    ),
    "a head of its own": ({"tie_word_embeddings": False}, {}, "have no place in the network: lm_head.weight"),
    "biases": ({"attention_bias": True}, {}, "attention_bias = True"),
    "other ids": ({"vocab_size": 300}, {}, "it has 300 ids and the recipe's tokenizer 402"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", SETTINGS)
    def test_networks_that_differ(
        self, case: str, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        theirs, ours, message = SETTINGS[case]
        source, _ = saved(**theirs)

        with pytest.raises(UserError) as refused:
            made(source, tmp_path / "out", shape(**ours), tokenizer)

        assert message in str(refused.value)
        assert not (tmp_path / "out").exists()

    def test_norms_of_queries_and_keys(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, _ = saved("qwen3")
        with pytest.raises(UserError, match=r"6 tensors have no place in the network: model\.layers\.0\.self_attn\.k_norm\.weight"):
            made(source, tmp_path / "out", shape(), tokenizer)

    def test_biases_that_are_not_zero(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, _ = saved("qwen2")
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.2.self_attn.q_proj.bias"][3] = 0.5
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"1 tensors have no place in the network: model\.layers\.2\.self_attn\.q_proj\.bias"):
            made(source, tmp_path / "out", shape(), tokenizer)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "gemma"}, "is a 'gemma' model"),
            ({"model_type": ["llama"]}, "is a ['llama'] model"),
            ({"logit_scale": 2.0}, "settings that this network does not know: logit_scale = 2.0"),
            ({"quantization_config": {"bits": 4}}, "quantization_config ="),
            ({"vocab_size": "many"}, "vocab_size in its configuration must be a whole number"),
            ({"sliding_window": -3}, "its sliding_window is -3"),
            ({"rope_parameters": "none", "rope_theta": 7}, "model.rope_theta is 7 there"),
            ({"num_attention_heads": 0, "head_dim": None}, "model.num_attention_heads is 0 there"),
        ],
    )
    def test_configurations_of_others(
        self,
        changes: dict[str, Any],
        message: str,
        saved: Callable[..., Any],
        shape: Callable[..., KeuralConfig],
        tmp_path: Path,
        tokenizer: KeuralTokenizer,
    ) -> None:
        source, _ = saved()
        file = source / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(UserError) as refused:
            made(source, tmp_path / "out", shape(), tokenizer)
        assert message in str(refused.value)

    def test_values_that_are_not_finite(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, _ = saved()
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"up_proj\.weight has values that are not finite"):
            made(source, tmp_path / "out", shape(), tokenizer)
        assert not (tmp_path / "out").exists()


class TestTokenizer:
    @pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
    def test_of_other_pieces_is_refused(
        self, file: str, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, _ = saved()
        if file == "tokenizer.json":
            (source / "tokenizer.model").unlink()
            values = json.loads((source / file).read_text())
            values["model"]["vocab"][300], values["model"]["vocab"][301] = (
                values["model"]["vocab"][301],
                values["model"]["vocab"][300],
            )
            (source / file).write_text(json.dumps(values))
        else:
            (source / file).write_bytes((source / file).read_bytes() + b"\0")
        with pytest.raises(UserError, match="is not the recipe's tokenizer"):
            made(source, tmp_path / "out", shape(), tokenizer)

    def test_is_known_by_its_json_alone(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, _ = saved()
        (source / "tokenizer.model").unlink()
        made(source, tmp_path / "out", shape(), tokenizer)
        assert (tmp_path / "out" / "tokenizer.model").is_file()

    def test_that_is_not_there_must_be_named(
        self, saved: Callable[..., Any], shape: Callable[..., KeuralConfig], tmp_path: Path, tokenizer: KeuralTokenizer
    ) -> None:
        source, _ = saved()
        for name in ("tokenizer.model", "tokenizer.json"):
            (source / name).unlink()
        with pytest.raises(UserError, match="give its own with --tokenizer"):
            made(source, tmp_path / "out", shape(), tokenizer)
        lines = made(source, tmp_path / "out", shape(), tokenizer, named_tokenizer=True)
        assert any("taken for its own" in line for line in lines)
