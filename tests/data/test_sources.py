"""A source is its files in order; everything wrong with one is found before anything is read, and said in one line."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest

from keural.data.adapters import ADAPTERS
from keural.data.readers.archives import ARCHIVE
from keural.data.readers.formats import FORMATS
from keural.data.records import Conversation, Document, Drop, PreferencePair
from keural.data.sources import open_source
from keural.errors import UserError
from keural.files import FileHashes
from keural.recipe import SourceSpec


def source(adapter: str = "text", path: str = "a.txt", **settings: Any) -> SourceSpec:
    return SourceSpec(name="prose", adapter=adapter, path=path, **settings)


def refused(spec: SourceSpec, data_dir: Path | None, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(spec, data_dir)
    message = str(caught.value)
    assert message.startswith("source 'prose': ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_directory_is_its_files_in_natural_order(data_dir: Path) -> None:
    for name in ("d/part-10.txt", "d/part-9.txt", "d/b/x.md", "d/SOURCE", "d/.hidden/y.txt", "d/z.po"):
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / name).write_text(name)
    named = [(file.name, kind) for file, kind in open_source(source(path="d"), data_dir).files]
    assert named == [("d/b/x.md", "markdown"), ("d/part-9.txt", "text"), ("d/part-10.txt", "text")]
    assert [file.name for file, _ in open_source(source(path="d", format="markdown"), data_dir).files] == ["d/b/x.md"]
    assert [file.name for file, _ in open_source(source(path="d/part-*.txt"), data_dir).files] == ["d/part-9.txt", "d/part-10.txt"]
    assert [file.name for file, _ in open_source(source(path="d/SOURCE", format="text"), data_dir).files] == ["d/SOURCE"]
    assert [file.name for file, _ in open_source(source(path=str(data_dir / "d/z.po"), adapter="po"), None).files] == [
        f"{data_dir}/d/z.po"
    ]


def test_rows_become_records_with_their_places(data_dir: Path) -> None:
    with gzip.open(data_dir / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "하나"}\n{"other": 1}\n{"text": \n')
    found = list(open_source(source(path="a.jsonl.gz", language="ko"), data_dir).read(seed=0))
    assert found == [
        Document("하나", "a.jsonl.gz:1", "ko"),
        Drop("missing_text", "a.jsonl.gz:2"),
        Drop("malformed_row", "a.jsonl.gz:3", "expecting value"),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": "textt"}, ["unknown adapter 'textt'", "did you mean 'text'?"]),
        ({"adapter": "sharegtp"}, ["did you mean 'sharegpt'?"]),
        ({"format": "jsonll"}, ["unknown format 'jsonll'", "did you mean 'jsonl'?"]),
        ({"adapter": "hh_rlhf", "format": "markdown"}, ["does not read markdown"]),
        ({"adapter": "alpaca"}, ["adapter alpaca does not read text", "jsonl"]),
        ({"options": {"feld": "text"}}, ["unknown option 'feld'", "did you mean 'field'?"]),
        ({"adapter": "markdown", "format": "markdown", "options": {"x": 1}}, ["unknown option 'x'", "it has encoding"]),
        ({"options": {"gutenberg": "yes"}}, ["option 'gutenberg' must be true or false", "'yes'"]),
        ({"options": {"field": True}}, ["option 'field' must be a text or a column number or a list"]),
        ({"options": {"field": []}}, ["option 'field'"]),
        ({"options": {"split": "words"}}, ["one of file, paragraph, section, line"]),
        ({"path": ""}, ["needs a path"]),
        ({"path": "nowhere/x.txt", "hub": "org/set"}, ["no such file or directory", "nowhere/x.txt", "from org/set", "data=DIR"]),
        ({"path": "nowhere/*.txt"}, ["no such file or directory", "nowhere/*.txt"]),
        ({"path": "empty.txt"}, ["empty.txt", "the file is empty"]),
        ({"path": "odd.xyz"}, ["odd.xyz", "no known format", "give format"]),
        ({"path": "odd", "adapter": "po"}, ["holds no po file"]),
        ({"path": "pointer.txt"}, ["Git LFS pointer"]),
        ({"adapter": "microworld", "options": {"part": "prose", "count": 3}}, ["makes its own rows"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(data_dir: Path, settings: dict[str, Any], words: list[str]) -> None:
    (data_dir / "a.txt").write_text("text")
    (data_dir / "empty.txt").write_text("")
    (data_dir / "odd").mkdir()
    (data_dir / "odd.xyz").write_text("text")
    (data_dir / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(SourceSpec(**({"name": "prose", "adapter": "text", "path": "a.txt"} | settings)), data_dir, *words)


def test_a_relative_path_needs_a_data_directory() -> None:
    refused(source(), None, "relative to the data directory", "data=DIR")


def test_the_micro_world_needs_no_path_and_gives_each_kind() -> None:
    kinds = {"prose": Document, "instructions": Conversation, "pairs": PreferencePair}
    for part, kind in kinds.items():
        spec = source("microworld", "", options={"part": part, "count": 20})
        records = list(open_source(spec, None).read(seed=1))
        assert len(records) == 20
        assert all(isinstance(record, kind) and record.language in ("ko", "en") for record in records)
        assert ADAPTERS["microworld"].kind_of(spec) == {Document: "documents", Conversation: "conversations"}.get(kind, "pairs")
        assert records == list(open_source(spec, None).read(seed=1))
    with pytest.raises(UserError, match="part"):
        open_source(source("microworld", "", options={"part": "poems", "count": 1}), None)


@pytest.mark.parametrize("settings", [{"adapter": "microworld", "path": "", "options": {"part": "prose", "count": 3}}, {}])
def test_an_open_source_can_be_handed_to_another_process(data_dir: Path, settings: dict[str, Any]) -> None:
    (data_dir / "a.txt").write_text("one")
    opened = open_source(source(**settings), data_dir)
    there = pickle.loads(pickle.dumps(opened))
    assert there == opened
    assert list(there.read(seed=0)) == list(opened.read(seed=0)) != []


def test_an_adapter_makes_its_rows_or_reads_them() -> None:
    assert [name for name, adapter in ADAPTERS.items() if adapter.rows is not None] == ["microworld"]
    assert all((adapter.rows is None) == bool(adapter.formats) for adapter in ADAPTERS.values())


def test_the_content_of_made_rows_is_that_of_the_program() -> None:
    spec = source("microworld", "", options={"part": "prose", "count": 3})
    assert {"__init__.py", "korean.py"} <= {name for name, _, _ in open_source(spec, None).content(FileHashes())}


def test_every_adapter_reads_formats_that_exist() -> None:
    assert all(name in (*FORMATS, ARCHIVE) for adapter in ADAPTERS.values() for name in adapter.formats)


def test_contents_are_hashed_once_and_noticed_when_changed(data_dir: Path) -> None:
    file = data_dir / "a.txt"
    file.write_text("one")
    hashes = FileHashes()
    first = open_source(source(), data_dir).content(hashes)
    assert first == [["a.txt", 3, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"]]
    file.write_text("two")
    assert open_source(source(), data_dir).content(hashes) != first
