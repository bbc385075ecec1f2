"""Recipes are strict: what is wrong is named with file and key, before anything runs."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keural.data.adapters import adapter_of
from keural.data.licenses import left_out
from keural.errors import UserError
from keural.recipe import Recipe, load_recipe, parse_duration
from keural.recipe.shipped import SHIPPED, names

RECIPES = SHIPPED

RECIPE = """
name: tiny
tokenizer: {vocab_size: 300, sources: [{name: a, adapter: text, path: a.txt}]}
stages: [base, chat]
"""
BASE = """
name: base
objective: next_token
data: {sequence_length: 32, sources: [{name: a, adapter: text, path: a.txt}]}
train: {steps: 10, batch_tokens: 64, lr: 1e-3}
"""
CHAT = """
name: chat
objective: sft
init_from: base
data: {sequence_length: 32, sources: [{name: b, adapter: messages, path: b.jsonl}]}
train: {epochs: 1.0, batch_tokens: 64, lr: 1.0e-4, min_lr: 1e-5}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in {"recipe": RECIPE, "base": BASE, "chat": CHAT}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def edited(directory: Path, file: str, old: str, new: str) -> Path:
    path = directory / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return directory


def refusal(directory: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as info:
        load_recipe(directory, overrides)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_number_in_exponent_notation_is_a_number(directory: Path) -> None:
    assert load_recipe(directory).stage("base").train.lr == 1e-3


@pytest.mark.parametrize("name", names())
def test_every_recipe_of_the_package_resolves(name: str) -> None:
    overrides = ["budget=20m"] if name == "laptop" else []
    recipe = load_recipe(RECIPES / name, overrides)
    assert yaml.safe_load(yaml.safe_dump(recipe.resolved())) == recipe.resolved()
    published = ["pretrain-1", "pretrain-2", "sft-1", "dpo-1", "sft-2", "sft-3", "dpo-2"]
    assert [stage.name for stage in recipe.stages] == (
        ["pretrain-1", "pretrain-2", "sft", "dpo"] if name.startswith("keural-14b") and "published" not in name else published
    )


def test_windows_that_overlap_whole_are_refused(directory: Path) -> None:
    measure = "{name: prose, stage: base, overlap: 64}"
    overrides = ["base.data.sequence_length=64", "base.train.batch_tokens=640", f"evaluation.bits_per_byte=[{measure}]"]
    message = refusal(directory, *overrides)
    assert "'prose': an overlap of 64 leaves nothing of windows of 64 tokens" in message


def test_published_numbers() -> None:
    recipe = load_recipe(RECIPES / "keural-14b-published")
    steps = {stage.name: stage.train.steps for stage in recipe.stages}
    assert steps == {
        "pretrain-1": 100_000,
        "pretrain-2": 120_000,
        "sft-1": 18_000,
        "dpo-1": 6_927,
        "sft-2": 29_112,
        "sft-3": 65_849,
        "dpo-2": 7_590,
    }
    sft, dpo = recipe.stage("sft-3"), recipe.stage("dpo-2")
    assert sum(source.expect or 0 for source in sft.data.sources) == 2_351_212
    assert sum(source.expect or 0 for source in dpo.data.sources) == 485_793
    assert (sft.train.lr, sft.train.min_lr, sft.train.warmup_steps, sft.data.sequence_length) == (2e-5, 2e-6, 100, 2048)
    assert (dpo.train.lr, dpo.train.min_lr, dpo.dpo.beta, dpo.train.batch_pairs) == (2e-6, 2e-7, 0.1, 64)
    first = recipe.stage("pretrain-1").train
    assert (first.lr, first.min_lr, first.warmup_steps, first.batch_tokens) == (3e-4, 3e-5, 2000, 64 * 4096)


def test_the_published_chats_and_pairs_have_adapters_of_their_kind() -> None:
    recipe = load_recipe(RECIPES / "keural-14b-published")
    for name, kind in (("sft-3", "conversations"), ("dpo-2", "pairs")):
        for source in recipe.stage(name).data.sources:
            adapter = adapter_of(source)
            assert adapter.kind_of(source) == kind
            assert set(source.options) <= set(adapter.options)


def test_licences_and_benchmarks_are_left_out_by_override(directory: Path) -> None:
    overrides = ["data.licenses.exclude=[non-commercial, AIHub]", "data.benchmarks=false"]
    data = load_recipe(RECIPES / "keural-14b-published", overrides).stage("dpo-2").data
    used = [source.name for source in data.sources if left_out(data, source) is None]
    assert used == [
        "hh-rlhf",
        "multifaceted-collection-dpo",
        "ultrafeedback-binarized",
        "ko-ultrafeedback-binarized",
        "orca-dpo-pairs",
        "orca-dpo-pairs-ko",
    ]
    assert "data.licenses.exclude" in refusal(directory, "data.licenses.exclude=AIHub")
    assert "did you mean 'data.licenses.exclude'" in refusal(directory, "data.licenses.exclud=[AIHub]")
    assert "gates.language" in refusal(edited(directory, "base.yaml", "adapter:", "gates: {language: off}, adapter:"))


def test_unknown_key_names_the_nearest(directory: Path) -> None:
    message = refusal(edited(directory, "base.yaml", "batch_tokens", "batch_token"))
    assert "base.yaml" in message
    assert "'train.batch_token'" in message
    assert "did you mean 'train.batch_tokens'" in message


def test_unknown_key_inside_a_list_names_the_nearest(directory: Path) -> None:
    assert "data.sources.0.adaptr" in (message := refusal(edited(directory, "base.yaml", "adapter", "adaptr")))
    assert "adapter" in message


def test_wrong_type_names_key_and_value(directory: Path) -> None:
    message = refusal(edited(directory, "base.yaml", "steps: 10", "steps: ten"))
    assert "train.steps" in message
    assert "'ten'" in message


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("base.yaml", "steps: 10", "steps: 10, epochs: 1", "exactly one of steps, epochs, budget_share"),
        ("base.yaml", "steps: 10", "budget_share: 0.5", "needs a budget"),
        ("base.yaml", "steps: 10", "steps: 10, max_epochs: 2", "max_epochs bounds a stage with a budget_share"),
        ("base.yaml", "steps: 10", "epochs: 1, max_epochs: 2", "max_epochs bounds a stage with a budget_share"),
        ("base.yaml", "steps: 10", "budget_share: 0.5, max_epochs: 0", "greater than 0"),
        ("base.yaml", "steps: 10", "budget_share: 0.5, max_epochs: .inf", "max_epochs must be at most"),
        ("base.yaml", "batch_tokens: 64", "batch_tokens: 65", "not a multiple"),
        ("base.yaml", "batch_tokens: 64", "batch_pairs: 2", "needs train.batch_tokens"),
        ("base.yaml", "steps: 10", "steps: 10, warmup_steps: 10", "warmup_steps must be smaller"),
        ("base.yaml", "lr: 1e-3", "lr: 1e-3, min_lr: 1", "min_lr cannot exceed lr"),
        ("base.yaml", "lr: 1e-3", "lr: 1e-3, micro_batch_tokens: 16", "smaller than one packed row"),
        ("base.yaml", "lr: 1e-3", "lr: .nan", "train.lr"),
        ("base.yaml", "name: base", "name: bass", "differs from the file's"),
        ("base.yaml", "steps: 10", "steps: 10, steps: 11", "given twice"),
        ("base.yaml", "sequence_length: 32", "sequence_length: 8192", "batch_tokens 64 is not a multiple"),
        ("chat.yaml", "init_from: base", "init_from: bose", "did you mean 'base'"),
        ("chat.yaml", "objective: sft", "objective: dpo", "needs train.batch_pairs"),
        ("chat.yaml", "init_from: base", "init_from: chat", "not an earlier stage"),
        ("chat.yaml", "init_from: base", "dpo: {beta: 0.2}", "no effect"),
        ("recipe.yaml", "name: tiny", "name: tiny\nmodel: {num_attention_heads: 30}", "multiple of num_key_value_heads"),
        ("recipe.yaml", "[base, chat]", "[base, base]", "listed twice"),
        ("recipe.yaml", "[base, chat]", "[base, chta]", "chta.yaml: no such file"),
        ("recipe.yaml", "name: tiny", "name: tiny\nbudget: soon", "not a duration"),
        (
            "recipe.yaml",
            "name: tiny",
            "name: tiny\nbudget: 20m",
            "recipe.yaml: budget 20m has no effect, as no stage has train.budget_share",
        ),
        ("recipe.yaml", "vocab_size: 300", "vocab_size: 300, path: x", "either path"),
    ],
)
def test_impossible_combinations_are_refused(directory: Path, file: str, old: str, new: str, expected: str) -> None:
    assert expected in refusal(edited(directory, file, old, new))


def test_an_empty_file_and_a_missing_directory_are_named(directory: Path, tmp_path: Path) -> None:
    (directory / "base.yaml").write_text("")
    assert "base.yaml: is empty" in refusal(directory)
    assert "no such file" in refusal(tmp_path / "nowhere")
    assert "a recipe is a directory" in refusal(directory / "recipe.yaml")


class TestOverrides:
    def load(self, directory: Path, *overrides: str) -> Recipe:
        return load_recipe(directory, overrides)

    def test_recipe_key(self, directory: Path) -> None:
        share = ["base.train.steps=null", "base.train.budget_share=0.5"]
        recipe = self.load(directory, "seed=7", "data=corpus", "model.hidden_size=256", "budget=20m", *share)
        assert (recipe.spec.seed, recipe.spec.data, recipe.spec.model.hidden_size, recipe.spec.budget) == (7, "corpus", 256, "20m")

    def test_key_of_every_stage(self, directory: Path) -> None:
        assert {stage.train.lr for stage in self.load(directory, "train.lr=2e-5", "train.min_lr=0").stages} == {2e-5}

    def test_key_of_one_stage(self, directory: Path) -> None:
        recipe = self.load(directory, "chat.train.lr=2e-5")
        assert [stage.train.lr for stage in recipe.stages] == [1e-3, 2e-5]

    @pytest.mark.parametrize("override", ["trian.lr=1", "seed", "=3", "train.lr=[", "stages=[base]", "train.lr.x=1"])
    def test_nonsense_is_refused(self, directory: Path, override: str) -> None:
        assert override.split("=")[0] in refusal(directory, override)


@given(st.floats(min_value=0.001, max_value=1e6).map(lambda x: round(x, 3)), st.sampled_from("smh"))
def test_durations(value: float, unit: str) -> None:
    assert parse_duration(f"{value:.3f}{unit}") == pytest.approx(value * {"s": 1, "m": 60, "h": 3600}[unit])


@pytest.mark.parametrize("text", ["", "20", "m", "-3m", "0m", "1d"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)
