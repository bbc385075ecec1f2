"""A stage starts from a model only where its settings are that model's: the network by fields, the tokenizer by content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from keural.errors import UserError
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.agreement import check_agreement, tokenizer_of
from keural.pretrained.directory import save_model_directory
from keural.recipe import TokenizerSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer
from tests.helpers.shapes import OF_A_RECIPE

Keural = Callable[..., tuple[int, str, str]]
MakeConfig = Callable[..., KeuralConfig]

OTHERS: dict[str, tuple[Any, str]] = {
    "hidden_size": (64, "model.hidden_size=64"),
    "intermediate_size": (40, "model.intermediate_size=40"),
    "num_hidden_layers": (4, ""),
    "num_attention_heads": (2, "model.num_attention_heads=2"),
    "num_key_value_heads": (4, "model.num_key_value_heads=4"),
    "head_dim": (16, "model.head_dim=16"),
    "num_local_experts": (2, "model.num_local_experts=2"),
    "num_experts_per_tok": (1, "model.num_experts_per_tok=1"),
    "hidden_act": ("gelu", ""),
    "rms_norm_eps": (1e-6, "model.rms_norm_eps=1e-06"),
    "max_position_embeddings": (320, "model.max_position_embeddings=320"),
    "sliding_window": (8, "model.sliding_window=8"),
    "layer_types": (["full_attention"] * 2, ""),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 1e4}, "model.rope_theta=10000.0"),
    "tie_word_embeddings": (False, ""),
}
"""For every field that changes the network and is not the tokenizer's: another value, and the setting that a recipe has for it."""


def saved(directory: Path, config: KeuralConfig, tokenizer: KeuralTokenizer | None = None) -> Path:
    model = KeuralMoECausalLM(config)
    if tokenizer is not None:
        return save_model_directory(directory, config, model.state_dict(), tokenizer, {})
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_that_changes_the_network_is_compared(
    tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, name: str
) -> None:
    value, setting = OTHERS[name]
    directory = saved(tmp_path / "m", make_config(**{name: value}), tokenizer)

    with pytest.raises(UserError) as refusal:
        check_agreement(directory, make_config(), tokenizer.sha256, chats=True)

    told = str(refusal.value)
    assert f"{name} is " in told
    assert " there and " in told
    assert setting in told
    assert ("or set" in told) == bool(setting)


def test_there_is_another_value_for_every_field_of_the_table() -> None:
    from keural.model.config_fields import FIELDS

    assert set(OTHERS) == {name for name, changes in FIELDS.items() if changes == "network"} - {"vocab_size"}


@pytest.mark.parametrize(
    "changes", [{}, {"initializer_range": 0.1}, {"router_aux_loss_coef": 0.5}, {"eos_token_id": 2}, {"use_cache": False}]
)
def test_what_changes_training_alone_is_free(
    tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, changes: dict[str, Any]
) -> None:
    directory = saved(tmp_path / "m", make_config(**changes), tokenizer)

    assert check_agreement(directory, make_config(), tokenizer.sha256, chats=True) == []


def test_all_differences_stand_in_one_line(tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer) -> None:
    directory = saved(tmp_path / "m", make_config(rms_norm_eps=1e-6, sliding_window=8, pad_token_id=7), tokenizer)

    with pytest.raises(UserError) as refusal:
        check_agreement(directory, make_config(), "0" * 64, chats=True)

    assert "rms_norm_eps is 1e-06 there and 1e-05 in the recipe" in str(refusal.value)
    assert "sliding_window is 8 there and 9 in the recipe" in str(refusal.value)
    assert "pad_token_id 7 instead of 0" in str(refusal.value)
    assert f"its tokenizer (SHA-256 {tokenizer.sha256[:12]}…) is not the recipe's (000000000000…)" in str(refusal.value)
    assert f"or set model.rms_norm_eps=1e-06 model.sliding_window=8 tokenizer.path={directory / 'tokenizer.model'}" in str(
        refusal.value
    )


class TestTokenizer:
    """By content: two tokenizers of one size give ids of other pieces."""

    def test_one_of_the_same_size_is_another(self, tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer) -> None:
        directory = saved(tmp_path / "m", make_config(), tokenizer)

        with pytest.raises(UserError, match="its tokenizer"):
            check_agreement(directory, make_config(), "1" * 64, chats=False)

    def test_the_record_names_it_where_the_file_is_gone(
        self, tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer
    ) -> None:
        directory = saved(tmp_path / "m", make_config(), tokenizer)
        (directory / "tokenizer.model").unlink()

        assert tokenizer_of(directory) == tokenizer.sha256

    def test_a_directory_without_any_is_used_and_that_is_said(
        self, tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer
    ) -> None:
        directory = saved(tmp_path / "m", make_config())

        (line,) = check_agreement(directory, make_config(), tokenizer.sha256, chats=True)

        assert "has no tokenizer, so whether its ids are those of the recipe's tokenizer could not be checked" in line


@pytest.mark.parametrize(
    ("template", "fits"), [("{{ '<|im_start|>' }}{{ '<|im_end|>' }}", True), ("[INST] {{ x }} [/INST]", False)]
)
@pytest.mark.parametrize("chats", [True, False])
def test_a_model_of_another_chat_format_is_not_taught_chatml_unasked(
    tmp_path: Path, make_config: MakeConfig, tokenizer: KeuralTokenizer, template: str, fits: bool, chats: bool
) -> None:
    directory = saved(tmp_path / "m", make_config())
    (directory / "chat_template.jinja").write_text(template)

    if fits or not chats:
        check_agreement(directory, make_config(), tokenizer.sha256, chats=chats)
    else:
        with pytest.raises(UserError, match=r"writes chats in another format \(there is no <\|im_start\|> in it\)"):
            check_agreement(directory, make_config(), tokenizer.sha256, chats=chats)


class TestARun:
    """`keural run` of a stage that starts from a directory refuses before it prepares data."""

    @pytest.fixture
    def place(self, tmp_path: Path, tokenizer: KeuralTokenizer) -> Path:
        """`recipe` with one stage from `m`, the tokenizer of these tests, and a few chats."""
        tokenizer.save(tmp_path / "tokenizer")
        row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a small red house"}]}
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row | {"id": n}) + "\n" for n in range(8)))
        source = {"name": "chats", "adapter": "messages", "path": "chats.jsonl"}
        stage = {
            "name": "s", "objective": "sft", "init_from": str(tmp_path / "m"),
            "train": {"steps": 1, "batch_tokens": 64, "lr": 1e-3}, "data": {"sources": [source], "sequence_length": 64},
        }  # fmt: skip
        recipe = {
            "name": "one", "data": str(tmp_path), "stages": ["s"], "tokenizer": {"path": "tokenizer"},
            "model": OF_A_RECIPE,
        }  # fmt: skip
        (tmp_path / "recipe").mkdir()
        (tmp_path / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (tmp_path / "recipe" / "s.yaml").write_text(yaml.safe_dump(stage))
        return tmp_path

    def config(self, tokenizer: KeuralTokenizer, **changes: Any) -> KeuralConfig:
        ids = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.im_end_id}
        return KeuralConfig(**(OF_A_RECIPE | ids | changes))

    def run(self, place: Path, keural: Keural, *settings: object) -> tuple[int, str, str]:
        return keural("run", place / "recipe", *settings, "--out", place / "run")

    def test_another_network(self, place: Path, keural: Keural, tokenizer: KeuralTokenizer) -> None:
        saved(place / "m", self.config(tokenizer, layer_types=["full_attention"] * 2), tokenizer)

        code, out, err = self.run(place, keural)

        assert (code, err.count("\n")) == (2, 1), (out, err)
        assert "layer_types is full attention everywhere there and sliding on 0 in the recipe" in err
        assert not list((place / "run" / "data").glob("*/prepared.json"))

    def test_another_tokenizer_of_the_same_size(
        self, place: Path, keural: Keural, tokenizer: KeuralTokenizer, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        from tests.conftest import TEXTS

        spec = TokenizerSpec.model_validate({"vocab_size": 400, "sources": [{"name": "words", "adapter": "text"}]})
        other = train_tokenizer(iter(text[::-1] for text in TEXTS), spec, tmp_path_factory.mktemp("other") / "t", seed=0)
        assert other.vocab_size == tokenizer.vocab_size
        saved(place / "m", self.config(tokenizer), other)

        code, out, err = self.run(place, keural)

        assert (code, err.count("\n")) == (2, 1), (out, err)
        assert f"its tokenizer (SHA-256 {other.sha256[:12]}…) is not the recipe's ({tokenizer.sha256[:12]}…)" in err
        assert f"tokenizer.path={place / 'm' / 'tokenizer.model'}" in err

    def test_the_setting_that_the_refusal_names_works(self, place: Path, keural: Keural, tokenizer: KeuralTokenizer) -> None:
        saved(place / "m", self.config(tokenizer, sliding_window=5), tokenizer)
        err = self.run(place, keural)[2]
        setting = err.split(" or set ")[1].strip()
        assert setting == "model.sliding_window=5"

        code, out, err = self.run(place, keural, setting)

        assert code == 0, (out, err)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_the_stored_precision_is_free(
        self, place: Path, keural: Keural, tokenizer: KeuralTokenizer, dtype: torch.dtype
    ) -> None:
        model = KeuralMoECausalLM(self.config(tokenizer)).to(dtype)
        save_model_directory(place / "m", model.config, model.state_dict(), tokenizer, {})

        code, out, err = self.run(place, keural)

        assert code == 0, (out, err)
        assert json.loads((place / "run" / "s" / "model" / "config.json").read_text())["dtype"] == "float32"

    def test_a_run_is_named_as_other_commands_name_it(self, place: Path, keural: Keural, tokenizer: KeuralTokenizer) -> None:
        """`init_from` takes a model, the stage that made it and the run, as `generate` does."""
        saved(place / "m", self.config(tokenizer), tokenizer)
        assert self.run(place, keural)[0] == 0
        for start in ("run", "run/s", "run/final"):
            code, out, err = keural(
                "run", place / "recipe", f"s.init_from={place / start}", "--out", place / f"from-{start.replace('/', '-')}"
            )
            assert code == 0, (start, out, err)

    def test_a_directory_without_a_record_is_no_start(self, place: Path, keural: Keural, tokenizer: KeuralTokenizer) -> None:
        saved(place / "m", self.config(tokenizer), tokenizer)
        (place / "m" / "keural.json").unlink()

        code, out, err = self.run(place, keural)

        assert (code, err.count("\n")) == (2, 1), (out, err)
        assert f"keural import {place / 'm'} NEW" in err
        shutil.move(place / "m", place / "foreign")
        assert keural("import", place / "foreign", place / "m")[0] == 0
        assert self.run(place, keural)[0] == 0
