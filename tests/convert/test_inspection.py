"""`keural inspect`: figures computed from the files, beside those of the model card."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keural.convert.export import ExportOptions, export
from keural.convert.initialise import random_weights
from keural.convert.inspection import exports, inspect_checkpoint, inspect_gguf, inspect_model, ledger
from keural.errors import UserError
from keural.model import KeuralConfig
from keural.pretrained.stored_model import load_model
from keural.pretrained.weights import stored_tensors
from keural.tokenizer import KeuralTokenizer
from tests.helpers.published_model import Tensors

Keural = Callable[..., tuple[int, str, str]]
PUBLISHED = {
    "architecture": "KeuralMoECausalLM",
    "parameters": 14_832_054_272,
    "active_parameters": 4_866_387_968,
    "num_hidden_layers": 24,
    "sliding_layers": "even",
    "earlier_tokens_in_window": 512,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "generation_end": 131_073,
}


def test_figures_are_those_of_the_loaded_model(model_dir: Path, tokenizer: KeuralTokenizer) -> None:
    values = inspect_model(model_dir)

    model = load_model(model_dir)
    assert values["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    one_expert = 3 * 32 * 24
    assert values["active_parameters"] == values["parameters"] - 2 * 2 * one_expert  # two idle experts in each of two layers
    assert values["tokenizer"] == {"kind": "lossless", "sha256": tokenizer.sha256}
    assert (values["im_end_id"], values["generation_end"]) == (401, 401)
    assert values["lineage"]["chain"] == ["pretrain-1", "sft-1", "dpo-2"]
    # float32 keys and values of two heads of eight in two layers; the sliding one keeps nine tokens
    assert values["cache"] == {"bytes_per_token": 256, "bytes_full_context": 40_960, "bytes_full_context_bounded": 128 * 169}


def test_ledger_says_where_the_card_is_wrong() -> None:
    verdicts = {entry.item: entry for entry in ledger(PUBLISHED)}

    assert verdicts["parameters"].verdict == "agrees"
    assert verdicts["active per token"].computed == "4,866,387,968"
    assert verdicts["active per token"].verdict == "differs"
    assert "half of the total" in verdicts["active per token"].note
    assert verdicts["sliding window"].verdict == "agrees"
    assert verdicts["end of a chat turn"].verdict == "agrees"
    assert verdicts["experts"].verdict == "not in the files"


def test_every_figure_of_the_published_configuration_agrees_but_the_active_ones(tmp_path: Path) -> None:
    config = KeuralConfig()
    total = sum(torch.Size(shape).numel() for shape in stored_tensors(config).values())

    assert total == PUBLISHED["parameters"]
    assert exports(config) == dict.fromkeys(("hf", "granite", "gguf", "pt"), "yes")


def test_reasons_against_an_export_are_given(make_config: Callable[..., KeuralConfig]) -> None:
    reasons = exports(make_config(head_dim=16))

    assert reasons["hf"] == "yes"
    assert reasons["granite"].startswith("no: heads of width 16")


def test_a_checkpoint_can_be_looked_at_before_it_is_imported(published_pt: Path, state_dict: Tensors) -> None:
    values = inspect_checkpoint(published_pt)

    assert values["names"] == "published"
    assert values["progress"]["step"] == 29112
    assert values["parameters"] == sum(tensor.numel() for tensor in state_dict.values())
    assert values["config"]["sliding_window"] == 8


def test_gguf_files_are_read_from_their_header(tmp_path: Path, model_dir: Path, keural: Keural) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
    file = export(model_dir, tmp_path / "out", "gguf", ExportOptions(quantize="q8_0"))

    values = inspect_gguf(file, verify=True)
    assert values["parameters"] == inspect_model(model_dir)["parameters"]
    assert values["header"]["general.architecture"] == "granite_swa"
    assert values["lineage"]["chain"] == ["pretrain-1", "sft-1", "dpo-2"]
    assert keural("inspect", tmp_path / "out")[0] == 0

    file.write_bytes(file.read_bytes()[:300])
    code, out, err = keural("inspect", file)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_command_prints_a_table_or_json(model_dir: Path, published_pt: Path, keural: Keural) -> None:
    code, out, _ = keural("inspect", model_dir)
    assert code == 0
    assert "active per token" in out

    code, out, _ = keural("inspect", model_dir, "--json", "--verify")
    assert code == 0
    assert json.loads(out)["parameters"] > 0
    assert keural("inspect", published_pt)[0] == 0


@pytest.mark.parametrize("name", ["nothing", "empty", "rubbish.json"])
def test_what_is_no_model_is_refused(tmp_path: Path, keural: Keural, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rubbish.json").write_text("{}")

    code, out, err = keural("inspect", tmp_path / name)

    assert (code, out, err.count("\n")) == (2, "", 1)


def test_verify_finds_a_changed_file(tmp_path: Path, model_dir: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    file = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    inspect_model(copy)
    with pytest.raises(UserError, match="does not match its checksum"):
        inspect_model(copy, verify=True)


class TestInit:
    """`keural init`: random models of any size."""

    def test_values_are_drawn_as_the_network_draws_them(self, make_config: Callable[..., KeuralConfig]) -> None:
        config = make_config(hidden_size=128, intermediate_size=128, initializer_range=0.02)
        for name, tensor in random_weights(config, seed=1, dtype=torch.float32):
            if "norm" in name:
                assert tensor.eq(1).all(), name
            else:
                assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name

    def test_each_tensor_depends_on_seed_and_name_alone(self, make_config: Callable[..., KeuralConfig]) -> None:
        one, deeper = (random_weights(make_config(num_hidden_layers=n), 5, torch.bfloat16) for n in (2, 4))
        other = random_weights(make_config(), 6, torch.bfloat16)
        name = "model.layers.1.mlp.experts.2.up_proj.weight"

        assert torch.equal(one.read(name), deeper.read(name))
        assert not torch.equal(one.read(name), other.read(name))
        assert not torch.equal(one.read(name), one.read(name.replace("up", "gate")))

    def test_command_writes_a_model_that_chats(self, tmp_path: Path, keural: Keural) -> None:
        shape = ["model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=2", "model.head_dim=16"]
        code, out, err = keural("init", "recipes/toy", tmp_path / "m", *shape, "--dtype", "float32")

        assert code == 0, err
        assert "toy, float32, seed 42" in out
        assert load_model(tmp_path / "m", dtype=None).dtype == torch.float32
        assert keural("generate", tmp_path / "m", "--prompt", "hello", "--max-new-tokens", "3")[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["recipes/none", "OUT"], "recipes/none"),
            (["recipes/toy", "OUT", "--dtype", "int8"], "--dtype int8: unknown"),
            (["recipes/toy", "FULL"], "exists and is not empty"),
            (["recipes/keural-14b-published", "OUT"], "keural_tokenizer.model: no such file"),
            (["recipes/toy", "OUT", "model.hidden_size=-1"], "hidden_size"),
        ],
    )
    def test_refusals(self, tmp_path: Path, keural: Keural, arguments: list[str], message: str) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("")
        places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}

        code, out, err = keural("init", *(places.get(argument, argument) for argument in arguments))

        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
        assert not (tmp_path / "out").exists()
