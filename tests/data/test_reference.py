"""The reference of adapters: it is complete, every row in it is read as it says, and the page in the repository is current."""

import re
from pathlib import Path

import pytest

from keural.data.adapters import ADAPTERS
from keural.data.adapters.evaluation import ADAPTERS as BENCHMARKS
from keural.data.adapters.reasons import REASONS
from keural.data.preview.reference import becomes, explain, fields_of, listing, markdown, reasons_after, reasons_of
from keural.data.preview.shapes import SHAPES, Shape
from keural.errors import UserError
from keural.recipe import SourceSpec
from keural.terminal import MARKS

ROOT = Path(__file__).resolve().parents[2]
EVERY = sorted({**ADAPTERS, **BENCHMARKS})


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert page == markdown(), "docs/adapters.md is out of date; run `make docs`"


@pytest.mark.parametrize("name", EVERY)
def test_every_adapter_is_on_the_page_in_the_list_and_explained(name: str) -> None:
    assert f"`{name}`" in markdown()
    assert re.search(rf"^{name} ", listing(), re.MULTILINE)
    text = explain(name)
    for option, known in {**ADAPTERS, **BENCHMARKS}[name].options.items():
        assert f"\n  {option}: {known.meaning} (" in text
    for reason in reasons_of(name):
        assert f"\n  {reason}: {REASONS[reason].meaning}" in text


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape_is_read_and_something_of_it_is_trained(shape: Shape) -> None:
    text = becomes(shape)
    assert re.search(rf"{MARKS[0]}[^{MARKS[1]}]+{MARKS[1]}", text)
    assert set(shape.options) <= set(ADAPTERS[shape.adapter].options)


def test_what_is_not_to_be_trained_is_not_marked() -> None:
    shapes = {shape.name: becomes(shape) for shape in SHAPES}
    assert "\n모릅니다." in shapes["turns that say what is trained"]
    assert f"{MARKS[0]}초속" in shapes["turns that say what is trained"]
    kept = shapes["reasoning beside an answer, kept without being trained"]
    assert f"\n</think>\n\n{MARKS[0]}초속" in kept
    assert f"{MARKS[0]}{{" not in shapes["tools, calls and results"], "results are never trained"


def test_reasons_are_those_that_an_adapter_can_give() -> None:
    assert {"unanswerable", "missing_FIELD", "FIELD_is_not_text"} <= set(reasons_of("squad"))
    assert "unanswerable" not in reasons_of("messages")
    assert {"unknown_role", "undeclared_value", "malformed_tool_call"} - {"undeclared_value"} <= set(reasons_of("sharegpt"))
    assert {"redirect", "stub"} <= set(reasons_of("wikipedia_ko"))
    assert "redirect" not in reasons_of("arxiv")
    assert {"too_long", "placeholder", "duplicate"} <= set(reasons_after("conversations"))
    assert "prompt_too_long" not in reasons_after("conversations")
    assert "placeholder" not in reasons_after("documents")


def test_the_rows_that_the_tests_of_sets_drop_are_explained() -> None:
    """A second way to the same table: what rows are dropped for in fact."""
    for name, adapter in ADAPTERS.items():
        if adapter.example is not None:
            empty = adapter({}, SourceSpec(name="s", adapter=name), "row")
            known = set(reasons_of(name))
            reason = getattr(empty, "reason", None)
            assert reason in known or str(reason).startswith("missing_"), (name, reason)


def test_fields_are_those_that_the_adapter_reads() -> None:
    named, others, turns = fields_of("messages")
    assert "messages" in named
    assert "weight" in others
    assert {"role", "content", "tool_calls"} <= set(turns)


def test_an_unknown_adapter_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no adapter 'alpacca' .did you mean 'alpaca'"):
        explain("alpacca")
