"""JSON and YAML that is meant to hurt is refused like any other bad file."""

import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.parsing import MAX_DEPTH, Malformed, holds_unreadable, parse_json, parse_yaml, parse_yaml_rows

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text("abc 가나", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=4), inner, max_size=3),
    max_leaves=12,
)


def aliases(levels: int) -> str:
    """YAML of a kilobyte that unfolds to nine to the power of `levels`."""
    anchors = [f"&a{number} [{','.join([f'*a{number - 1}'] * 9)}]" for number in range(1, levels)]
    return f"[&a0 [{','.join('x' * 9)}], {', '.join(anchors)}]"


@given(PLAIN)
def test_ordinary_values_come_through(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_yaml(json.dumps(value)) == value
    assert parse_yaml_rows(json.dumps(value)) == (value, False)


def test_yaml_of_recipes() -> None:
    text = "lr: 1e-4\nwhen: 2024-01-31\nbase: &b {x: 1}\nmore: {<<: *b, y: 0x10}\n"
    assert parse_yaml(text) == {"lr": 1e-4, "when": datetime.date(2024, 1, 31), "base": {"x": 1}, "more": {"x": 1, "y": 16}}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "9" * 5000,
        b"\xff\xfe",
        "[1]".encode("utf-16-le"),
        "[1]".encode("utf-32"),
        b'"\xed\xa0\x80"',
        "",
        "{",
        "[1,]",
        b'{"a": "\xc3',
    ],
    ids=["brackets", "objects", "one too deep", "digits", "bytes", "utf-16", "utf-32", "a half", "nothing", "half", "comma", "cut"],
)
def test_bad_json(text: str | bytes) -> None:
    with pytest.raises(Malformed):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "parts"), [("[[], {}]", 3), ('{"a": [{"b": 1}]}', 5), ("[1, 2, 3]", 1), ("5", 0), ('{"a": {"a": {}}}', 5)]
)
def test_json_has_so_many_lists_objects_and_keys(text: str, parts: int) -> None:
    assert parse_json(text, parts=parts) == json.loads(text)
    if parts:
        with pytest.raises(Malformed, match=f"more than {parts - 1} lists, objects and keys"):
            parse_json(text, parts=parts - 1)


def test_of_keys_that_are_given_once_there_are_so_many() -> None:
    many = "{" + ", ".join(f'"{number}": {{}}' for number in range(50_000)) + ', "0": 1}'

    assert parse_json('{"a": {"b": [{}]}}', parts=6, unique=True) == {"a": {"b": [{}]}}
    with pytest.raises(Malformed, match="more than 60 lists, objects and keys"):
        parse_json(many, parts=60, unique=True)
    with pytest.raises(Malformed, match="'0' is given twice"):
        parse_json(many, unique=True)


def test_json_of_the_greatest_depth() -> None:
    assert json.dumps(parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)) == "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        "- " * 100_000,
        "{a: " * 20_000,
        "? " * 20_000,
        aliases(10),
        "&a [*a]",
        "&a {x: [1, *a]}",
        "? [a]\n: b",
        "a: !!python/object/apply:os.system [ls]",
        "a: \x1b",
        "<<: 3",
        "a: b\n---\nc: d",
    ],
)
def test_bad_yaml(text: str) -> None:
    for parse in (parse_yaml, parse_yaml_rows):
        with pytest.raises(Malformed):
            parse(text)


@pytest.mark.parametrize(
    "scalar",
    ["9999-99-99", "2024-02-30", "9" * 5000, "!!bool maybe", "!!timestamp soon", "!!int ''", "!!float x", "!!binary €", "!tag x"],
)
def test_a_scalar_that_cannot_be_costs_a_recipe_and_only_the_row_of_data(scalar: str) -> None:
    text = f"- text: {scalar}\n- text: fine\n"
    with pytest.raises(Malformed, match="line 1"):
        parse_yaml(text)
    rows, failed = parse_yaml_rows(text)
    assert failed
    assert [holds_unreadable(row) for row in rows] == [True, False]


def test_a_key_twice_is_named_shortly() -> None:
    with pytest.raises(Malformed, match="line 2: key 'a' is given twice"):
        parse_yaml("a: 1\na: 2")
    key = "k" * 900
    with pytest.raises(Malformed, match="given twice") as caught:
        parse_yaml(f"{key}: 1\n{key}: 2")
    assert len(str(caught.value)) < 200


def test_aliases_may_be_used_as_they_are_meant() -> None:
    text = "- &x {a: 1}\n" + "- *x\n" * 1000
    assert parse_yaml(text) == [{"a": 1}] * 1001
