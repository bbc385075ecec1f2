"""Benchmarks call what the package has: they are run by hand, where a name that moved would be found too late."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(FOLDER.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, str, Any]]:
    """What a file imports from this package: its name there, where it stands, and what it is (None: not there). What needs a
    library that is not installed is left out.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "keural":
            with without_libraries():
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    name, where = alias.asname or alias.name, f"{node.module}.{alias.name}"
                    with without_libraries():
                        yield name, where, found_in(module, where)


def found_in(module: ModuleType, where: str) -> Any:
    """What stands at `where`, directly in `module`: a name, or a module of its own."""
    name = where.rpartition(".")[2]
    if hasattr(module, name):
        return getattr(module, name)
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name == where:
            return None
        raise


@contextmanager
def without_libraries() -> Iterator[None]:
    """Ends the block where a library that is not installed is imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "keural":
            raise


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_what_it_imports_is_there_and_takes_its_arguments(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {}
    for name, where, found in imported(tree):
        assert found is not None, f"{where} is not there"
        names[name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(names.get(node.func.id)):
            try:
                parameters = inspect.signature(names[node.func.id]).parameters
            except ValueError:  # a class of C without a signature
                continue
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                continue
            given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            assert given <= set(parameters), f"{file.name}:{node.lineno}: {node.func.id} takes no {sorted(given - set(parameters))}"


@pytest.mark.parametrize("sweep", ["learning_sweep", "speaking_sweep"])
def test_a_variant_that_there_is_not_is_refused_before_anything_is_read(
    sweep: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{sweep}")
    monkeypatch.setattr("sys.argv", [sweep, "no data", *(["no run"] if sweep == "speaking_sweep" else []), "--only", "nix"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "argument --only: invalid choice: 'nix'" in capsys.readouterr().err
