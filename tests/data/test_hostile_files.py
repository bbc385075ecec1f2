"""Files that are meant to hurt, or are badly hurt: a bad row is a counted drop, a bad file one line, and memory stays small."""

import csv
import gzip
import io
import json
import lzma
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keural.data.readers import formats, lines, unpacking
from keural.data.readers.datafile import DataFile, Row
from keural.data.readers.formats import format_of, read_rows
from keural.data.readers.po import PoError, parse_po
from keural.data.records import Drop
from keural.errors import UserError

MEGABYTE = 1 << 20


def rows(path: Path, content: bytes, format_name: str | None = None, **options: Any) -> list[Row | Drop]:
    path.write_bytes(content)
    found = read_rows(DataFile(path, path.name), format_name or format_of(path) or "text", options)
    return [Drop(row.reason, row.where) if isinstance(row, Drop) else row for row in found]


def zstandard(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content))


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard}


@pytest.mark.parametrize("suffix", PACKERS)
def test_well_packed_text_is_read(tmp_path: Path, suffix: str) -> None:
    content = b'{"text": "the same again"}\n' * 200_000
    assert len(rows(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](content))) == 200_000


class TestPacked:
    @pytest.fixture(autouse=True)
    def little_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unpacking, "FREE_BYTES", MEGABYTE)

    @pytest.mark.parametrize("suffix", PACKERS)
    def test_a_bomb_is_refused_long_before_it_is_unpacked(self, tmp_path: Path, suffix: str) -> None:
        bomb = PACKERS[suffix](b'{"text": "' + b"a" * (128 * MEGABYTE) + b'"}')
        for name in ("a.jsonl", "a.txt", "a.json", "a.csv", "a.yaml", "a.po", "a.md"):
            tracemalloc.start()
            with pytest.raises(UserError, match="as in a zip bomb; it is not read"):
                rows(tmp_path / f"{name}{suffix}", bomb)
            assert tracemalloc.get_traced_memory()[1] < 100 * MEGABYTE
            tracemalloc.stop()

    @pytest.mark.parametrize("suffix", PACKERS)
    def test_frames_one_after_another_count_together(self, tmp_path: Path, suffix: str) -> None:
        one = PACKERS[suffix](b" \n" * (MEGABYTE // 4))
        with pytest.raises(UserError, match="zip bomb"):
            rows(tmp_path / f"a.jsonl{suffix}", one * 4)

    @pytest.mark.parametrize("suffix", PACKERS)
    @pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
    def test_damage_is_one_line(self, tmp_path: Path, suffix: str, damage: str) -> None:
        content = bytearray(PACKERS[suffix](json.dumps({"text": "sea " * 5000}).encode()))
        if damage == "cut":
            del content[len(content) // 2 :]
        elif damage == "flipped":
            content[len(content) // 2] ^= 0xFF
        else:
            content = bytearray(64)
        with pytest.raises(UserError, match=r"damaged .* file"):
            rows(tmp_path / f"a.jsonl{suffix}", bytes(content))

    def test_a_packed_file_inside_an_archive_is_unpacked(self, tmp_path: Path) -> None:
        content = gzip.compress(b'{"text": "a"}\n')
        member = DataFile(tmp_path / "a.zip", "a.zip/b.jsonl.gz", open=lambda: io.BytesIO(content))
        assert list(read_rows(member, "jsonl", {})) == [Row("a.zip/b.jsonl.gz:1", {"text": "a"})]

    def test_a_zip_whose_directory_lies(self, tmp_path: Path) -> None:
        from keural.data.readers.archives import members

        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.json", json.dumps({"text": "sea " * 100}))
        for place in range(0, len(buffer.getvalue()), 3):
            content = bytearray(buffer.getvalue())
            content[place] ^= 0x55
            path = tmp_path / "a.zip"
            path.write_bytes(content)
            try:
                for member in members(DataFile(path, path.name), lambda name: name.endswith(".json")):
                    list(read_rows(member, "json", {}))
            except UserError:
                pass


class TestLongRows:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lines, "MAX_ROW_CHARACTERS", 1000)
        before = csv.field_size_limit(1000)
        yield
        csv.field_size_limit(before)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.csv", "a.txt"])
    def test_a_line_that_is_too_long_is_dropped_and_the_next_are_read(self, tmp_path: Path, name: str) -> None:
        options = {"split": "line"} if name == "a.txt" else {}
        short = '{"text": "a"}' if name == "a.jsonl" else "a"
        head = "" if name in ("a.jsonl", "a.txt") else "text\n"
        content = f"{head}{short}\n{'b' * 5000}\n{short}\n{'c' * 1001}".encode()
        found = rows(tmp_path / name, content, **options)
        first = 1 + bool(head)
        assert [type(row) for row in found] == [Row, Drop, Row, Drop]
        assert [row.where for row in found] == [f"{name}:{first + number}" for number in range(4)]
        assert {row.reason for row in found if isinstance(row, Drop)} <= {"row_too_long", "malformed_row"}

    def test_a_quotation_mark_that_never_ends(self, tmp_path: Path) -> None:
        content = 'text\nfine\n"' + "line\n" * 1000 + "fine\n"
        found = rows(tmp_path / "a.csv", content.encode())
        assert found[0] == Row("a.csv:2", {"text": "fine"})
        assert any(isinstance(row, Drop) for row in found)

    def test_a_paragraph_without_end(self, tmp_path: Path) -> None:
        content = "one\ntwo\n\n" + "line\n" * 1000 + "\nthree\n"
        found = rows(tmp_path / "a.txt", content.encode(), split="paragraph")
        assert found == [
            Row("a.txt:1", {"text": "one\ntwo"}),
            Drop("row_too_long", "a.txt:4"),
            Row("a.txt:1005", {"text": "three"}),
        ]

    @pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.po", "a.md", "a.txt"])
    def test_a_file_that_is_one_value_and_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(formats, "MAX_WHOLE_BYTES", 1000)
        with pytest.raises(UserError, match="read as one value"):
            rows(tmp_path / name, b"x" * 1001)
        with pytest.raises(UserError, match="read as one value"):
            rows(tmp_path / f"{name}.gz", gzip.compress(b"x" * 1001))

    def test_no_memory_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(pairs: list[tuple[str, Any]]) -> None:
            raise MemoryError

        monkeypatch.setattr(formats, "_once", full)
        with pytest.raises(UserError, match="too large for the memory"):
            rows(tmp_path / "a.jsonl", b"{}\n")


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8", "cp949"])
    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_a_file_that_ends_in_the_middle_of_a_character_loses_its_last_row(
        self, tmp_path: Path, encoding: str, cut: int
    ) -> None:
        line = json.dumps({"text": "바다 " * 30}, ensure_ascii=False)
        content = f"{line}\n{line}".encode(encoding)
        found = rows(tmp_path / "a.jsonl", content[: -cut * (4 if encoding == "utf-32" else 1) - (1 if cut == 2 else 0)])
        assert found == [Row("a.jsonl:1", json.loads(line)), Drop("malformed_row", "a.jsonl:2")]

    def test_half_surrogates_of_utf_16_are_no_text(self, tmp_path: Path) -> None:
        content = "a".encode("utf-16") + b"\x00\xd8" + "b".encode("utf-16-le")
        (row,) = rows(tmp_path / "a.txt", content)
        assert isinstance(row, Row)
        with pytest.raises(UnicodeEncodeError):
            row.value["text"].encode()

    def test_zeros(self, tmp_path: Path) -> None:
        found = rows(tmp_path / "a.jsonl", b'\0\0\0\n{"text": "a\\u0000b"}\n{"te\0xt": 1}\n')
        assert found == [Drop("malformed_row", "a.jsonl:1"), Row("a.jsonl:2", {"text": "a\0b"}), Drop("malformed_row", "a.jsonl:3")]


class TestValues:
    @pytest.mark.parametrize("value", ["[" * 200_000, '{"a":' * 50_000, "9" * 5000, '"\x1b"', "nul", ""])
    def test_json(self, tmp_path: Path, value: str) -> None:
        row = f'{{"text": {value}}}'.encode()
        assert rows(tmp_path / "a.jsonl", row + b'\n{"text": "a"}') == [
            Drop("malformed_row", "a.jsonl:1"),
            Row("a.jsonl:2", {"text": "a"}),
        ]
        (found,) = rows(tmp_path / "a.json", row)
        assert isinstance(found, Drop)

    @pytest.mark.parametrize("value", ["9999-99-99", "9" * 5000, "!!bool maybe", "!!timestamp x"])
    def test_a_yaml_value_that_cannot_be_costs_its_row(self, tmp_path: Path, value: str) -> None:
        content = f"- text: fine\n- text: {value}\n- text: [{value}]\n- text: fine\n"
        found = rows(tmp_path / "a.yaml", content.encode())
        assert [type(row) for row in found] == [Row, Drop, Drop, Row]
        assert [row.where for row in found] == [f"a.yaml#{number}" for number in range(1, 5)]

    @pytest.mark.parametrize("content", ["[" * 200_000, "- " * 100_000, "{a: " * 50_000, "&a [*a]", "a: \x01"])
    def test_yaml_that_hurts_costs_the_file(self, tmp_path: Path, content: str) -> None:
        (found,) = rows(tmp_path / "a.yaml", content.encode())
        assert isinstance(found, Drop)
        assert found.reason == "malformed_file"

    def test_a_plural_form_of_a_thousand_digits(self) -> None:
        with pytest.raises(PoError):
            parse_po(f'msgid "a"\nmsgstr[{"9" * 5000}] "b"\n')

    def test_a_catalogue_of_one_endless_message(self) -> None:
        (message,) = parse_po('msgid "a"\nmsgstr ""\n' + '"sea \\n"\n' * 30_000)
        assert message.translations[0] == "sea \n" * 30_000


class TestParquet:
    @pytest.fixture(autouse=True)
    def arrow(self) -> None:
        self.pa = pytest.importorskip("pyarrow")
        self.parquet = pytest.importorskip("pyarrow.parquet")

    def read(self, path: Path, **columns: Any) -> list[Row | Drop]:
        self.parquet.write_table(self.pa.table(columns), path)
        return list(read_rows(DataFile(path, path.name), "parquet", {}))

    def test_bytes_that_are_no_utf_8(self, tmp_path: Path) -> None:
        cells = self.pa.Array.from_buffers(
            self.pa.string(), 3, [None, self.pa.py_buffer(struct.pack("<4i", 0, 2, 4, 6)), self.pa.py_buffer(b"ok\xff\xfeok")]
        )
        found = self.read(tmp_path / "a.parquet", text=cells)
        assert found == [
            Row("a.parquet#1", {"text": "ok"}),
            Drop("malformed_row", "a.parquet#2"),
            Row("a.parquet#3", {"text": "ok"}),
        ]

    @pytest.mark.parametrize("kind", ["timestamp", "date"])
    def test_days_outside_the_calendar(self, tmp_path: Path, kind: str) -> None:
        times = (
            self.pa.array([0, 2**62], self.pa.timestamp("us"))
            if kind == "timestamp"
            else self.pa.array([0, 2**30], self.pa.date32())
        )
        found = self.read(tmp_path / "a.parquet", text=["a", "b"], when=times)
        assert [type(row) for row in found] == [Row, Drop]

    def test_rows_of_later_batches_keep_their_numbers(self, tmp_path: Path) -> None:
        times = self.pa.array([0] * 1500 + [2**62] + [0] * 99, self.pa.timestamp("us"))
        found = self.read(tmp_path / "a.parquet", text=["a"] * 1600, when=times)
        assert [row.where for row in found if isinstance(row, Drop)] == ["a.parquet#1501"]
        assert len(found) == 1600

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_time_zone_that_nobody_knows(self, tmp_path: Path, nested: bool) -> None:
        times = self.pa.array([0], self.pa.timestamp("us", "Nowhere/Never"))
        column = self.pa.StructArray.from_arrays([times], ["inner"]) if nested else times
        with pytest.raises(UserError, match=r"column 'when(\.inner)?' has the time zone 'Nowhere/Never'"):
            self.read(tmp_path / "a.parquet", text=["a"], when=column)

    @pytest.mark.parametrize("zone", ["UTC", "Asia/Seoul", "+09:00"])
    def test_a_time_zone_that_is_known(self, tmp_path: Path, zone: str) -> None:
        (found,) = self.read(tmp_path / "a.parquet", text=["a"], when=self.pa.array([0], self.pa.timestamp("us", zone)))
        assert isinstance(found, Row)

    def test_a_bomb(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        table = self.pa.table({"text": ["a" * (64 * MEGABYTE)]})
        self.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
        with pytest.raises(UserError, match="zip bomb"):
            list(read_rows(DataFile(path, path.name), "parquet", {}))
