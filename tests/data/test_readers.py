"""Every format gives its rows with their places, whatever the encoding; what cannot be read is a counted drop or one line."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.readers.datafile import DataFile, Row
from keural.data.readers.encodings import guess_encoding
from keural.data.readers.formats import format_of, read_rows
from keural.data.records import Drop
from keural.errors import UserError
from tests.helpers.examples import examples

KOREAN = '첫째 줄입니다.\n둘째 줄, "따옴표"와 쉼표.\n'
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\t\0"), max_size=12)


def rows(path: Path, content: str | bytes, format_name: str | None = None, **options: Any) -> list[Row | Drop]:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    found = read_rows(DataFile(path, path.name), format_name or format_of(path) or "text", options)
    return [Drop(row.reason, row.where) if isinstance(row, Drop) else row for row in found]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_in_any_of_the_encodings_packed_or_not(tmp_path: Path, encoding: str, packed: bool) -> None:
    content = (KOREAN * 40).replace("\n", "\r\n").encode(encoding)
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    assert rows(path, gzip.compress(content) if packed else content) == [Row(path.name, {"text": KOREAN * 40})]


def test_a_few_bad_bytes_do_not_make_it_another_encoding() -> None:
    assert guess_encoding(KOREAN.encode() * 20 + b"\xff" + KOREAN.encode()).encoding == "utf-8"
    assert guess_encoding(KOREAN.encode("cp949")).encoding == "cp949"
    assert guess_encoding(KOREAN.encode()[:-30][:50]).encoding == "utf-8"
    assert guess_encoding(b"plain").encoding == "utf-8"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
@examples(10)
def test_whole_files_come_as_they_are(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.md"
    expected = text.removeprefix("\ufeff")
    assert rows(path, text) == [Row("a.md", {"text": expected})]


def test_lines_and_paragraphs_name_their_place(tmp_path: Path) -> None:
    text = "one\ntwo\n\n \nthree\n    four\n"
    assert rows(tmp_path / "a.txt", text, split="line") == [
        Row("a.txt:1", {"text": "one"}),
        Row("a.txt:2", {"text": "two"}),
        Row("a.txt:5", {"text": "three"}),
        Row("a.txt:6", {"text": "    four"}),
    ]
    found = rows(tmp_path / "a.txt", text, split="paragraph")
    assert [row.where for row in found if isinstance(row, Row)] == ["a.txt:1", "a.txt:5"]
    assert [row.value["text"].strip("\n") for row in found if isinstance(row, Row)] == ["one\ntwo", "three\n    four"]


def test_a_section_is_paragraphs_until_they_have_six_thousand_characters(tmp_path: Path) -> None:
    paragraphs = [letter * length for letter, length in zip("abcdef", (2500, 3499, 1, 7000, 10, 20), strict=True)]
    found = rows(tmp_path / "a.txt", "\n\n\n".join(paragraphs), split="section")
    assert [row.where for row in found if isinstance(row, Row)] == ["a.txt:1", "a.txt:10", "a.txt:13"]
    texts = [row.value["text"] for row in found if isinstance(row, Row)]
    assert texts == ["\n\n".join(paragraphs[:3]), paragraphs[3], "\n\n".join(paragraphs[4:])]


def test_a_prefix_selects_lines(tmp_path: Path) -> None:
    text = "# sent_id = 1\n# text = 안녕하세요.\n\n# text = 네.\n"
    assert rows(tmp_path / "a.conllu", text, "text", prefix="# text = ") == [Row("a.conllu", {"text": "안녕하세요.\n네.\n"})]


def test_only_the_book_of_a_gutenberg_file_is_kept(tmp_path: Path) -> None:
    text = (
        "The Project Gutenberg EBook of X\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n\n"
        "Produced by Somebody\nand others\n\n\n"
        "X\n\nIt was.\n\n\nEnd of the Project Gutenberg EBook of X\n\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nlicence\n"
    )
    assert rows(tmp_path / "x.txt", text, gutenberg=True) == [Row("x.txt", {"text": "X\n\nIt was.\n"})]
    assert rows(tmp_path / "y.txt", "no markers", gutenberg=True) == [Drop("no_gutenberg_markers", "y.txt")]


@given(
    values=st.lists(st.dictionaries(CELL, CELL | st.integers() | st.none() | st.lists(CELL, max_size=2), max_size=3), max_size=6)
)
@examples(10)
def test_json_in_lines_and_arrays(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("json")
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    assert rows(folder / "a.jsonl", lines) == [Row(f"a.jsonl:{n}", value) for n, value in enumerate(values, 1)]
    assert rows(folder / "a.json", json.dumps(values)) == [Row(f"a.json#{n}", value) for n, value in enumerate(values, 1)]
    nested = json.dumps({"a": {"b": values}})
    assert rows(folder / "b.json", nested, rows="a.b") == [Row(f"b.json#{n}", value) for n, value in enumerate(values, 1)]


def test_a_malformed_line_or_file_is_a_drop_with_its_place(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": \n{"a": 2}\n') == [
        Row("a.jsonl:1", {"a": 1}),
        Drop("malformed_row", "a.jsonl:3"),
        Row("a.jsonl:4", {"a": 2}),
    ]
    assert rows(tmp_path / "b.json", '[{"a": 1},\n{"a": }]') == [Drop("malformed_file", "b.json:2")]
    assert rows(tmp_path / "c.json", '{"a": 1}', rows="b") == [Drop("malformed_file", "c.json")]
    assert rows(tmp_path / "d.yml", "a: [1,\n") == [Drop("malformed_file", "d.yml:2")]
    assert rows(tmp_path / "e.po", 'msgid "a"\nnonsense\n') == [Drop("malformed_file", "e.po:2")]


def test_an_object_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.json", '{"a": 1}') == [Row("a.json", {"a": 1})]


@given(table=st.lists(st.lists(CELL, min_size=2, max_size=2).filter(any), min_size=1, max_size=6))
@examples(10)
def test_tables_come_back(tmp_path_factory: pytest.TempPathFactory, table: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("table")
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["Q", "A"], *table])
    found = rows(folder / "a.csv", buffer.getvalue())
    assert [row.value for row in found if isinstance(row, Row)] == [{"Q": q, "A": a} for q, a in table]
    plain = "".join(f"{q}\t{a}\n" for q, a in table)
    found = rows(folder / "a.tsv", "\ufeff" + plain, header=False)
    assert [row.value for row in found if isinstance(row, Row)] == [{"0": q, "1": a} for q, a in table]


def test_cells_may_hold_line_ends_and_bad_rows_are_drops(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.csv", 'Q,A\n"two\nlines",b\nonly one\nc,d\n') == [
        Row("a.csv:3", {"Q": "two\nlines", "A": "b"}),
        Drop("ragged_row", "a.csv:4"),
        Row("a.csv:5", {"Q": "c", "A": "d"}),
    ]
    broken = rows(tmp_path / "b.csv", 'Q,A\n"a"x,b\nc,d\n')
    assert broken == [Drop("malformed_row", "b.csv:2"), Row("b.csv:3", {"Q": "c", "A": "d"})]


def test_written_out_line_ends_in_cells(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.tsv", "a\\nb\\\\n\tc\n", header=False, unescape=True)
    assert found == [Row("a.tsv:1", {"0": "a\nb\\n", "1": "c"})]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["하나", "둘"], "n": [1, 2]}), tmp_path / "a.parquet")
    found = list(read_rows(DataFile(tmp_path / "a.parquet", "a.parquet"), "parquet", {}))
    assert found == [Row("a.parquet#1", {"text": "하나", "n": 1}), Row("a.parquet#2", {"text": "둘", "n": 2})]
    with pytest.raises(UserError, match="not a readable Parquet file"):
        rows(tmp_path / "b.parquet", b"PAR1 nonsense")


def test_a_damaged_gzip_file_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": list(range(5000))}).encode())
    for content in (b"\xff\x93\x88 no gzip \0\x01", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged gzip file"):
            rows(tmp_path / "a.jsonl.gz", content)


def test_suffixes() -> None:
    named = {
        "a.txt": "text",
        "a.mdx": "markdown",
        "a.JSON": "json",
        "a.jsonl.gz": "jsonl",
        "a.tsv": "tsv",
        "a": None,
        "a.tar.gz": "tar",
        "a.TGZ": "tar",
        "a.csv.bz2": "csv",
    }
    assert {name: format_of(Path(name)) for name in named} == named
