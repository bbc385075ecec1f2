"""No number in a recipe is without a bound, and nothing that a recipe quotes or nests stops the one line that refuses it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from keural.errors import UserError
from keural.recipe import RecipeSpec, StageSpec, load_recipe, parse_duration

TOY = "toy"


def specs(kind: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """A spec and those inside it."""
    if kind in seen:
        return
    seen.add(kind)
    yield kind
    for field in kind.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            inner = waiting.pop()
            waiting += get_args(inner)
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from specs(inner, seen)


def numbers(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if {int, float} & {field.annotation, *get_args(field.annotation)}:
            yield name


NUMBERS = [(kind, name) for root in (RecipeSpec, StageSpec) for kind in specs(root, set()) for name in numbers(kind)]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=[f"{kind.__name__}.{name}" for kind, name in NUMBERS])
@pytest.mark.parametrize("value", [10**40, -(10**40), float("inf"), float("nan")])
def test_every_number_has_bounds(kind: type[BaseModel], name: str, value: float) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({name: value})
    assert any(name in map(str, error["loc"]) or f"{name} must be" in error["msg"] for error in caught.value.errors())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    from keural.recipe.shipped import copy

    return copy(TOY, tmp_path / "recipe")


def refusal(directory: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(directory, overrides)
    line = str(caught.value)
    assert len(line) <= 1100
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    "override",
    [
        "seed=99999999999999999999999",
        "seed=9223372036854775808",
        "seed=-1",
        "train.steps=10000000000",
        f"train.steps={'9' * 5000}",
        f"train.steps=0x{'f' * 5000}",
        "model.num_hidden_layers=1000000000",
        "model.rope_theta=1e39",
        "chat.max_new_tokens=1000001",
        "budget=99999999999999999h",
        f"budget={'9' * 5000}h",
        "data.mixing={epoch: 99999999999999999999}",
        f"pretrain-1.data.sources=[{{name: a, adapter: text, options: {{question: {10**30}}}}}]",
    ],
)
def test_numbers_beyond_the_bounds(directory: Path, override: str) -> None:
    refusal(directory, override)


@pytest.mark.parametrize(
    "override",
    [
        f"description={'[' * 100_000}",
        f"notes={'[' * 50}x{']' * 50}",
        "notes={1: 2}",
        'data="a\\0b"',
        'description="\\0"',
        f"{'k' * 100_000}=1",
        f"train.{'k' * 100_000}=1",
        f"train={'x' * 100_000}",
        "description=\x1b[31m",
        "train.\x1b[31m=1",
        "\u202eseed=1",
        "seed=&a [*a]",
        "name=a/../b",
        f"name={'a' * 100_000}!",
        "data=caf\udce9",
    ],
    ids=str.__len__,
)
def test_overrides_that_hurt(directory: Path, override: str) -> None:
    refusal(directory, override)


def bomb() -> str:
    anchors = [f"&a{number} [{','.join([f'*a{number - 1}'] * 9)}]" for number in range(1, 10)]
    return f"[&a0 [{','.join('x' * 9)}], {', '.join(anchors)}]"


@pytest.mark.parametrize("key", ["path", "options", "name", "gates"])
@pytest.mark.parametrize("hurts", [bomb(), "[" * 100_000, f"{'9' * 5000}", "9999-99-99", "[" * 60 + "]" * 60], ids=len)
def test_values_that_hurt_in_a_stage_file(directory: Path, key: str, hurts: str) -> None:
    source = f"{{name: a, adapter: text, {key}: {hurts}}}" if key != "name" else f"{{adapter: text, name: {hurts}}}"
    (directory / "pretrain-1.yaml").write_text(f"name: pretrain-1\nobjective: next_token\ndata: {{sources: [{source}]}}\n")
    assert "pretrain-1.yaml" in refusal(directory)


def test_a_bomb_is_refused_in_little_memory(directory: Path) -> None:
    (directory / "recipe.yaml").write_text(f"name: a\nstages: []\nnotes: {bomb()}\n")
    limited = 'ulimit -v 4000000; exec "$@"'
    command = ["bash", "-c", limited, "bash", sys.executable, "-m", "keural", "recipe", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("keural: error: ")
    assert result.stderr.count("\n") == 1


def test_a_recipe_may_hold_what_it_may(directory: Path) -> None:
    share = ["train.steps=null", "train.budget_share=0.1", "budget=1000h"]
    loaded = load_recipe(directory, ["seed=9223372036854775807", 'description="a\\u202e\\e[31m"', *share])
    assert loaded.spec.seed == 2**63 - 1
    assert loaded.spec.description == "a\u202e\x1b[31m"


def test_what_keural_recipe_prints_is_the_recipe(directory: Path, keural: Any) -> None:
    code, out, _ = keural("recipe", directory, 'description="a\\u202e\\e[31m[bold]b"', "notes=['\u200b']")
    assert code == 0
    assert not {"\x1b", "\u202e", "\u200b"} & set(out)
    assert yaml.safe_load(out)["recipe"]["description"] == "a\u202e\x1b[31m[bold]b"


def test_durations_have_an_end() -> None:
    with pytest.raises(ValueError, match="longer than three hundred years"):
        parse_duration("9999999999999h")
