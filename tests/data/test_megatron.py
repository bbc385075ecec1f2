"""Megatron's indexed data sets: read as an independent writer writes them, written as an independent reader reads them."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from struct import calcsize, pack, unpack_from

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.tokens.import_export import export_tokens, import_tokens
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
"""Dtype codes, and the type of a token for `struct`."""


def flat(sequences: list[list[int]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]


def write(stem: Path, documents: list[list[list[int]]], code: int = 4) -> None:
    """Write documents of sequences, straight from the format's description."""
    sequences = [sequence for document in documents for sequence in document]
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    pointers, content = [], b""
    for sequence in sequences:
        pointers.append(len(content))
        content += pack(f"<{len(sequence)}{CODES[code]}", *sequence)
    index = b"MMIDIDX\0\0" + pack("<Q", 1) + pack("<B", code) + pack("<Q", len(sequences)) + pack("<Q", len(boundaries))
    index += pack(f"<{len(sequences)}i", *map(len, sequences)) + pack(f"<{len(pointers)}q", *pointers)
    index += pack(f"<{len(boundaries)}q", *boundaries)
    stem.with_suffix(".bin").write_bytes(content)
    stem.with_suffix(".idx").write_bytes(index)


def read(stem: Path) -> list[list[int]]:
    """The documents of a data set, sequence by sequence by their pointers."""
    index, content = stem.with_suffix(".idx").read_bytes(), stem.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, boundaries = unpack_from("<QBQQ", index, 9)
    assert version == 1
    at = 9 + calcsize("<QBQQ")
    lengths = unpack_from(f"<{sequences}i", index, at)
    pointers = unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    ends = unpack_from(f"<{boundaries}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * boundaries
    found = [list(unpack_from(f"<{length}{CODES[code]}", content, place)) for length, place in zip(lengths, pointers, strict=True)]
    return [flat(found[first:last]) for first, last in pairwise(ends)]


def stored(out: Path) -> list[list[int]]:
    store = TokenStore.open(out)
    return [store.sequence(index).tolist() for index in range(store.num_sequences)]


SEQUENCE = st.lists(st.integers(0, 401), max_size=9)
DOCUMENTS = st.lists(st.lists(SEQUENCE, max_size=4), min_size=1, max_size=20)


@examples(15)
@given(documents=DOCUMENTS, code=st.sampled_from([3, 4, 5, 8]))
def test_documents_come_back_without_those_that_hold_nothing(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: KeuralTokenizer, documents: list[list[list[int]]], code: int
) -> None:
    work = tmp_path_factory.mktemp("megatron")
    expected = [tokens for document in documents if (tokens := flat(document))]
    write(work / "corpus_text_document", documents, code)
    if not expected:
        with pytest.raises(UserError, match="holds no"):
            import_tokens(work, work / "store", "megatron", tokenizer)
        return
    counts = import_tokens(work / "corpus_text_document", work / "store", "megatron", tokenizer)
    assert stored(work / "store") == expected
    assert counts["documents"] == len(expected)
    assert counts["start_with_bos"] == sum(document[0] == 1 for document in expected)
    assert counts["end_with_eos"] == sum(document[-1] == 2 for document in expected)


def test_several_files_follow_one_another(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    write(tmp_path / "b", [[[7, 8]]])
    write(tmp_path / "a", [[[5], [6]]], code=1)
    import_tokens(tmp_path, tmp_path / "store", "megatron", tokenizer)
    assert stored(tmp_path / "store") == [[5, 6], [7, 8]]


@examples(10)
@given(
    documents=st.lists(st.lists(st.integers(0, 401), min_size=1, max_size=20), min_size=1, max_size=30),
    shard_tokens=st.integers(1, 100),
)
def test_an_exported_store_is_read_by_others_and_comes_back_identical(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: KeuralTokenizer, documents: list[list[int]], shard_tokens: int
) -> None:
    work = tmp_path_factory.mktemp("megatron")
    for name, size in (("store", shard_tokens), ("one-shard", 1 << 28)):
        with StoreWriter(work / name, tokenizer.sha256, tokenizer.vocab_size, "documents", shard_tokens=size) as writer:
            for document in documents:
                writer.add(document)
    export_tokens(TokenStore.open(work / "store"), work / "out", "megatron")
    assert read(work / "out" / "documents") == documents
    import_tokens(work / "out", work / "back", "megatron", tokenizer)
    assert TokenStore.open(work / "back").fingerprint == TokenStore.open(work / "one-shard").fingerprint


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_499, 2), (65_500, 4)])
def test_the_type_of_tokens_is_megatrons_choice(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    with StoreWriter(tmp_path / "store", "a" * 64, vocab_size, "documents") as writer:
        writer.add([1, vocab_size - 1, 2])
    export_tokens(TokenStore.open(tmp_path / "store"), tmp_path / "out", "megatron")
    assert (tmp_path / "out" / "documents.bin").stat().st_size == 3 * itemsize
    assert read(tmp_path / "out" / "documents") == [[1, vocab_size - 1, 2]]


def replace(offset: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + content + old[offset + len(content) :]


BAD = [
    (".idx", replace(0, b"MMIDIDY"), "magic"),
    (".idx", lambda old: b"", "magic"),
    (".idx", replace(9, b"\2"), "version 2"),
    (".idx", replace(17, b"\7"), "dtype code 7"),
    (".idx", replace(17, b"\x63"), "dtype code 99"),
    (".idx", replace(18, b"\3"), "has 82 bytes"),
    (".idx", lambda old: old[:-1], "has 81 bytes"),
    (".idx", replace(34, b"\4"), "its index says 5 tokens"),
    (".idx", replace(34, b"\xff\xff\xff\xff"), "negative length"),
    (".idx", replace(50, b"\4"), "right after the one before"),
    (".idx", replace(58, b"\1"), "boundaries do not rise"),
    (".idx", replace(66, b"\3"), "boundaries do not rise"),
    (".bin", lambda old: old[:-1], "its index says 4 tokens"),
    (".bin", replace(4, b"\xff\xff\xff\xff"), "token 1 is id -1"),
    (".bin", replace(4, b"\xff\xff\0\0"), "token 1 is id 65535"),
]


@pytest.mark.parametrize(("suffix", "change", "message"), BAD)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: KeuralTokenizer, suffix: str, change: Callable[[bytes], bytes], message: str
) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"corpus{suffix}"
    write(tmp_path / "in" / "corpus", [[[5, 6, 7]], [[8]]])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        import_tokens(tmp_path / "in", tmp_path / "store", "megatron", tokenizer)
    assert message in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_data_set_is_refused(tmp_path: Path, tokenizer: KeuralTokenizer, suffix: str) -> None:
    write(tmp_path / "corpus", [[[5]]])
    (tmp_path / f"corpus{suffix}").unlink()
    with pytest.raises(UserError, match=rf"corpus\{suffix}"):
        import_tokens(tmp_path / "corpus.idx", tmp_path / "store", "megatron", tokenizer)


def test_a_store_with_loss_masks_and_a_format_that_loses_tokens_are_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", "a" * 64, 512, "conversations") as writer:
        writer.add([1, 2], [0, 1])
    for name, message in (("megatron", "no loss mask"), ("published", "only read"), ("npy", "unknown")):
        with pytest.raises(UserError, match=message):
            export_tokens(TokenStore.open(tmp_path / "store"), tmp_path / "out", name)


def test_the_export_command(tmp_path: Path, keural: Callable[..., tuple[int, str, str]]) -> None:
    with StoreWriter(tmp_path / "store", "a" * 64, 512, "documents") as writer:
        writer.add(np.arange(1, 200))
    code, printed, _ = keural("data", "export", tmp_path / "store", tmp_path / "out", "--format", "megatron")
    assert (code, read(tmp_path / "out" / "documents")) == (0, [list(range(1, 200))])
    assert "1 documents, 199 tokens" in printed
