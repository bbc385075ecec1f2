"""Recipes by name: the package's own are there everywhere, and what lies in the file system comes before them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import keural as package
from keural.recipe.shipped import SHIPPED, names

Keural = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seed_of(printed: str) -> int:
    return int(yaml.safe_load(printed)["recipe"]["seed"])


def test_the_package_holds_ten_recipes(keural: Keural) -> None:
    machines = [f"keural-14b-{machine}" for machine in ("2xh200", "64xh100", "h100", "h200")]
    assert names() == ["evening", "keural-14b", *machines, "keural-14b-published", "laptop", "one-gpu", "toy"]
    code, out, _ = keural("recipes")
    assert code == 0
    for line, name in zip(out.splitlines(), names(), strict=True):
        assert line.split()[0] == name
        assert yaml.safe_load((SHIPPED / name / "recipe.yaml").read_text())["description"] in line


def test_a_name_is_a_recipe_wherever_one_is(keural: Keural) -> None:
    code, out, _ = keural("recipe", "toy", "seed=7")
    assert (code, seed_of(out)) == (0, 7)
    code, out, _ = keural("data", "stats", "keural-14b-published")
    assert code == 0
    assert "sft-3" in out


def test_a_directory_of_that_name_comes_first(keural: Keural, elsewhere: Path) -> None:
    shutil.copytree(SHIPPED / "toy", elsewhere / "toy")
    file = elsewhere / "toy" / "recipe.yaml"
    file.write_text(file.read_text().replace("seed: 42", "seed: 43"))
    assert seed_of(keural("recipe", "toy")[1]) == 43
    (elsewhere / "toy" / "sft-1.yaml").unlink()
    code, _, err = keural("train", "toy/sft-1.yaml")
    assert code == 2
    assert "toy/sft-1.yaml" in err


def test_a_directory_of_that_name_that_is_no_recipe_is_named(keural: Keural, elsewhere: Path) -> None:
    (elsewhere / "toy").mkdir()
    code, _, err = keural("recipe", "toy")
    assert code == 2
    assert "toy: is a directory without recipe.yaml, and hides the package's recipe" in err
    assert str(SHIPPED / "toy") in err


def test_a_path_is_never_taken_for_a_name(keural: Keural) -> None:
    code, _, err = keural("recipe", "recipes/toy")
    assert code == 2
    assert "recipes/toy: no such directory" in err
    assert "did you mean 'toy'" in err


def test_a_stage_of_a_recipe_by_name(keural: Keural) -> None:
    code, _, err = keural("train", "toy/sft-1.yaml", "sft-1.train.lr=-1")
    assert code == 2
    assert "train.lr" in err
    code, _, err = keural("data", "show", "toy/sft-1", "--step", "1")
    assert code == 2
    assert "did you mean 'sft-1.yaml'" in err


def test_a_copy_is_a_recipe_to_be_changed(keural: Keural, elsewhere: Path) -> None:
    assert keural("recipes", "laptop", "--copy", "mine")[0] == 0
    assert sorted(path.name for path in (elsewhere / "mine").iterdir()) == sorted(
        path.name for path in (SHIPPED / "laptop").glob("*.yaml")
    )
    assert keural("recipe", "mine")[1] == keural("recipe", "laptop")[1]
    code, _, err = keural("recipes", "toy", "--copy", "mine")
    assert code == 2
    assert "exists and is not empty" in err


def test_the_version_is_the_packages(keural: Keural) -> None:
    assert keural("--version") == (0, f"keural {package.__version__}\n", "")
