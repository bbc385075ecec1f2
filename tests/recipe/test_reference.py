"""The reference of the recipe's keys: it is complete, says what the specs say, and the page in the repository is current."""

import ast
import inspect
from pathlib import Path

import pytest

from keural.errors import UserError
from keural.recipe import data, evaluation, load, model, tokenizer, training
from keural.recipe.reference import explain, markdown, sections

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", [data, evaluation, load, model, tokenizer, training])
def test_every_field_has_a_docstring_of_its_own(module: object) -> None:
    missing = []
    for kind in ast.parse(inspect.getsource(module)).body:  # type: ignore[arg-type]
        if isinstance(kind, ast.ClassDef):
            for field, after in zip(kind.body, [*kind.body[1:], None], strict=True):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not documented:
                    missing.append(f"{kind.name}.{ast.unparse(field.target)}")
    assert missing == []


def test_every_key_has_a_meaning_that_is_a_sentence() -> None:
    for section in sections():
        for key in section.keys:
            assert key.meaning.endswith("."), (section.spec.__name__, key.name)
            assert key.kind, (section.spec.__name__, key.name)


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == markdown(), "docs/recipes.md is out of date; run `make docs`"


def test_every_section_is_on_the_page_once() -> None:
    headings = [line for line in markdown().splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings)) == len(sections())
    for heading in ("## `recipe.yaml`", "## `STAGE.yaml`", "## `train` of `STAGE.yaml`", "## `data.mixing` of `STAGE.yaml`"):
        assert heading in headings


def test_a_key_is_explained_with_type_bounds_default_and_effect() -> None:
    text = explain("train.micro_batch_tokens")
    assert text.startswith("train.micro_batch_tokens (STAGE.yaml)\n")
    assert "whole number, above 0; default: none; changes the result: no: how the work is done" in text
    assert "changes the result: yes" in explain("train.lr")
    assert "default: required" in explain("train.lr")
    assert "next_token or sft or dpo" in explain("objective")
    assert "default: 0.7" in explain("chat.temperature")


def test_a_section_shows_its_keys() -> None:
    text = explain("data.cleaning.executor")
    for key in ("kind", "workers", "cpus_per_task"):
        assert f"\n  {key}: " in text


def test_keys_of_lists_are_found_however_they_are_written() -> None:
    assert explain("data.sources.weight") == explain("data.sources[].weight") == explain("data.sources.0.weight")


def test_a_name_in_both_files_is_explained_twice_and_a_last_part_stands_for_all() -> None:
    assert explain("data").count("data (") == 2
    assert {line.split(" ")[0] for line in explain("max_new_tokens").splitlines() if not line.startswith(" ") and line} == {
        "chat.max_new_tokens",
        "evaluation.exact_match.max_new_tokens",
    }


@pytest.mark.parametrize(("asked", "meant"), [("trian.lr", "train.lr"), ("data.sequence_lenght", "data.sequence_length")])
def test_an_unknown_key_names_the_nearest(asked: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        explain(asked)
