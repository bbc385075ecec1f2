"""Options of adapters and of formats: each says what it may be and what it means, and its default is what holds without it."""

from typing import Any

import pytest

from keural import microworld
from keural.data.adapters import ADAPTERS, adapter_of
from keural.data.adapters.evaluation import ADAPTERS as BENCHMARKS
from keural.data.readers.formats import FORMATS
from keural.data.readers.options import COUNT, LIST, NAME, NUMBER, SWITCH, TEXT, Option, OptionTable
from keural.errors import UserError
from keural.recipe import SourceSpec

TABLES: dict[str, OptionTable] = {
    **{f"adapter {name}": adapter.options for name, adapter in {**ADAPTERS, **BENCHMARKS}.items()},
    **{f"format {name}": known.options for name, known in FORMATS.items()},
}
EVERY = [(owner, name) for owner, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("owner", "name"), EVERY)
def test_an_option_says_what_it_means_and_its_default_is_one_of_its_values(owner: str, name: str) -> None:
    option = TABLES[owner][name]
    assert option.meaning
    assert not option.meaning.endswith(".")
    assert "\n" not in option.meaning
    assert option.kind
    if option.default is not None and not isinstance(option.default, tuple):
        assert option.kinds == COUNT or option.problem(option.default) is None


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_an_adapter_says_what_it_reads(name: str) -> None:
    assert ADAPTERS[name].meaning.endswith(".")


@pytest.mark.parametrize("name", sorted(name for name, adapter in ADAPTERS.items() if adapter.example is not None))
def test_a_default_that_is_given_changes_nothing(name: str) -> None:
    adapter = ADAPTERS[name]
    plain = adapter(adapter.example, SourceSpec(name="s", adapter=name), "file:1")
    for option, known in adapter.options.items():
        if known.default is not None and not isinstance(known.default, tuple):
            given = SourceSpec(name="s", adapter=name, options={option: known.default})
            assert adapter(adapter.example, given, "file:1") == plain, option


@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [
        (Option(NAME, "m"), "a", None),
        (Option(NAME, "m"), 3, None),
        (Option(NAME, "m"), True, "must be a text or a column number, got True"),
        (Option(SWITCH, "m"), 1, "must be true or false, got 1"),
        (Option(NUMBER, "m"), 0.5, None),
        (Option(LIST, "m"), [], "must be a list of names, got []"),
        (Option(LIST, "m"), ["a", 1.5], "must be a list of names, got ['a', 1.5]"),
        (Option(TEXT, "m", choices=("a", "b")), "c", "must be one of a, b, got 'c'"),
        (Option(LIST, "m", choices=("a", "b")), ["a", "c"], "must be one of a, b, got ['a', 'c']"),
    ],
)
def test_what_is_wrong_with_a_value(option: Option, value: Any, wrong: str | None) -> None:
    assert option.problem(value) == wrong


def test_the_options_of_the_toy_world_are_those_that_it_takes() -> None:
    options = adapter_of(SourceSpec(name="s", adapter="microworld")).options
    for name in options:
        with pytest.raises(UserError) as refused:  # of part prose; the one that is wrong is named
            microworld.rows({"part": "pairs", "count": 1, name: "wrong"}, 0)
        assert "unknown option" not in str(refused.value) or name in ("forms", "register")
    with pytest.raises(UserError, match="it has part, count, split, phase, tasks, languages, contrasts"):
        microworld.rows({"part": "pairs", "count": 1, "other": 1}, 0)
    assert set(options) == {"part", "count", "split", "phase", "tasks", "languages", "forms", "register", "contrasts"}
