"""docs/architecture.md against the code: which room imports which, and that no modules import each other in a circle."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
CODE = ROOT / "src" / "keural"
BESIDE = {
    "data.records": ("data.records", "data.permutation"),
    "data.sources": ("data.sources", "data.licenses"),
}
"""Files beside the rooms of `data/` that the page counts apart."""
FREE = {"", "__main__"}
"""The package itself and `python -m keural`: doors, not rooms."""

Imports = dict[str, set[str]]


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below `keural`."""
    found = {}
    for file in CODE.rglob("*.py"):
        name = ".".join(file.relative_to(CODE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = file
    return found


def imports_of(file: Path, known: dict[str, Path], deferred: bool) -> set[str]:
    """Modules of the package that a file imports, with `deferred` also those that it imports inside functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = [block for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)]
    ignored = {id(node) for block in typing_only for inner in block.body for node in ast.walk(inner)}
    if not deferred:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        ignored |= {id(node) for function in functions for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("keural.") for alias in node.names if alias.name.startswith("keural.")}
        if isinstance(node, ast.ImportFrom):
            package = _package(node, file)
            if package is not None:
                named = {f"{package}.{alias.name}".lstrip(".") for alias in node.names}
                found |= {name if name in known else package for name in named}
    return found


def _package(node: ast.ImportFrom, file: Path) -> str | None:
    """The module below `keural` that is imported from, None for one of another package."""
    if node.level:
        base = file.relative_to(CODE).parts[: -node.level]
        return ".".join([*base, *([node.module] if node.module else [])])
    if node.module and node.module.split(".")[0] == "keural":
        return node.module.removeprefix("keural").lstrip(".")
    return None


def declared() -> Imports:
    """The page's table: every room and what it imports, in its order."""
    rows = re.findall(r"^\| `([a-z.]+)` \| .*? \| ([a-z., ]*) ?\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {room: {name for name in re.split(r",\s*", imports.strip()) if name} for room, imports in rows}


def room_of(module: str) -> str:
    """The room that a module is in: the files counted apart, else the longest room whose name it begins with."""
    for room, files in BESIDE.items():
        if module in files:
            return room
    fitting = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len, default=module)


ROOMS = declared()


@functools.cache
def actual() -> Imports:
    """Every room and what it imports, as the code has it."""
    known, found = modules(), {room: set[str]() for room in ROOMS}
    for module, file in known.items():
        if module not in FREE:
            targets = imports_of(file, known, deferred=True) - FREE
            found.setdefault(room_of(module), set()).update(room_of(target) for target in targets)
    return {room: targets - {room} for room, targets in found.items()}


def test_every_file_is_in_a_room_of_the_page() -> None:
    assert {room_of(module) for module in modules() if module not in FREE} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_page_says(room: str) -> None:
    assert actual()[room] == ROOMS[room]


def test_a_room_imports_only_rooms_that_stand_above_it() -> None:
    order = list(ROOMS)

    upwards = {(room, target) for room, targets in ROOMS.items() for target in targets if order.index(target) > order.index(room)}

    assert upwards == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    left = {name: imports_of(file, known, deferred=False) - {name, ""} for name, file in known.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}

    assert left == {}


def test_the_root_of_data_is_small_enough_to_be_read() -> None:
    assert len(list((CODE / "data").glob("*.py"))) <= 13  # twelve files and the map


def test_every_place_that_the_page_points_to_exists() -> None:
    places = re.findall(r"\| `([a-z_/]+(?:\.py)?)`", PAGE.read_text(encoding="utf-8"))
    named = [place for place in places if "/" in place]

    assert named
    assert [place for place in named if not (CODE / place).exists() and not (ROOT / place).exists()] == []
