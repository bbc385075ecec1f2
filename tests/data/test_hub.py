"""Data sets in the layout of a hub, read through `datasets` without a network; what is not there is one line with the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from keural.data.records import Document
from keural.data.sources import open_source
from keural.errors import UserError
from keural.files import FileHashes
from keural.recipe import SourceSpec

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    for module in (datasets.config, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def source(hub: str = "owner/set", **settings: Any) -> SourceSpec:
    return SourceSpec(**({"name": "web", "adapter": "fineweb", "hub": hub} | settings))


def texts(spec: SourceSpec, data_dir: Path) -> list[str]:
    records = list(open_source(spec, data_dir).read(seed=0))
    assert all(isinstance(record, Document) for record in records)
    return [record.text for record in records if isinstance(record, Document)]


def parquet(path: Path, *values: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(values), "language": ["en"] * len(values)}), path)


def refused(spec: SourceSpec, data_dir: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        texts(spec, data_dir)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_shards_of_a_split_in_order(data_dir: Path) -> None:
    parquet(data_dir / "owner/set/data/train-00000-of-00002.parquet", "a", "b")
    parquet(data_dir / "owner/set/data/train-00001-of-00002.parquet", "c")
    parquet(data_dir / "owner/set/data/test-00000-of-00001.parquet", "d")
    assert texts(source(), data_dir) == ["a", "b", "c"]
    assert texts(source(split="test"), data_dir) == ["d"]
    assert next(open_source(source(), data_dir).read(seed=0)).where == "owner/set#1"
    first = open_source(source(), data_dir).content(FileHashes())
    parquet(data_dir / "owner/set/data/train-00001-of-00002.parquet", "e")
    assert open_source(source(), data_dir).content(FileHashes()) != first


def test_configurations_of_a_card(data_dir: Path) -> None:
    for name in ("one", "two"):
        folder = data_dir / "owner/set" / name
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_text(json.dumps({"text": name, "language": "en"}) + "\n")
    card = "---\nconfigs:\n" + "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("one", "two"))
    (data_dir / "owner/set/README.md").write_text(card + "---\n")
    assert texts(source(config="two"), data_dir) == ["two"]
    refused(source(config="three"), data_dir, "owner/set", "three", "hf download")


def test_a_revision_that_can_move_is_refused(data_dir: Path) -> None:
    refused(source(), data_dir, "no revision is given", "40 digits")
    refused(source(revision="main"), data_dir, "revision 'main' can move")
    refused(source("nowhere"), data_dir, "neither owner/name nor a directory")


def test_offline_the_command_is_named(data_dir: Path) -> None:
    command = f"hf download --repo-type dataset owner/set --revision {COMMIT} --local-dir {data_dir}/owner/set"
    refused(source(revision=COMMIT), data_dir, "source 'web'", "cannot be read", command)
    assert open_source(source(revision=COMMIT), data_dir).content(FileHashes()) == [["owner/set", COMMIT]]


def test_half_a_download_is_named(data_dir: Path) -> None:
    shard = data_dir / "owner/set/data/train-00000-of-00001.parquet"
    parquet(shard, *map(str, range(5000)))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(source(), data_dir, "owner/set cannot be read", "hf download")
    part = data_dir / "owner/set/.cache/huggingface/download/x.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole)
    refused(source(), data_dir, "x.incomplete", "has not ended")


def test_options_and_keys_are_checked(data_dir: Path) -> None:
    parquet(data_dir / "owner/set/data/train-0.parquet", "a")
    refused(source(options={"min_score": 0.5}), data_dir, "unknown option 'min_score'")
    refused(source(path="owner/set", split="train"), data_dir, "split is for sources that are read from a hub")
