"""Every field of the configuration in every export format: what is read back computes the same, or the model is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteMoeSWAForCausalLM

from keural.convert.carried import RULES, carried_table, problems
from keural.convert.export import FORMATS, ExportOptions, export
from keural.convert.import_checkpoint import import_checkpoint
from keural.errors import UserError
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.model.config_fields import FIELDS
from keural.pretrained.directory import save_model_directory
from keural.pretrained.stored_model import load_model
from keural.tokenizer import KeuralTokenizer
from tests.conftest import ROOT

MakeConfig = Callable[..., KeuralConfig]
IDS = torch.randint(260, 400, (1, 60), generator=torch.Generator().manual_seed(4))

CHANGED: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "hidden_act": "gelu",
    "rms_norm_eps": 0.01,
    "max_position_embeddings": 320,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1234.5},
    "tie_word_embeddings": False,
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": [7, 401],
    "initializer_range": 0.123,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.4,
    "output_router_logits": True,
    "use_cache": False,
}
"""Another value for every field; the vocabulary is the tokenizer's, and stays."""
MORE: dict[str, tuple[str, Any]] = {
    "a whole theta": ("rope_parameters", {"rope_type": "default", "rope_theta": 1234.0}),
    "stretched positions": ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "no window": ("sliding_window", None),
    "no sliding layer": ("layer_types", ["full_attention", "full_attention"]),
    "only sliding layers": ("layer_types", ["sliding_attention", "sliding_attention"]),
    "relu": ("hidden_act", "relu"),
}


NAMED = {"head_dim": "heads of width", "rope_parameters": "rope_", "num_attention_heads": "heads of width"}
"""What a refusal says of a field in place of its name."""


def small(config: KeuralConfig) -> KeuralMoECausalLM:
    """A random network whose norms are not one."""
    torch.manual_seed(7)
    model = KeuralMoECausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def from_gguf(file: Path) -> KeuralMoECausalLM:
    """The network that a GGUF file describes, read anew: header to configuration, tensors to weights."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
    reader = gguf.GGUFReader(file)
    header = {name.removeprefix("granite_swa."): field.contents() for name, field in reader.fields.items() if "ggml" not in name}
    ids = {name: reader.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("padding", "bos", "eos")}
    config = KeuralConfig(
        vocab_size=header["vocab_size"],
        hidden_size=header["embedding_length"],
        intermediate_size=header["feed_forward_length"],
        num_hidden_layers=header["block_count"],
        num_attention_heads=header["attention.head_count"],
        num_key_value_heads=header["attention.head_count_kv"],
        head_dim=header["attention.key_length"],
        num_local_experts=header["expert_count"],
        num_experts_per_tok=header["expert_used_count"],
        rms_norm_eps=header["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=header["context_length"],
        sliding_window=header["attention.sliding_window"],
        layer_types=[("full_attention", "sliding_attention")[slides] for slides in header["attention.sliding_window_pattern"]],
        rope_parameters={"rope_type": "default", "rope_theta": header["rope.freq_base"]},
        pad_token_id=ids["padding"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert "output.weight" not in stored
    weights = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "lm_head.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    names = {
        "attn_norm.weight": "input_layernorm.weight", "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate_inp.weight": "mlp.gate.weight", "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
        "ffn_down_exps.weight": "mlp.experts.down_proj",
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weights[f"model.layers.{layer}.{ours}"] = stored[f"blk.{layer}.{theirs}"]
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            turned = stored[f"blk.{layer}.attn_{letter}.weight"]
            plain = turned.view(heads, -1, 2, turned.shape[1]).transpose(1, 2).reshape(turned.shape)
            weights[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = plain
    model = KeuralMoECausalLM(config).eval()
    model.load_state_dict(weights)
    return model


def read_back(written: Path, format_name: str, tmp_path: Path, tokenizer: KeuralTokenizer) -> Any:
    """The model that the readers of a format make of an export."""
    if format_name == "gguf":
        return from_gguf(written)
    if format_name == "pt":
        tokenizer.save(tmp_path / "tokenizer")
        again = tmp_path / "again"
        return load_model(import_checkpoint(written, again, tokenizer=tmp_path / "tokenizer", say=lambda line: None))
    if format_name == "granite":
        return GraniteMoeSWAForCausalLM.from_pretrained(written).eval()
    return AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True).eval()


def check(tmp_path: Path, config: KeuralConfig, tokenizer: KeuralTokenizer, format_name: str, field: str) -> KeuralConfig | None:
    """Export a model: None where it is refused by the field's name, else the configuration that was read back, its logits equal."""
    model = small(config)
    source = save_model_directory(tmp_path / "m", config, model.state_dict(), tokenizer, {})
    if problems(config, format_name):
        with pytest.raises(UserError, match=rf"cannot be exported as {format_name}: .*{NAMED.get(field, field)}"):
            export(source, tmp_path / "out", format_name, ExportOptions())
        assert not (tmp_path / "out").exists()
        return None
    written = export(source, tmp_path / "out", format_name, ExportOptions())
    other = read_back(written, format_name, tmp_path, tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, atol=1e-4, rtol=0)
    found: KeuralConfig = other.config
    return found


REFUSED: dict[str, set[str]] = {
    "hf": set(),
    "granite": {"head_dim", "num_attention_heads", "hidden_size", "hidden_act", "rope_parameters"},
    "gguf": {"hidden_act", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"},
    "pt": {"hidden_act", "rms_norm_eps", "layer_types", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"},
}
"""Where the values of `CHANGED` are refused."""
LOST: dict[str, set[str]] = {
    "hf": set(),
    "granite": {"router_z_loss_coef"},
    "gguf": {"initializer_range", "router_aux_loss_coef", "router_z_loss_coef", "output_router_logits", "use_cache"},
    "pt": {"initializer_range", "output_router_logits", "use_cache"},
}
"""What has no place, and changes no logits."""


@pytest.mark.parametrize("field", CHANGED)
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_field_is_carried_or_refused(
    tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, format_name: str, field: str
) -> None:
    changes = {} if CHANGED[field] is None else {field: CHANGED[field]}
    config = make_config(**changes)

    found = check(tmp_path, config, tokenizer, format_name, field)

    if field in REFUSED[format_name]:
        assert found is None
        return
    assert found is not None
    if field in LOST[format_name]:
        assert FIELDS[field] in {"training", "use"}
    elif (format_name, field) == ("granite", "router_aux_loss_coef"):
        assert found.router_aux_loss_coef == pytest.approx(config.router_aux_loss_coef / config.num_experts_per_tok)
    elif field == "rms_norm_eps":
        assert getattr(found, field) == pytest.approx(getattr(config, field), rel=1e-6)  # GGUF has them in float32
    else:
        assert getattr(found, field) == getattr(config, field)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("format_name", FORMATS)
def test_so_are_other_values(
    tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, format_name: str, name: str
) -> None:
    field, value = MORE[name]
    found = check(tmp_path, make_config(**{field: value}), tokenizer, format_name, field)
    if format_name == "hf":
        assert found is not None
        assert getattr(found, field) == value


def test_every_format_and_every_field_is_walked() -> None:
    assert set(RULES) == set(FORMATS)
    assert set(CHANGED) == set(FIELDS)
    assert all(set(rules) == set(FIELDS) for rules in RULES.values())


def test_the_documentation_has_the_table_that_the_exporters_go_by() -> None:
    assert carried_table() in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def test_a_refusal_names_all_that_is_in_the_way(tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer) -> None:
    config = make_config(hidden_act="gelu", rms_norm_eps=1e-6)
    source = save_model_directory(tmp_path / "m", config, small(config).state_dict(), tokenizer, {})

    with pytest.raises(UserError, match=r"hidden_act is gelu.*rms_norm_eps is 1e-06.*--format hf"):
        export(source, tmp_path / "out", "pt", ExportOptions())


class TestBalance:
    """GraniteMoeSWA's balance loss is `num_experts_per_tok` times ours, and it has no z-loss."""

    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_the_same_pull_on_the_routers(
        self, tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, top_k: int
    ) -> None:
        """With one layer, over which there is no mean, the two add the same to the loss."""
        config = make_config(num_hidden_layers=1, num_experts_per_tok=top_k, router_aux_loss_coef=0.5, router_z_loss_coef=0.0)
        model = small(config)
        source = save_model_directory(tmp_path / "m", config, model.state_dict(), tokenizer, {})
        said: list[str] = []
        theirs = GraniteMoeSWAForCausalLM.from_pretrained(
            export(source, tmp_path / "x", "granite", ExportOptions(), say=said.append)
        )

        if not theirs(IDS, output_router_logits=True).router_logits:
            pytest.skip("GraniteMoeSWA of this release of transformers does not show its routers, and has no balance loss")

        added = [
            (net(IDS, labels=IDS, output_router_logits=True).loss - net(IDS, labels=IDS).loss).item()
            for net in (model, theirs.eval())
        ]

        assert added[0] > 0.1
        assert added[1] == pytest.approx(added[0], rel=1e-4)
        assert said == []

    def test_what_has_no_field_is_said(self, tmp_path: Path, model_dir: Path, keural: Callable[..., tuple[int, str, str]]) -> None:
        code, _, err = keural("export", model_dir, tmp_path / "x", "--format", "granite")

        assert code == 0
        assert "granite: router_z_loss_coef 0.001 has no field there" in err
        assert json.loads((tmp_path / "x" / "config.json").read_text())["router_aux_loss_coef"] == 0.01
        for name in ("hf", "gguf", "pt"):
            assert "z_loss" not in keural("export", model_dir, tmp_path / name, "--format", name)[2]


class TestEnds:
    """A base model ends a text with `</s>`; one that chats ends its turn, and so does one of which nothing is known."""

    @pytest.mark.parametrize(
        ("objectives", "end"),
        [
            (["next_token"], 2), (["next_token", "next_token"], 2), (["next_token", "sft"], 401),
            (["next_token", "sft", "dpo"], 401), (["unknown", "next_token"], 401), ([], 401), (["a later objective"], 401),
        ],
    )  # fmt: skip
    def test_where_generation_ends(
        self, tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, objectives: list[str], end: int
    ) -> None:
        gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
        config = make_config()
        source = save_model_directory(tmp_path / "m", config, small(config).state_dict(), tokenizer, {"objectives": objectives})

        for name in ("hf", "granite"):
            out = export(source, tmp_path / name, name, ExportOptions())
            assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == end
        fields = gguf.GGUFReader(export(source, tmp_path / "gguf", "gguf", ExportOptions())).fields
        assert fields["tokenizer.ggml.eos_token_id"].contents() == end
        assert ("tokenizer.ggml.eot_token_id" in fields) == (end == 401)

    def test_an_export_that_comes_back_is_still_what_it_was(
        self, tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer
    ) -> None:
        config = make_config()
        source = save_model_directory(tmp_path / "m", config, small(config).state_dict(), tokenizer, {"objectives": ["next_token"]})
        export(source, tmp_path / "pt", "pt", ExportOptions())
        import_checkpoint(tmp_path / "pt", tmp_path / "again", say=lambda line: None)

        out = export(tmp_path / "again", tmp_path / "hf", "hf", ExportOptions())

        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


class TestWithoutTokenizer:
    """The published format knows no tokenizer, so a model without one can be written in it, and read back."""

    def test_pt_goes_there_and_back(
        self, tmp_path: Path, make_config: MakeConfig, keural: Callable[..., tuple[int, str, str]]
    ) -> None:
        model = small(make_config())
        (tmp_path / "pt").mkdir()
        torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "pt" / "nothing.pt")
        model.save_pretrained(tmp_path / "m")

        code, out, err = keural("export", tmp_path / "m", tmp_path / "out", "--format", "pt")
        assert code == 0, err
        assert "has no tokenizer, and so the export has none; whoever imports it to chat names one with --tokenizer" in err
        assert {file.name for file in (tmp_path / "out").iterdir()} == {"checkpoint_0.pt", "keural.json"}

        code, out, err = keural("import", tmp_path / "out", tmp_path / "again")
        assert code == 0, err
        assert "tokenizer: none found; without one the model cannot chat (give one with --tokenizer)" in out
        assert all(
            torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_model(tmp_path / "again").state_dict().items()
        )
        code, _, err = keural("generate", tmp_path / "again", "--prompt", "hi")
        assert (code, err.count("\n")) == (2, 1)
        assert "has no tokenizer.model, which this needs" in err

    @pytest.mark.parametrize("format_name", ["hf", "granite", "gguf"])
    def test_the_other_formats_need_one(
        self, tmp_path: Path, make_config: MakeConfig, keural: Callable[..., tuple[int, str, str]], format_name: str
    ) -> None:
        small(make_config()).save_pretrained(tmp_path / "m")

        code, _, err = keural("export", tmp_path / "m", tmp_path / "out", "--format", format_name)

        assert (code, err.count("\n")) == (2, 1)
        assert "has no tokenizer.model, which this needs; import the model again with --tokenizer" in err


def test_the_published_configuration_is_written_as_before() -> None:
    from keural.convert.published_pt import published_config

    assert published_config(KeuralConfig()) == {
        "vocab_size": 131_074, "hidden_size": 4096, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 4096, "sliding_window": 512, "rope_theta": 500_000.0, "router_aux_loss_coef": 0.02,
        "router_z_loss_coef": 0.001,
    }  # fmt: skip
