"""A recipe's public sets are brought from repositories at fixed commits, whole or not at all."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from keural.data.preview.fetch import FetchedSet, fetch, sets_of
from keural.data.sources import open_source
from keural.errors import UserError
from keural.recipe import load_recipe
from keural.recipe.shipped import SHIPPED

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
Keural = Callable[..., tuple[int, str, str]]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    (folder / "docs" / "sub").mkdir(parents=True)
    (folder / "docs" / "a.md").write_text("하나\n")
    (folder / "docs" / "sub" / "b.md").write_text("둘\n")
    (folder / "docs" / "c.py").write_text("x = 1\n")
    (folder / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    git(folder, "init", "--quiet")
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(folder, "config", "uploadpack.allowFilter", "true")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, repository: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: r\n")
    origin = {"repository": f"file://{repository}", "commit": git(repository, "rev-parse", "HEAD"), "license": "MIT"}
    sets = {
        "prose": origin | {"files": {"docs": "."}, "suffix": ".md"},
        "all": origin | {"files": {".": "."}, "suffix": ".md"},
        "rows": origin | {"files": {"rows.jsonl": "train/rows.jsonl"}},
    }
    (folder / "sets.yaml").write_text(yaml.safe_dump(sets))
    return folder


def change(recipe: Path, name: str, **values: object) -> None:
    sets = yaml.safe_load((recipe / "sets.yaml").read_text())
    sets[name] |= values
    (recipe / "sets.yaml").write_text(yaml.safe_dump(sets))


def test_files_come_from_the_commit_and_stay_when_they_are_there(
    recipe: Path, repository: Path, tmp_path: Path, keural: Keural
) -> None:
    (repository / "docs" / "a.md").write_text("later\n")
    git(repository, "commit", "--quiet", "-am", "second")
    code, out, err = keural("data", "fetch", recipe, tmp_path / "data")
    assert code == 0, err
    found = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*") if path.is_file())
    visible = [path for path in found if "/." not in path]
    assert visible == ["all/docs/a.md", "all/docs/sub/b.md", "prose/a.md", "prose/sub/b.md", "rows/train/rows.jsonl"]
    assert (tmp_path / "data" / "prose" / "a.md").read_text() == "하나\n"
    assert "(MIT)" in out
    shutil.rmtree(repository)
    assert keural("data", "fetch", recipe, tmp_path / "data")[:2] == (0, "all: is there\nprose: is there\nrows: is there\n")


def test_what_cannot_be_brought_is_said_and_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    change(recipe, "prose", files={"gone": "."})
    change(recipe, "all", commit="0" * 40)
    data = tmp_path / "data"
    with pytest.raises(UserError) as refused:
        fetch(recipe, data)
    assert "gone: is not in the repository" in str(refused.value)
    assert "all: git could not bring it" in str(refused.value)
    assert sorted(path.name for path in data.iterdir()) == ["rows"], "the others come all the same"


def test_a_folder_that_was_not_fetched_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "rows").mkdir(parents=True)
    with pytest.raises(UserError, match="rows: is in the way"):
        fetch(recipe, tmp_path / "data", ["rows"])
    with pytest.raises(UserError, match="'prose'"):
        fetch(recipe, tmp_path / "data", ["pros"])


@pytest.mark.parametrize(
    "values",
    [
        {"commit": "main"},
        {"repository": "ext::sh -c id"},
        {"files": {"../x": "."}},
        {"files": {"docs": "/etc"}},
        {"files": {"--help": "."}},
        {"files": {".git/config": "c"}},
        {"more": 1},
    ],
    ids=str,
)
def test_sets_that_say_something_else_are_refused(recipe: Path, values: dict[str, object]) -> None:
    change(recipe, "rows", **values)
    with pytest.raises(UserError, match=r"sets\.yaml: rows: "):
        sets_of(recipe)


def test_the_laptop_recipe_says_where_each_of_its_sets_comes_from(shared: Path, real_data: Path) -> None:
    sets = sets_of(SHIPPED / "laptop")
    recipe = load_recipe(SHIPPED / "laptop", [f"data={real_data}"])
    sources = [source for stage in recipe.stages for source in stage.data.sources]
    assert sources
    for source in sources:
        assert source.path is not None
        folders = {path.relative_to(real_data).parts[0] for file, _ in open_source(source, real_data).files for path in file.paths}
        assert folders <= sets.keys(), source.name
    for name, wanted in sets.items():
        assert isinstance(wanted, FetchedSet)
        for place in wanted.files.values():
            assert (real_data / name / place).exists(), f"{name}/{place}"
