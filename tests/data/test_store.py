"""What is written is read back; the layout is datatrove's; anything wrong with a store is one line when it is opened."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.tokens.store import PAIR_WEIGHTS, StoreWriter, TokenStore
from keural.errors import UserError
from tests.helpers.examples import examples

SEQUENCES = [[1, 260, 300, 2], [1, 511, 2], [1, 2], [1, 400, 401, 402, 403, 2]]
SHA = "a" * 64


def write_documents(directory: Path, sequences: list[list[int]] = SEQUENCES, shard_tokens: int = 1 << 28) -> Path:
    with StoreWriter(directory, SHA, 512, "documents", {"sources": [{"source": "s", "license": "MIT"}]}, shard_tokens) as writer:
        for sequence in sequences:
            writer.add(sequence)
    return directory


@examples(10)
@given(
    sequences=st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=20), min_size=1, max_size=30),
    shard_tokens=st.integers(1, 100),
    data=st.data(),
)
def test_sequences_masks_and_flat_ranges_come_back(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("store")
    masks = [data.draw(st.lists(st.integers(0, 1), min_size=len(one), max_size=len(one))) for one in sequences]
    with StoreWriter(directory, SHA, 512, "conversations", shard_tokens=shard_tokens) as writer:
        for sequence, mask in zip(sequences, masks, strict=True):
            writer.add(sequence, mask)
    store = TokenStore.open(directory, SHA)
    flat = [token for sequence in sequences for token in sequence]
    ends = np.cumsum([len(sequence) for sequence in sequences])
    assert [store.sequence(index).tolist() for index in range(store.num_sequences)] == sequences
    assert [store.loss_mask(index).tolist() for index in range(store.num_sequences)] == masks
    assert store.lengths().tolist() == [len(sequence) for sequence in sequences]
    assert store.manifest["num_trained"] == sum(map(sum, masks))
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    assert store.read(start, stop + 5)[: stop - start].tolist() == flat[start:stop]
    first, span_ends = store.spans(start, stop)
    overlapping = [index for index, end in enumerate(ends) if end > start and end - len(sequences[index]) < stop]
    assert (first, span_ends.tolist()) == (overlapping[0], [int(ends[index]) for index in overlapping])


@examples(10)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    shard_tokens=st.integers(1, 100),
)
def test_sequences_added_together_give_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cuts: list[int], shard_tokens: int
) -> None:
    work = tmp_path_factory.mktemp("store")
    sequences = np.split(np.arange(sum(lengths)) % 512, np.cumsum(lengths)[:-1])
    write_documents(work / "one", [sequence.tolist() for sequence in sequences], shard_tokens)
    meta = {"sources": [{"source": "s", "license": "MIT"}]}
    with StoreWriter(work / "many", SHA, 512, "documents", meta, shard_tokens) as writer:
        for part in np.split(np.arange(len(sequences)), sorted(min(cut, len(sequences)) for cut in cuts)):
            tokens = np.concatenate([sequences[index] for index in part]) if part.size else np.zeros(0, dtype=np.uint32)
            writer.add_many(tokens, [lengths[index] for index in part])
    one, many = ({path.name: path.read_bytes() for path in (work / name).iterdir()} for name in ("one", "many"))
    assert one == many


def test_the_files_are_datatroves_layout(tmp_path: Path) -> None:
    write_documents(tmp_path / "store", shard_tokens=7)
    store = TokenStore.open(tmp_path / "store")
    assert len(store.manifest["shards"]) == 2
    read = []
    for shard in ("00000", "00001"):
        tokens = np.fromfile(tmp_path / "store" / f"{shard}.ds", dtype="<u4")
        ends = np.fromfile(tmp_path / "store" / f"{shard}.ds.index", dtype="<u8")
        read += [part.tolist() for part in np.split(tokens, ends[:-1].astype(int))]
        name, count, _ = (tmp_path / "store" / f"{shard}.ds.metadata").read_text().split("\n")
        assert (name, int(count)) == (f"{SHA}|4", len(tokens))
    assert read == SEQUENCES
    assert not list((tmp_path / "store").glob("*.loss"))


def test_the_same_content_has_the_same_fingerprint_and_other_content_another(tmp_path: Path) -> None:
    first = TokenStore.open(write_documents(tmp_path / "a"))
    assert TokenStore.open(write_documents(tmp_path / "b")).fingerprint == first.fingerprint
    assert TokenStore.open(write_documents(tmp_path / "c", SEQUENCES[:3])).fingerprint != first.fingerprint


def one_line(directory: Path, *words: str, sha: str | None = None, verify: str = "auto") -> None:
    with pytest.raises(UserError) as caught:
        TokenStore.open(directory, sha, verify)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    assert all(word in message for word in words), message


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    one_line(write_documents(tmp_path / "store"), "another tokenizer", "prepare the data again", sha="b" * 64)


def test_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", SHA, 512, "documents")
    writer.add([1, 2])
    one_line(tmp_path / "store", "manifest.json is missing")


def write_and_fail(directory: Path) -> None:
    with StoreWriter(directory, SHA, 512, "documents") as writer:
        writer.add([1, 2])
        writer.add([])


def test_a_block_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_and_fail(tmp_path / "store")
    one_line(tmp_path / "store", "manifest.json is missing")


@pytest.mark.parametrize("verify", ["size", "full", "auto"])
def test_a_truncated_file_is_refused(tmp_path: Path, verify: str) -> None:
    path = write_documents(tmp_path / "store") / "00000.ds"
    path.write_bytes(path.read_bytes()[:-4])
    one_line(tmp_path / "store", "00000.ds", "truncated", verify=verify)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    (write_documents(tmp_path / "store") / "00000.ds.index").unlink()
    one_line(tmp_path / "store", "00000.ds.index", "missing")


@pytest.mark.parametrize("name", ["00000.ds", "00000.ds.index", "00000.ds.metadata"])
def test_one_flipped_bit_is_refused_in_full(tmp_path: Path, name: str) -> None:
    path = write_documents(tmp_path / "store") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    one_line(tmp_path / "store", name, "checksum")


@pytest.mark.parametrize(
    ("key", "value"), [("kind", "pairs"), ("format", "else"), ("vocab_size", 3), ("files", None), ("version", 99)]
)
def test_a_changed_manifest_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = write_documents(tmp_path / "store") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    one_line(tmp_path / "store", "manifest.json")


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "store") / "manifest.json"
    path.write_text(path.read_text()[:50])
    one_line(tmp_path / "store", "not valid JSON")


def test_a_token_outside_the_vocabulary_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="vocabulary"):
        StoreWriter(tmp_path, SHA, 512, "documents").add([512])


def test_weights_of_pairs_are_checked_and_joined(tmp_path: Path) -> None:
    def write(name: str, weights: list[float] | None) -> Path:
        directory = tmp_path / name
        with StoreWriter(directory, SHA, 512, "pairs") as writer:
            for _ in range(4):
                writer.add([1, 2], [0, 1])
            if weights is not None:
                (directory / PAIR_WEIGHTS).write_bytes(np.array(weights, dtype="<f4").tobytes())
                writer.close(extra=[PAIR_WEIGHTS])
        return directory

    plain, weighted = TokenStore.open(write("plain", None)), TokenStore.open(write("weighted", [0.5, 0.25]))
    assert plain.pair_weights is None
    assert (plain.manifest["version"], weighted.manifest["version"]) == (2, 3)
    assert plain.fingerprint != weighted.fingerprint
    joined = TokenStore.join({"a": plain, "b": weighted, "c": plain})
    assert joined.pair_weights is not None
    assert joined.pair_weights.tolist() == [1, 1, 0.5, 0.25, 1, 1]
    assert TokenStore.join({"a": plain, "b": plain}).pair_weights is None
    for name, weights in (("few", [1.0]), ("none", [1.0, 0.0]), ("nan", [1.0, float("nan")])):
        with pytest.raises(UserError, match="no weight above 0 for each pair"):
            TokenStore.open(write(name, weights))
    (tmp_path / "weighted" / PAIR_WEIGHTS).write_bytes(np.array([0.5, 0.5], dtype="<f4").tobytes())
    with pytest.raises(UserError, match="checksum differs"):
        TokenStore.open(tmp_path / "weighted")
