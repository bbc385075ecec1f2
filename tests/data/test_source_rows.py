"""The table of sources comes back from JSON as it was, or is refused in one line that names the file and the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from keural.data.loading.mixture import Share
from keural.data.pretokenized import open_pretokenized
from keural.data.source_counts import SourceRow, rows_from_json
from keural.data.tokens.store import StoreWriter
from keural.errors import UserError
from keural.recipe import DataSpec
from keural.tokenizer import KeuralTokenizer

FILE = Path("somewhere/prepared.json")
ROW = SourceRow(
    source="a",
    adapter="text",
    flags=("benchmark", "non-commercial"),
    rows=5,
    kept=3,
    tokens=40,
    drops={"empty": 2},
    first_drop={"empty": "a.txt:4"},
    length_ratio=1.5,
)
SHARE = Share(target=0.5, share=0.4, repeats=1.0, records=3, tokens=40, unused_records=0, unused_tokens=0)


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        SourceRow(source="b", adapter="store", mixture=SHARE),
        SourceRow(source="c", adapter="published", survey="2 shards"),
    ],
)
def test_a_row_comes_back_from_json(row: SourceRow) -> None:
    written = json.loads(json.dumps([row.to_json()]))
    assert rows_from_json(written, FILE) == [row]


def test_only_what_a_row_has_of_a_mixture_and_a_survey_is_written() -> None:
    assert not {"mixture", "survey"} & ROW.to_json().keys()
    assert SourceRow(source="b", adapter="store", mixture=SHARE).to_json()["mixture"]["records"] == 3


def test_rows_written_before_text_kind_was_known_are_read() -> None:
    written = ROW.to_json()
    del written["text_kind"]
    assert SourceRow.from_json(written, FILE) == ROW


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": "5"}, "key 'rows'"),
        ({"rows": True}, "key 'rows'"),
        ({"kept": -1}, "key 'kept'"),
        ({"tokens": 1.5}, "key 'tokens'"),
        ({"source": None}, "key 'source'"),
        ({"flags": "benchmark"}, "key 'flags'"),
        ({"flags": [1]}, "key 'flags.0'"),
        ({"drops": {"empty": "2"}}, "key 'drops.empty'"),
        ({"drops": []}, "key 'drops'"),
        ({"first_drop": {}}, "drops and first_drop of 'a' differ"),
        ({"split": "test"}, "key 'split'"),
        ({"mixture": {"target": 1.0}}, "key 'mixture"),
        ({"length_ratio": "1"}, "key 'length_ratio'"),
        ({"colour": "red"}, "key 'colour'"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        SourceRow.from_json(ROW.to_json() | change, FILE)
    assert str(refused.value).startswith(f"{FILE}: damaged (")
    assert complaint in str(refused.value)


@pytest.mark.parametrize("key", sorted(ROW.to_json().keys() - {"text_kind"}))
def test_a_missing_key_is_refused(key: str) -> None:
    written = ROW.to_json()
    del written[key]
    with pytest.raises(UserError, match=f"has no key '{key}'"):
        SourceRow.from_json(written, FILE)


@pytest.mark.parametrize("value", [None, {}, "rows", [1], [[]], [None]])
def test_what_is_no_table_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="damaged"):
        rows_from_json(value, FILE)


@pytest.mark.parametrize(
    "meta",
    [
        {"sources": [{"source": "a", "kept": 1}]},
        {"sources": "a"},
        {"sources": [{"source": 1, "license": None}], "imported": {}},
        {"sources": [], "imported": {}},
    ],
)
def test_a_store_whose_manifest_holds_another_table_is_refused(
    meta: dict[str, Any], tmp_path: Path, tokenizer: KeuralTokenizer
) -> None:
    with StoreWriter(tmp_path / "store", tokenizer.sha256, tokenizer.vocab_size, "documents", meta) as writer:
        writer.add([1, 5, 2])
    spec = DataSpec(store="store", sequence_length=16)
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        open_pretokenized(spec, "next_token", tmp_path, tokenizer, tmp_path)


def test_a_store_that_names_no_sources_is_one_row(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    with StoreWriter(tmp_path / "store", tokenizer.sha256, tokenizer.vocab_size, "documents") as writer:
        writer.add([1, 5, 2])
    (row,) = open_pretokenized(DataSpec(store="store", sequence_length=16), "next_token", tmp_path, tokenizer, tmp_path).table
    assert (row.source, row.adapter, row.kept, row.tokens) == ("store", "store", 1, 3)
