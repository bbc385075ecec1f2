"""The recipes that come with the package, and what a command's argument stands for: one of them by name, or a directory.

In: what somebody typed. Out: the directory of a recipe, or the file of a stage. What lies in the file system comes first: a
directory of that name is taken, never the package's recipe behind it.
"""

import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from keural.errors import UserError, nearest
from keural.files import atomic_directory, check_new, read_yaml

SHIPPED = Path(str(files("keural").joinpath("recipes")))
RECIPE_FILE = "recipe.yaml"
SETS_FILE = "sets.yaml"
"""Of a recipe that says where its data comes from."""


def names() -> list[str]:
    """Names of the package's recipes."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / RECIPE_FILE).is_file())


def descriptions() -> Iterator[tuple[str, str]]:
    """Name and description of each of the package's recipes."""
    for name in names():
        yield name, str(read_yaml(SHIPPED / name / RECIPE_FILE)["description"])


def recipe_directory(given: Path) -> Path:
    """The directory that `given` stands for: itself, or the package's recipe of that name where there is nothing of that name here.

    Raises `UserError` when there is neither, and when what lies here under the name of a recipe is no recipe.
    """
    name = _name(given)
    if (given / RECIPE_FILE).is_file() or given.is_file():
        return given
    if given.exists():
        hidden = f", and hides the package's recipe of that name ({SHIPPED / name})" if name else ""
        raise UserError(f"{given}: is a directory without {RECIPE_FILE}{hidden}; give a recipe's directory")
    if name is None:
        raise UserError(
            f"{given}: no such directory, and no recipe of the package{nearest(given.name, names())}; `keural recipes` lists these"
        )
    return SHIPPED / name


def stage_file(given: Path) -> Path:
    """The stage's YAML file that `given` stands for: itself, or `NAME/STAGE.yaml` of the package's recipe NAME.

    Raises `UserError` when there is none.
    """
    if given.is_file():
        return given
    if _name(given.parent) is not None:
        directory = recipe_directory(given.parent)
        if (file := directory / given.name).is_file():
            return file
        stages = sorted(path.name for path in directory.glob("*.yaml") if path.name not in (RECIPE_FILE, SETS_FILE))
        raise UserError(f"{given}: the recipe has no such stage{nearest(given.name, stages)}; it has {', '.join(stages)}")
    raise UserError(f"{given}: no such file; give a stage's YAML file, e.g. toy/sft-1.yaml or my-recipe/sft-1.yaml")


def copy(name: str, out: Path) -> Path:
    """Copy the package's recipe `name` into the new directory `out`, to be changed there. Raises `UserError`."""
    source = shipped(name)
    check_new(out)
    with atomic_directory(out) as directory:
        for file in sorted(source.glob("*.yaml")):
            shutil.copyfile(file, directory / file.name)
    return out


def shipped(name: str) -> Path:
    """The directory of the package's recipe `name`. Raises `UserError` naming the nearest."""
    if name not in names():
        raise UserError(f"{name}: no recipe of the package{nearest(name, names())}; there are {', '.join(names())}")
    return SHIPPED / name


def _name(given: Path) -> str | None:
    """The package's recipe that `given` names: one word, without a slash; None for any other path."""
    return given.name if given.parts == (given.name,) and given.name in names() else None
