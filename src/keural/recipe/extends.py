"""What a recipe says once: for all of its stages (`shared`), or in another recipe, from which it differs (`extends`).

In: a recipe's directory. Out: the plain data of `recipe.yaml` and of its stages' files, each laid over what the recipe that it
`extends` has under the same name, and stages over what is `shared`: maps key by key, everything else whole. `null` takes a key back
to what is said nowhere.
"""

from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from keural.errors import UserError, nearest, quoted
from keural.files import read_yaml
from keural.recipe.shipped import RECIPE_FILE, SETS_FILE, SHIPPED, names

EXTENDS = "extends"
SHARED = "shared"
MOST = 8
"""Recipes that may stand one behind the other."""

Data = dict[str, Any]


class Files(NamedTuple):
    """What a recipe's files say."""

    recipe: Data
    """`recipe.yaml`, without what is shared."""
    stages: dict[str, Data]
    """The stages' files by name, each with what is shared behind it."""
    shares: bool
    """Whether anything is."""


def read_recipe_files(directory: Path) -> Files:
    """What `recipe.yaml` and the files of the stages it names say, with what the recipe behind it and `shared` say.

    Raises `UserError` for a file that is missing or no mapping, and for a recipe that extends none or itself.
    """
    recipe, layers = _read(directory, ())
    shared = recipe.pop(SHARED, None) or {}
    if not isinstance(shared, dict):
        raise UserError(f"{directory / RECIPE_FILE}: key {SHARED!r} must be keys of stages with their values, got {quoted(shared)}")
    if own := [key for key in ("name", "init_from") if key in shared]:
        raise UserError(f"{directory / RECIPE_FILE}: key '{SHARED}.{own[0]}' belongs to one stage; write it in the stage's file")
    return Files(recipe, {name: reduce(laid_over, files, shared) for name, files in layers.items()}, bool(shared))


def sets_file(directory: Path) -> Path:
    """The file that says where a recipe's data comes from: its own, or that of the recipe behind it."""
    seen: list[Path] = []
    while not (directory / SETS_FILE).is_file() and directory not in seen:
        seen.append(directory)
        base = read_mapping(directory / RECIPE_FILE).get(EXTENDS)
        if base is None:
            break
        directory = _base(base, directory)
    return (directory if (directory / SETS_FILE).is_file() else [*seen, directory][0]) / SETS_FILE


def _read(directory: Path, before: tuple[Path, ...]) -> tuple[Data, dict[str, list[Data]]]:
    """`recipe.yaml` over the one behind it, and each stage's files, that of the recipe farthest behind first: a null in one of them
    takes back what all before it say, and what is shared.
    """
    file = directory / RECIPE_FILE
    recipe = read_mapping(file)
    behind, behind_stages = _read_base(recipe.pop(EXTENDS), directory, before) if recipe.get(EXTENDS) is not None else ({}, {})
    recipe.pop(EXTENDS, None)
    recipe = laid_over(behind, recipe)
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not all(isinstance(name, str) for name in stages):
        raise UserError(f"{file}: key 'stages' must be a list of stage names")
    return recipe, {name: [*behind_stages.get(name, ()), read_mapping(directory / f"{name}.yaml")] for name in stages}


def _read_base(given: Any, directory: Path, before: tuple[Path, ...]) -> tuple[Data, dict[str, list[Data]]]:
    base, file = _base(given, directory), directory / RECIPE_FILE
    if base.resolve() in [path.resolve() for path in (*before, directory)] or len(before) >= MOST:
        raise UserError(f"{file}: extends {quoted(given)}, which leads back to itself; let one of them extend none")
    return _read(base, (*before, directory))


def _base(given: Any, directory: Path) -> Path:
    """The directory of a recipe that is extended: the package's by its name, another one by a path relative to `directory`."""
    file = directory / RECIPE_FILE
    if not isinstance(given, str):
        raise UserError(f"{file}: key {EXTENDS!r} must be a recipe's name or path, got {quoted(given)}")
    if given in names():
        return SHIPPED / given
    base = directory / given
    if "/" not in given or not (base / RECIPE_FILE).is_file():
        hint = nearest(given, names())
        raise UserError(f"{file}: extends {quoted(given)}, which is no recipe of the package{hint} and no path to one from there")
    return base


def read_mapping(path: Path) -> Data:
    """What a recipe's file says. Raises `UserError` when there is none, or it is no mapping."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a recipe directory holds recipe.yaml and one file per stage")
    value = read_yaml(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is {'empty' if value is None else 'not a mapping'}; expected keys and values")
    return value


def laid_over(below: Data, above: Data) -> Data:
    """`below` with the keys of `above`: maps are joined, what is null above is left out."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        if value is None and key in below:
            del found[key]
        else:
            found[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found
