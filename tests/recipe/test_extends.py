"""A recipe that extends another says only in what it differs; what it does not say is the other's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from keural.errors import UserError
from keural.recipe import load_recipe
from keural.recipe.extends import laid_over, sets_file
from keural.recipe.shipped import SHIPPED, copy

Keural = Callable[..., tuple[int, str, str]]
STAGES = ("pretrain-1", "pretrain-2", "sft-1", "dpo-1", "sft-2", "sft-3", "dpo-2")


def write(directory: Path, recipe: dict[str, object], **stages: dict[str, object]) -> Path:
    """A recipe of these files; stages that are not given have their names alone."""
    directory.mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in STAGES:
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"name": name} | stages.get(name.replace("-", "_"), {})))
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_said_is_laid_over_what_the_other_says(tmp_path: Path) -> None:
    changes = {"train": {"lr": 0.5, "budget_share": None, "steps": 70}}
    mine = load_recipe(write(tmp_path / "mine", {"name": "mine", "extends": "laptop", "model": {"hidden_size": 64}}, sft_1=changes))
    theirs = load_recipe(SHIPPED / "laptop")
    assert mine.spec.model == theirs.spec.model.model_copy(update={"hidden_size": 64})
    assert mine.spec.tokenizer == theirs.spec.tokenizer
    assert mine.stage("sft-2") == theirs.stage("sft-2")
    expected = theirs.stage("sft-1").train.model_copy(update={"lr": 0.5, "budget_share": None, "steps": 70})
    assert mine.stage("sft-1").train == expected
    assert mine.spec.extends is None


def test_overrides_come_last(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", {"name": "mine", "extends": "laptop", "seed": 7})
    assert load_recipe(mine, ["seed=8", "sft-1.train.lr=0.25"]).spec.seed == 8


def test_a_recipe_beside_it_may_be_extended_and_may_extend_another(tmp_path: Path) -> None:
    copy("laptop", tmp_path / "first")
    write(tmp_path / "second", {"name": "second", "extends": "../first", "seed": 1, "budget": "1m"})
    third = load_recipe(write(tmp_path / "third", {"name": "third", "extends": "../second", "seed": 2}))
    assert (third.spec.seed, third.spec.budget) == (2, "1m")


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("lap-top", "extends 'lap-top', which is no recipe of the package (did you mean 'laptop'?)"),
        ("../nowhere", "which is no recipe of the package and no path to one from there"),
        ("../mine", "leads back to itself"),
        (7, "key 'extends' must be a recipe's name or path, got 7"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, extends: object, said: str) -> None:
    assert said in refusal(write(tmp_path / "mine", {"name": "mine", "extends": extends}))


def test_two_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "one", {"name": "one", "extends": "../two"})
    assert "leads back to itself" in refusal(write(tmp_path / "two", {"name": "two", "extends": "../one"}))


def test_a_stage_without_a_file_is_refused(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", {"name": "mine", "extends": "laptop"})
    (mine / "sft-2.yaml").unlink()
    assert "sft-2.yaml: no such file" in refusal(mine)


def test_an_unknown_key_is_found_in_what_differs(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", {"name": "mine", "extends": "laptop"}, sft_1={"train": {"learning_rate": 1}})
    assert "sft-1.yaml: unknown key 'train.learning_rate'" in refusal(mine)


def test_null_takes_a_key_back_and_maps_are_joined() -> None:
    assert laid_over({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"b": None, "e": 3}, "d": [9]}) == {
        "a": {"c": 2, "e": 3},
        "d": [9],
    }


def test_its_data_comes_from_where_the_others_does(tmp_path: Path) -> None:
    assert sets_file(SHIPPED / "evening") == SHIPPED / "laptop" / "sets.yaml"
    assert sets_file(SHIPPED / "toy") == SHIPPED / "toy" / "sets.yaml"  # which there is not
    mine = write(tmp_path / "mine", {"name": "mine", "extends": "evening"})
    assert sets_file(mine) == SHIPPED / "laptop" / "sets.yaml"
    (mine / "sets.yaml").write_text("{}")
    assert sets_file(mine) == mine / "sets.yaml"


def test_one_stage_of_it_may_be_named(keural: Keural, tmp_path: Path) -> None:
    code, _, err = keural("train", "evening/sft-1.yaml", "sft-1.train.lr=-1")
    assert code == 2
    assert "evening/sft-1.yaml" in err
    assert "train.lr" in err


class TestShared:
    """What `recipe.yaml` shares stands behind every stage's file."""

    def test_every_stage_has_it_unless_its_file_says_otherwise(self, tmp_path: Path) -> None:
        copy("laptop", tmp_path / "mine")
        recipe = yaml.safe_load((tmp_path / "mine" / "recipe.yaml").read_text())
        plain = load_recipe(tmp_path / "mine")
        recipe["shared"] = {"train": {"clip_norm": 0.5, "lr": 9.0}, "router": {"scope": "micro_batch"}}
        (tmp_path / "mine" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        shared = load_recipe(tmp_path / "mine")
        for before, after in zip(plain.stages, shared.stages, strict=True):
            assert after.train == before.train.model_copy(update={"clip_norm": 0.5})
            assert after.router.scope == "micro_batch"
        assert load_recipe(tmp_path / "mine", ["train.clip_norm=2"]).stage("sft-1").train.clip_norm == 2

    def test_null_takes_a_key_back(self, tmp_path: Path) -> None:
        mine = write(
            tmp_path / "mine",
            {"name": "mine", "extends": "laptop", "shared": {"train": {"evaluate_every": 7}}},
            sft_1={"train": {"evaluate_every": None}},
        )
        recipe = load_recipe(mine)
        assert recipe.stage("sft-1").train.evaluate_every is None
        assert recipe.stage("sft-2").train.evaluate_every == 7

    def test_null_takes_back_what_is_shared_and_what_the_other_recipes_file_says(self, tmp_path: Path) -> None:
        write(tmp_path / "first", {"name": "first", "extends": "laptop"}, sft_1={"train": {"evaluate_every": 3}})
        mine = write(
            tmp_path / "mine",
            {"name": "mine", "extends": "../first", "shared": {"train": {"evaluate_every": 7}}},
            sft_1={"train": {"evaluate_every": None}},
        )
        assert load_recipe(mine).stage("sft-1").train.evaluate_every is None

    @pytest.mark.parametrize(
        ("shared", "said"),
        [
            ("all", "key 'shared' must be keys of stages with their values, got 'all'"),
            ({"name": "sft"}, "key 'shared.name' belongs to one stage"),
            ({"trian": {}}, "pretrain-1.yaml: unknown key 'trian' (did you mean 'train'?)"),
            ({"train": {"clip_norm": -1}}, "(what the file does not say is `shared` in recipe.yaml)"),
        ],
    )
    def test_what_cannot_be_shared(self, tmp_path: Path, shared: object, said: str) -> None:
        assert said in refusal(write(tmp_path / "mine", {"name": "mine", "extends": "laptop", "shared": shared}))

    @pytest.mark.parametrize("override", ["shared.train.lr=1", "extends=toy"])
    def test_an_override_names_the_key_itself(self, tmp_path: Path, override: str) -> None:
        with pytest.raises(UserError, match="cannot be overridden; give the keys themselves"):
            load_recipe(SHIPPED / "laptop", [override])

    def test_nothing_is_written_twice_in_the_recipes_of_the_full_size(self) -> None:
        for name in ("keural-14b", "keural-14b-published"):
            files = [yaml.safe_load(file.read_text()) for file in (SHIPPED / name).glob("*.yaml") if file.name != "recipe.yaml"]
            for key in ("betas", "eps", "clip_norm", "compute_dtype", "recompute"):
                assert not any(key in stage["train"] for stage in files), (name, key)
            assert not any("decontaminate" in stage["data"] for stage in files)
