"""Archives are read where they lie, member by member; what is not a good archive is refused in one line."""

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

from keural.data.readers import archives
from keural.data.records import Conversation, Drop
from keural.data.sources import open_source
from keural.errors import UserError
from keural.files import FileHashes
from keural.recipe import SourceSpec

TALK = {
    "utterances": [{"role": "질문자", "text": "물은 왜 끓나요?"}, {"role": "전문가", "text": "열을 받아 기체가 되기 때문입니다."}]
}


def packed(*entries: tuple[str, Any], **settings: Any) -> bytes:
    """An archive of members with these names and contents (objects as JSON)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **{"compression": zipfile.ZIP_DEFLATED, **settings}) as archive:
        for name, content in entries:
            archive.writestr(name, content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode())
    return buffer.getvalue()


def cp949_name(content: bytes, name: str) -> bytes:
    """The archive with the name (of a member that was written as ASCII of the same length) in CP949, which it does not say."""
    raw = name.encode("cp949")
    return content.replace(b"x" * len(raw), raw)


def source(path: str = "set", **options: Any) -> SourceSpec:
    return SourceSpec(name="talks", adapter="aihub_045", path=path, options=options)


def put(data_dir: Path, name: str, content: bytes) -> None:
    path = data_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def places(data_dir: Path, spec: SourceSpec) -> list[str]:
    records = list(open_source(spec, data_dir).read(seed=0))
    assert all(isinstance(record, Conversation) for record in records), records
    return [record.where for record in records]


def refused(data_dir: Path, spec: SourceSpec, *words: str) -> None:
    def everything() -> None:
        list(open_source(spec, data_dir).read(seed=0))

    with pytest.raises(UserError) as caught:
        everything()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_members_with_leading_slashes_and_other_files_beside_them(data_dir: Path) -> None:
    put(data_dir, "set/TL1.zip", packed(("/a/1.json", TALK), ("/a/readme.hwp", b"x"), ("/b/", b""), ("b/2.json", TALK)))
    assert places(data_dir, source()) == ["set/TL1.zip/a/1.json#1", "set/TL1.zip/b/2.json#1"]


def test_names_in_cp949_or_utf8_and_nothing_said_about_it(data_dir: Path) -> None:
    name = "02.라벨링데이터/대화.json"
    put(data_dir, "set/TL1.zip", cp949_name(packed(("x" * len(name.encode("cp949")), TALK)), name))
    put(data_dir, "set/TL2.zip", packed(("x" * len(name.encode()), TALK)).replace(b"x" * len(name.encode()), name.encode()))
    put(data_dir, "set/TL3.zip", packed((name, TALK)))
    assert places(data_dir, source()) == [f"set/TL{number}.zip/{name}#1" for number in (1, 2, 3)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
def test_contents_in_any_of_the_encodings(data_dir: Path, encoding: str) -> None:
    put(data_dir, "set/TL1.zip", packed(("1.json", json.dumps(TALK, ensure_ascii=False).encode(encoding))))
    (record,) = open_source(source(), data_dir).read(seed=0)
    assert isinstance(record, Conversation)
    assert record.messages[0].content == "물은 왜 끓나요?"


def test_parts_are_joined_in_natural_order(data_dir: Path) -> None:
    content = packed(*((f"{number}.json", TALK) for number in range(40)))
    for start in range(0, len(content), 999):  # AIHub names parts by where they begin
        put(data_dir, f"set/TL1.zip.part{start}", content[start : start + 999])
    expected = [f"set/TL1.zip/{number}.json#1" for number in range(40)]
    assert places(data_dir, source()) == expected
    assert places(data_dir, source("set/TL1.zip")) == expected
    assert len(open_source(source(), data_dir).content(FileHashes())) == -(-len(content) // 999)
    (data_dir / "set/TL1.zip.part1998").unlink()
    refused(data_dir, source(), "TL1.zip.part0", "fetch")


def test_only_the_labelled_training_part_is_read(data_dir: Path) -> None:
    for split, letter in (("Training", "T"), ("Validation", "V")):
        put(data_dir, f"set/{split}/01.원천데이터/{letter}S1.zip", packed(("1.json", TALK)))
        put(data_dir, f"set/{split}/02.라벨링데이터/{letter}L1.zip", packed(("1.json", TALK)))
    put(data_dir, "set/all.zip", packed(("Training/라벨링데이터/1.json", TALK), ("Validation/라벨링데이터/2.json", TALK)))
    assert places(data_dir, source()) == [
        "set/Training/02.라벨링데이터/TL1.zip/1.json#1",
        "set/all.zip/Training/라벨링데이터/1.json#1",
    ]
    assert places(data_dir, source(part="validation")) == [
        "set/Validation/02.라벨링데이터/VL1.zip/1.json#1",
        "set/all.zip/Validation/라벨링데이터/2.json#1",
    ]
    assert len(places(data_dir, source(part="all"))) == 4
    (data_dir / "set/all.zip").unlink()
    refused(data_dir, source("set/Validation"), "none of its 2 files is labelled data of part training", "option part")


def test_half_of_an_archive_and_none_of_it(data_dir: Path) -> None:
    content = packed(*((f"{number}.json", TALK) for number in range(40)))
    put(data_dir, "set/TL1.zip", content[: len(content) // 2])
    refused(data_dir, source(), "TL1.zip: not a whole zip archive", "fetch")
    put(data_dir, "set/TL1.zip", b"")
    refused(data_dir, source(), "TL1.zip: the file is empty", "fetch it again")


def test_a_damaged_member(data_dir: Path) -> None:
    content = packed(("1.json", TALK), compression=zipfile.ZIP_STORED)
    put(data_dir, "set/TL1.zip", content.replace("끓나요".encode(), "꿇나요".encode()))
    refused(data_dir, source(), "TL1.zip: damaged member set/TL1.zip/1.json", "CRC", "fetch it again")


@pytest.mark.parametrize("name", ["../1.json", "/a/../../1.json", "..\\1.json", "C:/1.json", "/c:\\1.json"])
def test_a_member_that_leads_out_of_the_archive(data_dir: Path, name: str) -> None:
    put(data_dir, "set/TL1.zip", packed((name, TALK)))
    refused(data_dir, source(), "leads out of the archive", "not read")


def test_bombs(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(data_dir, "set/TL1.zip", packed(("1.json", b" " * (1 << 22))))
    refused(data_dir, source(), "member '1.json' unpacks to 4,194,304 bytes", "zip bomb")
    put(data_dir, "set/TL1.zip", packed(("1.json", TALK)))
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 20)
    refused(data_dir, source(), "zip bomb")


def test_members_that_share_their_bytes(data_dir: Path) -> None:
    content = packed(("1.json", TALK), ("2.json", TALK), compression=zipfile.ZIP_STORED)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        first, second = archive.infolist()
    entry = second.header_offset.to_bytes(4, "little") + b"2.json"
    assert content.count(entry) == 1
    bomb = content.replace(entry, first.header_offset.to_bytes(4, "little") + b"2.json")
    size = first.compress_size.to_bytes(4, "little") * 2
    put(data_dir, "set/TL1.zip", bomb.replace(size, (first.compress_size * 2).to_bytes(4, "little") * 2))
    refused(data_dir, source(), "overlap", "zip bomb")


def test_a_member_with_a_password(data_dir: Path) -> None:
    content = bytearray(packed(("1.json", TALK)))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    put(data_dir, "set/TL1.zip", bytes(content))
    refused(data_dir, source(), "password")


def test_an_archive_is_neither_unpacked_nor_read_whole(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten members of 300 kB in ten files: at most one member is read at once, and no file is written."""
    noise = [json.dumps(TALK | {"pad": random.Random(number).randbytes(150_000).hex()}).encode() for number in range(10)]
    content = packed(*((f"{number}.json", text) for number, text in enumerate(noise)))
    assert len(content) > 1_500_000
    for start in range(0, len(content), len(content) // 9):
        put(data_dir, f"set/TL1.zip.part{start}", content[start : start + len(content) // 9])
    sizes: list[int] = []
    read = archives._Joined.read

    def watched(self: Any, size: int | None = -1) -> bytes:
        data = read(self, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(archives._Joined, "read", watched)
    before = sorted(path.name for path in (data_dir / "set").iterdir())
    assert len(places(data_dir, source("set/TL1.zip"))) == 10
    assert max(sizes) < 200_000
    assert sorted(path.name for path in (data_dir / "set").iterdir()) == before


def test_a_member_that_is_no_json_is_a_drop(data_dir: Path) -> None:
    put(data_dir, "set/TL1.zip", packed(("1.json", b'{"utterances": ['), ("2.json", b"[" * 100_000)))
    assert list(open_source(source(), data_dir).read(seed=0)) == [
        Drop("malformed_file", "set/TL1.zip/1.json:1", "expecting value"),
        Drop("malformed_file", "set/TL1.zip/2.json", "brackets without end"),
    ]
