"""The pretraining corpora: language, licence, plain text files, and packed files that were cut off."""

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keural.data.adapters import ADAPTERS, corpora
from keural.data.licenses import flags_of, language_of, license_of
from keural.data.records import Document, Drop
from keural.data.sources import open_source
from keural.errors import UserError
from keural.recipe import SourceSpec

TWO_DOCUMENTS = "첫 문단입니다.\n둘째 문단.\n\n    들여 쓴 글.\n\n\n"


def test_what_is_known_of_each_corpus() -> None:
    known = {name: (corpus.language, corpus.license) for name, corpus in corpora.CORPORA.items()}
    assert {name for name, (language, _) in known.items() if language == "ko"} == {
        "fineweb2_ko",
        "korean_webtext",
        "cc100_ko",
        "wikipedia_ko",
        "wanjuan_korean",
    }
    for name, (language, license_id) in known.items():
        source = SourceSpec(name="s", adapter=name)
        assert (license_of(source), flags_of(source)) == (license_id, [])
        assert language_of(source) == language
        assert language_of(SourceSpec(name="s", adapter=name, language="xx")) == "xx", "the recipe's word comes first"
        row: Any = dict.fromkeys(corpora.CORPORA[name].keys, "글" * 200) | {"licenses": ["MIT"]}
        record = ADAPTERS[name](row, source, "w")
        assert isinstance(record, Document)
        assert record.language == language


def test_cc100_as_it_was_released(write: Callable[..., SourceSpec], data_dir: Path) -> None:
    """A paragraph per line, documents between empty lines, packed with xz."""
    source = write("ko.txt.xz", lzma.compress(TWO_DOCUMENTS.encode()), "cc100_ko")
    assert list(open_source(source, data_dir).read(seed=0)) == [
        Document("첫 문단입니다.\n둘째 문단.", "ko.txt.xz:1", "ko"),
        Document("    들여 쓴 글.", "ko.txt.xz:4", "ko"),
    ]


def test_a_book_of_pg19_is_one_text_file(write: Callable[..., SourceSpec], data_dir: Path) -> None:
    source = write("train/1.txt", "CHAPTER I\n\nIt rained.\n", "pg19")
    assert list(open_source(source, data_dir).read(seed=0)) == [Document("CHAPTER I\n\nIt rained.\n", "train/1.txt", "en")]


def test_zstandard_of_several_frames(write: Callable[..., SourceSpec], data_dir: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(zstandard.compress(f'{{"text": "{number}"}}\n'.encode()) for number in range(3))
    source = write("a.jsonl.zst", content)
    assert [record.text for record in open_source(source, data_dir).read(seed=0) if isinstance(record, Document)] == ["0", "1", "2"]


@pytest.mark.parametrize("suffix", ["xz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_packed_file_is_one_line(write: Callable[..., SourceSpec], data_dir: Path, suffix: str, damage: str) -> None:
    lines = "".join(f'{{"text": "{number**9}"}}\n' for number in range(2000)).encode()
    packed = lzma.compress(lines) if suffix == "xz" else pytest.importorskip("zstandard").compress(lines)
    source = write(
        f"a.jsonl.{suffix}", packed[: len(packed) // 2] if damage == "cut" else packed[:40] + b"\xff" * 60 + packed[100:]
    )
    with pytest.raises(UserError, match=f"a.jsonl.{suffix}: damaged .* file .*; fetch it again") as caught:
        list(open_source(source, data_dir).read(seed=0))
    assert "\n" not in str(caught.value)


def test_other_languages_and_licences_are_no_defects(write: Callable[..., SourceSpec], data_dir: Path) -> None:
    rows = '{"content": "a", "lang": "C", "licenses": ["MIT"]}\n{"content": "b", "lang": "C", "licenses": ["X"]}\n'
    source = write("a.jsonl", rows, "the_stack", options={"lang": ["C"], "licenses": ["MIT"]})
    assert list(open_source(source, data_dir).read(seed=0)) == [
        Document("a", "a.jsonl:1", None),
        Drop("other_license", "a.jsonl:2"),
    ]
