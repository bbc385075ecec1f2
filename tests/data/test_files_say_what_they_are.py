"""A file is what its bytes say: recognised and read, or refused in one line that names it and what to do."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.readers.notes import ReadingNotes
from keural.data.readers.sniff import describe
from keural.data.records import Document, Drop
from keural.data.sources import open_source
from keural.errors import UserError
from keural.recipe import SourceSpec
from tests.helpers.examples import examples

QA = "q,a\nName a tree.,An oak.\nName a fish.,A trout.\n"
ROWS = [{"q": "Name a tree.", "a": "An oak."}, {"q": "Name a fish.", "a": "A trout."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def source(path: str, adapter: str = "qa", format_name: str | None = None, **options: Any) -> SourceSpec:
    named = {"question": "q", "answer": "a"} if adapter == "qa" else {}
    return SourceSpec(name="s", adapter=adapter, path=path, format=format_name, options=named | options)


def read(data_dir: Path, spec: SourceSpec, notes: ReadingNotes | None = None) -> list[Any]:
    found = list(open_source(spec, data_dir).read(seed=0, notes=notes))
    return [record if isinstance(record, Drop | Document) else [turn.content for turn in record.messages] for record in found]  # type: ignore[union-attr]


def refusal(data_dir: Path, spec: SourceSpec) -> str:
    with pytest.raises(UserError) as refused:
        read(data_dir, spec)
    message = str(refused.value)
    assert message.startswith("source 's': ")
    assert "\n" not in message
    return message.removeprefix("source 's': ").replace(f"{data_dir}/", "")


def put(data_dir: Path, name: str, content: str | bytes) -> None:
    path = data_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


BOTH = [["Name a tree.", "An oak."], ["Name a fish.", "A trout."]]


class TestTables:
    @pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_what_divides_cells_is_found_out_and_said(self, data_dir: Path, name: str, delimiter: str, end: str) -> None:
        put(data_dir, name, QA.replace(",", delimiter).replace("\n", end))
        notes = ReadingNotes()
        assert read(data_dir, source(name), notes) == BOTH
        assert bool(notes.lines()) == (delimiter != {"a.csv": ",", "a.tsv": "\t"}[name])

    def test_the_other_delimiters_may_stand_inside_cells(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", "q;a\nName, if you can, a tree.;An oak, or a pine.\nName a fish.;A trout.\n")
        assert read(data_dir, source("a.csv")) == [["Name, if you can, a tree.", "An oak, or a pine."], BOTH[1]]
        put(data_dir, "b.csv", "q,a\nOne; two; three?,Four; five.\nOne; two?,Six.\n")
        assert read(data_dir, source("b.csv")) == [["One; two; three?", "Four; five."], ["One; two?", "Six."]]

    def test_one_column_of_prose_stays_one_column(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", "text\nFirst; second\nOne\ttwo\nA | B\n")
        assert [record.text for record in read(data_dir, source("a.csv", "text"))] == ["First; second", "One\ttwo", "A | B"]

    def test_the_line_that_spreadsheets_write_first(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", "sep=;\r\n" + QA.replace(",", ";"))
        assert read(data_dir, source("a.csv")) == BOTH

    def test_a_given_delimiter_and_quote(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", "q^a\n'Name^a tree.'^\"An oak.\"\n")
        assert read(data_dir, source("a.csv", delimiter="^", quote="'")) == [["Name^a tree.", '"An oak."']]
        put(data_dir, "b.csv", 'q,a\n"Yes," she said.,No.\n'.replace("Yes,", "Yes"))
        assert read(data_dir, source("b.csv", quote="none")) == [['"Yes" she said.', "No."]]

    @pytest.mark.parametrize(("option", "value"), [("delimiter", ";;"), ("delimiter", ""), ("quote", "''"), ("quote", "\n")])
    def test_an_option_that_is_no_character(self, data_dir: Path, option: str, value: str) -> None:
        put(data_dir, "a.csv", QA)
        assert f"option {option!r} must be one character" in refusal(data_dir, source("a.csv", **{option: value}))

    def test_a_delimiter_without_effect_is_refused(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", QA)
        assert "option delimiter has no effect" in refusal(data_dir, source("a.csv", delimiter=";"))

    def test_quoted_cells_in_tabs_where_they_are_clearly_quoted(self, data_dir: Path) -> None:
        put(data_dir, "a.tsv", 'q\ta\n"Say ""tree""."\tOak.\nName a fish.\tA trout.\n')
        assert read(data_dir, source("a.tsv")) == [['Say "tree".', "Oak."], BOTH[1]]
        put(data_dir, "b.tsv", 'q\ta\n"Why?"\t"Because," he said.\nName a fish.\tA trout.\n')
        assert read(data_dir, source("b.tsv"))[0] == ['"Why?"', '"Because," he said.']

    def test_rows_of_another_width_are_counted_with_their_cells(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", QA + "only one\nthree,cells,here\ntwo,cells,,\n")
        assert read(data_dir, source("a.csv"))[2:] == [
            Drop("ragged_row", "a.csv:4", "1 cells, not 2"),
            Drop("ragged_row", "a.csv:5", "3 cells, not 2"),
            ["two", "cells"],
        ]

    def test_columns_by_number_below_a_header(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", QA)
        assert read(data_dir, SourceSpec(name="s", adapter="qa", path="a.csv", options={"question": 0, "answer": [1]})) == BOTH
        put(data_dir, "b.csv", "1,0\na question,an answer\n")  # names, not numbers
        assert read(data_dir, SourceSpec(name="s", adapter="qa", path="b.csv", options={"question": 1, "answer": 0})) == [
            ["a question", "an answer"]
        ]

    def test_two_columns_of_one_name_are_refused_and_can_be_numbered(self, data_dir: Path) -> None:
        put(data_dir, "a.csv", "text,text,label\none,two,1\n")
        assert refusal(data_dir, source("a.csv", "text")).startswith("a.csv:1: columns 0, 1 are all called 'text'")
        assert read(data_dir, source("a.csv", "text", field=[1, 0])) == [Document("two\none", "a.csv:2")]


class TestQuotationWithoutEnd:
    def test_the_lines_below_are_read_again(self, data_dir: Path) -> None:
        lines = ["q,a", *(f"Name number {number}.,It is {number}." for number in range(1, 1001))]
        lines[3] = lines[3].replace("It is", '"It is')
        put(data_dir, "a.csv", "\n".join(lines))
        found = read(data_dir, source("a.csv"))
        assert found[2] == Drop("unclosed_quote", "a.csv:4")
        assert [record for record in found if not isinstance(record, Drop)] == [
            [f"Name number {number}.", f"It is {number}."] for number in range(1, 1001) if number != 3
        ]

    def test_quoted_cells_further_down_are_read_as_such(self, data_dir: Path) -> None:
        lines = ["q,a", 'one,"open', *(f"q{number},a{number}" for number in range(30)), 'x,"quoted, and', 'of two lines"', 'y,"z"']
        put(data_dir, "a.csv", "\n".join(lines))
        found = read(data_dir, source("a.csv"))
        assert found[0] == Drop("unclosed_quote", "a.csv:2")
        assert found[1:] == [
            *([f"q{number}", f"a{number}"] for number in range(30)),
            ["x", "quoted, and\nof two lines"],
            ["y", "z"],
        ]

    @pytest.mark.parametrize("tail", ["and no comma here\nnor here\n", ""])
    def test_few_lines_or_lines_that_are_no_rows_are_all_counted(self, data_dir: Path, tail: str) -> None:
        put(data_dir, "a.csv", f'q,a\n1,2\none,"open\nb,c\n{tail}')
        found = read(data_dir, source("a.csv"))
        assert [drop.where for drop in found[1:]] == [f"a.csv:{number}" for number in range(3, 5 + tail.count("\n"))]
        assert {drop.reason for drop in found[1:]} == {"unclosed_quote"}

    def test_a_mark_that_closes_far_below_is_no_cell(self, data_dir: Path) -> None:
        lines = ["q,a", 'one,"open', *(f"q{number},a{number}" for number in range(30)), 'last,closed"', "x,y"]
        put(data_dir, "a.csv", "\n".join(lines))
        found = read(data_dir, source("a.csv"))
        assert [drop.reason for drop in found[:-1]] == ["unclosed_quote"] * 32
        assert found[-1] == ["x", "y"]

    def test_a_long_cell_of_many_lines_stays_a_cell(self, data_dir: Path) -> None:
        cell = "\n".join(f"line {number}: some prose" for number in range(300))
        put(data_dir, "a.csv", f'q,a\none,"{cell}"\ntwo,b\n')
        assert read(data_dir, source("a.csv")) == [["one", cell], ["two", "b"]]

    @given(
        st.lists(st.tuples(*[st.text(st.sampled_from('ab ,"\n'), min_size=1, max_size=8).filter(str.strip)] * 2), max_size=8),
        st.data(),
    )
    @examples(25)
    def test_every_line_is_a_row_or_counted(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[Any], data: st.DataObject
    ) -> None:
        folder = tmp_path_factory.mktemp("csv")
        text = "q,a\n" + "".join(",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) + "\n" for row in rows)
        place = data.draw(st.integers(4, len(text)))
        broken = text[:place] + '"' + text[place:] + "".join(f"q{number},a{number}\n" for number in range(40))
        put(folder, "a.csv", broken)
        found = read(folder, source("a.csv"))
        whole = sum(cell[0].startswith("q") and cell[0][1:].isdecimal() for cell in found if not isinstance(cell, Drop))
        lost = {drop.where for drop in found if isinstance(drop, Drop)}
        assert whole + len(lost) >= 40


class TestJson:
    def test_lines_in_a_json_file_and_an_array_in_a_lines_file(self, data_dir: Path) -> None:
        for name, content in (
            ("a.json", LINES),
            ("b.jsonl", json.dumps(ROWS)),
            ("c.jsonl", json.dumps(ROWS, indent=2)),
            ("d.ndjson", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"),
        ):
            put(data_dir, name, content)
            notes = ReadingNotes()
            assert read(data_dir, source(name), notes) == BOTH
            assert len(notes.lines()) == 1

    def test_files_that_are_what_their_names_say(self, data_dir: Path) -> None:
        for name, content in (("a.jsonl", LINES), ("a.json", json.dumps(ROWS)), ("b.json", json.dumps(ROWS, indent=1))):
            put(data_dir, name, content)
            notes = ReadingNotes()
            assert read(data_dir, source(name), notes) == BOTH
            assert notes.lines() == ()

    def test_conversations_as_lists_stay_lines(self, data_dir: Path) -> None:
        turns = [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "An oak."}]
        for count in (1, 3):
            put(data_dir, "a.jsonl", f"{json.dumps(turns)}\n" * count)
            assert read(data_dir, source("a.jsonl", "messages")) == [BOTH[0]] * count

    def test_a_declared_format_that_is_not_it_is_refused(self, data_dir: Path) -> None:
        put(data_dir, "a.json", LINES)
        assert "give format: jsonl" in refusal(data_dir, source("a.json", format_name="json"))
        put(data_dir, "a.data", json.dumps(ROWS, indent=1))
        assert "give format: json" in refusal(data_dir, source("a.data", format_name="jsonl"))

    @pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
    @pytest.mark.parametrize("content", [LINES, json.dumps(ROWS, indent=1)])
    def test_json_called_a_table_is_json(self, data_dir: Path, name: str, content: str) -> None:
        put(data_dir, name, content)
        assert read(data_dir, source(name)) == BOTH

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    @pytest.mark.parametrize(("content", "format_name"), [(QA, "csv"), (QA.replace(",", "\t"), "tsv")])
    def test_a_table_called_json_is_refused_with_what_it_is(
        self, data_dir: Path, name: str, content: str, format_name: str
    ) -> None:
        put(data_dir, name, content)
        assert refusal(data_dir, source(name)).endswith(f"give format: {format_name}")
        assert read(data_dir, source(name, format_name=format_name)) == BOTH

    def test_a_name_given_twice_is_counted_unless_it_says_the_same(self, data_dir: Path) -> None:
        twice, same = '{"q": "a", "a": "b", "q": "c"}', '{"q": "a", "a": "b", "q": "a"}'
        put(data_dir, "a.jsonl", f"{twice}\n{same}\n")
        assert read(data_dir, source("a.jsonl")) == [Drop("repeated_key", "a.jsonl:1", "q"), ["a", "b"]]
        put(data_dir, "a.json", f'[{twice}, {same}, {{"q": "x", "a": {{"b": 1, "b": 2}}}}]')
        assert [row if isinstance(row, list) else row.reason for row in read(data_dir, source("a.json"))] == [
            "repeated_key",
            ["a", "b"],
            "repeated_key",
        ]
        put(data_dir, "a.yaml", "- {q: a, a: b, q: c}\n- {q: a, a: b, q: a}\n")
        assert read(data_dir, source("a.yaml")) == [Drop("malformed_row", "a.yaml#1"), ["a", "b"]]

    def test_lines_of_json_called_text_are_said_and_other_adapters_are_told(self, data_dir: Path) -> None:
        put(data_dir, "a.txt", LINES)
        notes = ReadingNotes()
        read(data_dir, source("a.txt", "text"), notes)
        assert notes.lines() == ("a.txt read as text, though each of its lines is a JSON value",)
        assert refusal(data_dir, source("a.txt")).endswith("it looks like jsonl: give format: jsonl")


def zipped(**members: str | bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return buffer.getvalue()


def tarred(mode: str = "w", **members: str | bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            raw = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name.replace("__", "/").replace("_dot_", "."))
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def zstandard(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(content))


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard}


class TestPacked:
    @pytest.mark.parametrize("packer", PACKERS)
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"])
    def test_packing_is_recognised_whatever_the_name(self, data_dir: Path, packer: str, name: str) -> None:
        put(data_dir, name, PACKERS[packer](LINES.encode()))
        assert read(data_dir, source(name)) == BOTH
        put(data_dir, name, PACKERS[packer](gzip.compress(LINES.encode())))
        assert read(data_dir, source(name)) == BOTH

    def test_text_that_is_not_packed_in_spite_of_its_name(self, data_dir: Path) -> None:
        put(data_dir, "a.jsonl.gz", LINES)
        notes = ReadingNotes()
        assert read(data_dir, source("a.jsonl.gz"), notes) == BOTH
        assert notes.lines() == ("a.jsonl.gz is not packed, unlike its name says",)

    @pytest.mark.parametrize("pack", [bz2.compress, gzip.compress])
    def test_a_declared_format_is_that_of_the_content(self, data_dir: Path, pack: Callable[[bytes], bytes]) -> None:
        put(data_dir, "a.data", pack(LINES.encode()))
        assert read(data_dir, source("a.data", format_name="jsonl")) == BOTH


class TestArchives:
    @pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.zip", "data"])
    def test_the_files_of_an_archive_are_read_by_their_own_names(self, data_dir: Path, name: str) -> None:
        members: dict[str, Any] = {
            "d__a_dot_jsonl": LINES,
            "d__b_dot_csv": QA.replace(",", ";"),
            "d__c_dot_json": LINES,
            "d__x_dot_hwp": "x",
            "_dot_hidden_dot_csv": "x",
            "d__._a_dot_csv": "x",
        }
        mode = {"a.tar.gz": "w:gz", "a.tgz": "w:gz", "a.tar.bz2": "w:bz2", "a.tar.xz": "w:xz"}.get(name, "w")
        put(data_dir, name, zipped(**members) if name == "a.zip" else tarred(mode, **members))
        notes = ReadingNotes()
        assert read(data_dir, source(name), notes) == BOTH * 3
        assert any("d/b.csv" in line for line in notes.lines())

    def test_encodings_inside(self, data_dir: Path) -> None:
        korean = "바람이 많이 부는 날이다.\n그래서 우리는 집에 있었다.\n"
        put(data_dir, "a.tar", tarred(a_dot_txt=korean.encode("cp949"), b_dot_txt=korean.encode("utf-16-le")))
        assert [record.text for record in read(data_dir, source("a.tar", "text"))] == [korean, korean]

    def test_suffixes_name_what_is_read(self, data_dir: Path) -> None:
        put(data_dir, "a.tar.gz", tarred("w:gz", t__b_dot_en="English.\n", t__a_dot_ko="한국어.\n"))
        message = refusal(data_dir, source("a.tar.gz", "text"))
        assert message.startswith("a.tar.gz holds no file that adapter text reads, but .en (1), .ko (1); name those to read: ")
        assert message.endswith("options: {suffixes: [.en]}")
        assert read(data_dir, source("a.tar.gz", "text", suffixes=[".ko"])) == [Document("한국어.\n", "a.tar.gz/t/a.ko")]

    @pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.txt", "a"])
    @pytest.mark.parametrize("format_name", ["text", "jsonl"])
    def test_an_archive_is_no_text_whatever_is_declared(self, data_dir: Path, name: str, format_name: str) -> None:
        put(data_dir, name, zipped(a_dot_jsonl=LINES) if name in ("a.zip", "a") else tarred("w:gz", a_dot_jsonl=LINES))
        message = refusal(data_dir, source(name, "text", format_name))
        assert "archive, not" in message
        assert "leave format out" in message
        assert "format: text" not in message

    def test_half_a_tar_archive_names_that_lead_out_and_nested_ones(self, data_dir: Path) -> None:
        put(data_dir, "a.tar.gz", (whole := tarred("w:gz", a_dot_jsonl=LINES * 500, b_dot_jsonl=LINES))[: len(whole) // 2])
        assert "a.tar.gz" in refusal(data_dir, source("a.tar.gz"))
        put(data_dir, "b.tar", tarred(**{"..__a_dot_jsonl": LINES}))
        assert "leads out of the archive" in refusal(data_dir, source("b.tar"))
        put(data_dir, "c.zip", zipped(a_dot_jsonl=zipped(b_dot_jsonl=LINES)))
        assert "an archive inside an archive" in refusal(data_dir, source("c.zip"))

    def test_links_and_devices_are_passed_over(self, data_dir: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            link = tarfile.TarInfo("passwd.jsonl")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
            info = tarfile.TarInfo("a.jsonl")
            info.size = len(LINES)
            archive.addfile(info, io.BytesIO(LINES.encode()))
        put(data_dir, "a.tar", buffer.getvalue())
        assert read(data_dir, source("a.tar")) == BOTH


def sqlite(path: Path) -> bytes:
    with sqlite3.connect(path / "x.db") as base:
        base.execute("create table t (a)")
    base.close()
    return (path / "x.db").read_bytes()


OTHERS: list[tuple[str, Callable[[Path], bytes], list[str]]] = [
    ("a.pdf", lambda _: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ["a PDF document", "extract its text"]),
    ("a.txt", lambda _: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ["a PDF document"]),
    ("a.db", sqlite, ["an SQLite data base", "export"]),
    ("a.csv", lambda _: zipped(xl__workbook_dot_xml="<x/>"), ["an Excel workbook", "export it as CSV"]),
    ("a.xlsx", lambda _: zipped(xl__workbook_dot_xml="<x/>"), ["an Excel workbook"]),
    ("a.xls", lambda _: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), ["an old office document"]),
    ("a.docx", lambda _: zipped(word__document_dot_xml="<x/>"), ["a Word document"]),
    ("a.7z", lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(40), ["a 7-Zip archive", "unpack"]),
    ("a.arrow", lambda _: b"ARROW1\0\0" + bytes(40), ["an Arrow file", "convert it"]),
    ("a.jsonl", lambda _: b"<!DOCTYPE html>\n<html><body>404</body></html>", ["an HTML page", "fetch it again"]),
    ("a.parquet", lambda _: b"text\nplain\n", ["not a Parquet file"]),
    ("a.txt", lambda _: bytes(range(256)) * 9, ["not clear how it is encoded"]),
    ("a.txt", lambda _: b"\0" * 500, ["control characters"]),
    ("a.png", lambda _: b"\x89PNG\r\n\x1a\n" + bytes(50), ["an image", "leave it out"]),
]


@pytest.mark.parametrize(("name", "content", "words"), OTHERS)
@pytest.mark.parametrize("format_name", [None, "text"])
def test_what_is_no_text_is_named(
    data_dir: Path, tmp_path: Path, name: str, content: Callable[[Path], bytes], words: list[str], format_name: str | None
) -> None:
    put(data_dir, name, content(tmp_path))
    declared = format_name if name not in ("a.jsonl", "a.parquet") else None
    message = refusal(data_dir, source(name, "text", declared))
    assert message.startswith(name)
    assert all(word in message for word in words), message
    assert describe(data_dir / name).problem


def test_parquet_under_another_name_is_read(data_dir: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"q": ["a"], "a": ["b"]}), data_dir / "a.jsonl")
    assert read(data_dir, source("a.jsonl")) == [["a", "b"]]


def test_numbers_of_a_column_with_empty_cells_are_whole(data_dir: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"q": ["a", "b", "c"], "a": [3.0, None, 18.0], "x": [1.5, None, 2.0], "y": [1.0, 2.0, 3.0]}
    pq.write_table(pa.table(columns), data_dir / "a.parquet")
    notes = ReadingNotes()
    assert read(data_dir, source("a.parquet"), notes) == [["a", "3"], Drop("missing_a", "a.parquet#2"), ["c", "18"]]
    assert notes.lines() == ("a.parquet holds whole numbers and empty cells as floats, read as whole numbers: a",)
    assert read(data_dir, source("a.parquet", answer="y"))[0] == ["a", "1.0"]
    assert read(data_dir, source("a.parquet", answer="x"))[0] == ["a", "1.5"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_text(data_dir: Path, value: str) -> None:
    put(data_dir, "a.jsonl", f'{{"q": "a", "a": {value}}}\n')
    (drop,) = read(data_dir, source("a.jsonl"))
    assert (drop.reason, drop.detail) == ("a_is_not_text", {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}[value])


class TestFilesWithoutRows:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", "q,a\n"),
            ("a.csv", "\n\n"),
            ("a.jsonl", "\n \n"),
            ("a.json", "[]"),
            ("a.json", "  \n"),
            ("a.yaml", "# nothing\n"),
            ("a.tsv", "q\ta\n"),
        ],
    )
    def test_each_is_an_error_of_its_source(self, data_dir: Path, name: str, content: str) -> None:
        put(data_dir, f"d/{name}", content)
        put(data_dir, "d/z.jsonl", LINES)
        assert f"d/{name} holds no rows" in refusal(data_dir, source("d"))

    def test_a_prefix_that_no_line_has(self, data_dir: Path) -> None:
        put(data_dir, "a.txt", "one\ntwo\n")
        assert "no line begins with '# text = '" in refusal(data_dir, source("a.txt", "text", split="line", prefix="# text = "))

    def test_a_prefix_chooses_among_many_files(self, data_dir: Path) -> None:
        put(data_dir, "d/a.txt", "# text = one\n")
        put(data_dir, "d/b.txt", "two\n")
        found = read(data_dir, source("d", "text", split="line", prefix="# text = "))
        assert found == [Document("one", "d/a.txt:1"), Drop("no_rows", "d/b.txt")]

    def test_a_member_without_rows_is_counted(self, data_dir: Path) -> None:
        put(data_dir, "a.zip", zipped(a_dot_csv="q,a\n", b_dot_csv=QA))
        assert read(data_dir, source("a.zip")) == [Drop("no_rows", "a.zip/a.csv"), *BOTH]


class TestDirectories:
    def test_markdown_is_markdown(self, data_dir: Path) -> None:
        put(data_dir, "d/a.md", "# 제목\n")
        put(data_dir, "d/requirements.txt", "numpy\n")
        assert read(data_dir, source("d", "markdown")) == [Document("# 제목\n", "d/a.md")]
        assert read(data_dir, source("d", "markdown", "text")) == [Document("numpy\n", "d/requirements.txt")]
        (data_dir / "d/a.md").unlink()
        assert "holds no markdown file, but .txt (1)" in refusal(data_dir, source("d", "markdown"))

    def test_running_text_beside_tables_is_refused(self, data_dir: Path) -> None:
        for name, content in (
            ("a.md", "# 제목\n"),
            ("ci.yml", "on: push\n"),
            ("config.json", '{"name": "x"}'),
            ("x.py", "x = 1\n"),
        ):
            put(data_dir, f"d/{name}", content)
        message = refusal(data_dir, source("d", "text"))
        assert "markdown (first a.md), yaml (first ci.yml), json (first config.json)" in message
        assert "format: markdown" in message
        assert read(data_dir, source("d", "text", "markdown")) == [Document("# 제목\n", "d/a.md")]
        assert read(data_dir, source("d", "text", suffixes=[".py", ".md"])) == [
            Document("# 제목\n", "d/a.md"),
            Document("x = 1\n", "d/x.py"),
        ]
        put(data_dir, "r.zip", zipped(**{"a_dot_md": "# 제목\n", "ci_dot_yml": "text: push\n"}))
        assert "running text and tables" in refusal(data_dir, source("r.zip", "text"))

    def test_a_suffix_that_no_file_has(self, data_dir: Path) -> None:
        put(data_dir, "d/a.md", "# a\n")
        assert "holds no .py file, but .md (1)" in refusal(data_dir, source("d", "text", suffixes=[".py"]))

    def test_archives_in_a_directory_are_named_by_their_paths(self, data_dir: Path) -> None:
        put(data_dir, "d/a.tar.gz", tarred("w:gz", a_dot_jsonl=LINES))
        assert refusal(data_dir, source("d")).endswith("but .gz (1); name an archive by its own path")


class TestSentences:
    SRT = (
        "1\n00:00:01,000 --> 00:00:02,500\n<i>바람이</i> 분다.\n- 그래요?\n\n"
        "2\n00:00:03,000 --> 00:00:04,000\n{\\an8}네.\n\nbroken\n"
    )

    def test_subtitles(self, data_dir: Path) -> None:
        put(data_dir, "a.srt", self.SRT.replace("\n", "\r\n"))
        drop = Drop("malformed_row", "a.srt:10", "a cue without a line of times")
        assert read(data_dir, source("a.srt", "text")) == [drop, Document("바람이 분다.\n- 그래요?\n네.", "a.srt:1")]
        assert read(data_dir, source("a.srt", "text", split="line")) == [
            Document("바람이 분다.\n- 그래요?", "a.srt:1"),
            Document("네.", "a.srt:6"),
            drop,
        ]
        put(data_dir, "a.vtt", "WEBVTT\n\nNOTE a\n\n00:01.000 --> 00:02.000 align:start\n<v Ann>Yes.</v>\n")
        assert read(data_dir, source("a.vtt", "text")) == [Document("Yes.", "a.vtt:5")]

    def test_annotated_sentences(self, data_dir: Path) -> None:
        def token(number: str, form: str, more: str = "_") -> str:
            return "\t".join([number, form, *["_"] * 7, more]) + "\n"

        first = "# newdoc\n# text = 바람이 분다.\n" + token("1", "바람이") + token("2", "분다", "SpaceAfter=No") + token("3", ".")
        second = (
            token("1-2", "don't") + token("1", "do") + token("2", "n't") + token("2.1", "x") + token("3", "go", "SpaceAfter=No")
        )
        put(data_dir, "a.conllu", f"{first}\n{second}{token('4', '.')}\n# newdoc id = 2\n{token('1', 'End')}\n1\tbroken\n")
        assert read(data_dir, source("a.conllu", "text")) == [
            Document("바람이 분다.\ndon't go.", "a.conllu:1"),
            Drop("malformed_row", "a.conllu:17", "a line has not 10 columns"),
            Document("End", "a.conllu:14"),
        ]
        assert [
            record.text for record in read(data_dir, source("a.conllu", "text", split="line")) if isinstance(record, Document)
        ] == [
            "바람이 분다.",
            "don't go.",
            "End",
        ]


CELL = st.text(st.characters(codec="cp949", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() != ""
)


@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), data=st.data())
@examples(40)
def test_rows_written_in_any_format_encoding_and_packing_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], data: st.DataObject
) -> None:
    import csv

    folder = tmp_path_factory.mktemp("round")
    name = data.draw(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"]))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp949", "utf-16-le", "utf-32-be"]))
    pack = data.draw(st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]))
    named = [{"q": question, "a": answer} for question, answer in rows]
    buffer = io.StringIO()
    if name == "a.jsonl" or name == "a.txt":
        buffer.write("".join(json.dumps(row, ensure_ascii=data.draw(st.booleans())) + "\n" for row in named))
    elif name == "a.json":
        buffer.write(json.dumps(named, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 2]))))
    else:
        writer = csv.writer(
            buffer,
            delimiter="," if name == "a.csv" else "\t",
            quoting=csv.QUOTE_ALL if name == "a.csv" else csv.QUOTE_NONE,
            quotechar='"' if name == "a.csv" else None,
            escapechar=None,
        )
        writer.writerow(["q", "a"])
        writer.writerows(rows)
    put(folder, name, pack(buffer.getvalue().encode(encoding)))
    options = {"encoding": encoding} | ({"quote": "none"} if name == "a.tsv" else {})
    found = read(folder, source(name, format_name="jsonl" if name == "a.txt" else None, **options))
    assert found == [[question, answer] for question, answer in rows]


# Files that were put together


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz"])
def test_a_header_in_the_middle_is_no_row(data_dir: Path, mark: str, name: str) -> None:
    text = f"{mark}{QA}{mark}q,a\nName a bird.,A wren.\n".encode()
    put(data_dir, name, gzip.compress(text) if name.endswith(".gz") else text)
    found = read(data_dir, source(name))
    assert [turns for turns in found if not isinstance(turns, Drop)][-1] == ["Name a bird.", "A wren."]
    assert [(drop.reason, drop.where) for drop in found if isinstance(drop, Drop)] == [("repeated_header", f"{name}:4")]


def test_a_byte_order_mark_in_the_middle_is_no_part_of_a_row(data_dir: Path) -> None:
    put(data_dir, "data.jsonl", "".join(f"\ufeff{line}\n" for line in LINES.splitlines()))
    assert read(data_dir, source("data.jsonl")) == [list(row.values()) for row in ROWS]


@pytest.mark.parametrize("line", ["{'q': 'Name a tree.', 'a': 'An oak.'}", '{"q": "Name a tree.", "a": "An oak."},'])
def test_broken_json_is_not_taken_for_a_table(data_dir: Path, line: str) -> None:
    put(data_dir, "data.jsonl", f"{line}\n" * 5)
    assert {drop.reason for drop in read(data_dir, source("data.jsonl"))} == {"malformed_row"}


def test_json_texts_in_lines_are_json_lines(data_dir: Path) -> None:
    put(data_dir, "data.jsonl", "".join(json.dumps(line) + "\n" for line in LINES.splitlines()))
    assert describe(data_dir / "data.jsonl").problem is None


def test_columns_of_one_name_are_refused_however_it_is_composed(data_dir: Path) -> None:
    put(data_dir, "data.csv", f"답,q,{normalize('NFD', '답')}\n1,2,3\n")
    assert "columns 0, 2 are all called '답'" in refusal(data_dir, source("data.csv"))


def test_whole_numbers_beyond_those_of_the_machine_stay_floats(data_dir: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"q": ["a", "b", "c"], "a": pa.array([1e20, None, 3.0])}), data_dir / "data.parquet")
    found = read(data_dir, source("data.parquet"))
    assert [turns for turns in found if not isinstance(turns, Drop)] == [["a", "1e+20"], ["c", "3.0"]]


@pytest.mark.parametrize("rule", ["---", "+++"])
def test_a_rule_at_the_head_of_a_text_is_part_of_it(data_dir: Path, rule: str) -> None:
    text = f"{rule}\nThe mill stands by the river.\n\n{rule}\nIt grinds rye.\n"
    put(data_dir, "data.md", text)
    (found,) = read(data_dir, SourceSpec(name="s", adapter="markdown", path="data.md"))
    assert found.text == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf16", "utf-32"])
def test_an_encoding_without_its_byte_order_is_refused(data_dir: Path, encoding: str) -> None:
    put(data_dir, "data.jsonl", LINES)
    assert f"is not {encoding} (" in refusal(data_dir, source("data.jsonl", encoding=encoding))


@pytest.mark.parametrize(("written", "given"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("path", ["자료/표.csv", "자료"])
def test_a_path_is_the_same_composed_or_not(
    data_dir: Path, written: Literal["NFC", "NFD"], given: Literal["NFC", "NFD"], path: str
) -> None:
    (data_dir / normalize(written, "자료")).mkdir()
    put(data_dir, normalize(written, "자료/표.csv"), QA)
    assert read(data_dir, source(normalize(given, path))) == [list(row.values()) for row in ROWS]
