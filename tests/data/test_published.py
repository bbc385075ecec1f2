"""Published shards come back token for token; what padding, cuts and the header took is counted; damaged shards are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.tokens.import_export import ImportOptions, import_tokens
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples
from tests.helpers.published_writer import BOS, EOS, pack_documents, write_shard

LENGTH, LIMIT = 16, 20


def write(directory: Path, documents: list[list[int]], per_shard: int = 2) -> list[list[int]]:
    """Write documents as small shards; the sequences that were meant to be in them."""
    sequences = pack_documents(documents, LENGTH, LIMIT)
    for number, start in enumerate(range(0, len(sequences), per_shard)):
        write_shard(directory, number, sequences[start : start + per_shard], LENGTH)
    return sequences


def naive_documents(sequence: list[int]) -> list[list[int]]:
    """A sequence's documents, token by token: from each BOS to the EOS after it."""
    documents: list[list[int]] = []
    inside = False
    for token in sequence:
        if token == BOS:
            documents.append([])
            inside = True
        if inside:
            documents[-1].append(token)
        inside = inside and token != EOS
    if sequence[-2:] == [BOS, EOS]:
        documents.pop()
    return documents


def stored(out: Path) -> list[list[int]]:
    store = TokenStore.open(out)
    return [store.sequence(index).tolist() for index in range(store.num_sequences)]


DOCUMENTS = st.lists(st.lists(st.integers(260, 400), min_size=1, max_size=30), min_size=1, max_size=40)


@examples(15)
@given(documents=DOCUMENTS, per_shard=st.integers(1, 5), restore=st.booleans())
def test_every_token_comes_back_and_every_position_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: KeuralTokenizer,
    documents: list[list[int]],
    per_shard: int,
    restore: bool,
) -> None:
    work = tmp_path_factory.mktemp("published")
    sequences = write(work / "shards", documents, per_shard)
    counts = import_tokens(work / "shards", work / "store", "published", tokenizer, ImportOptions(restore_lost=restore))
    by_shard = [sequences[start : start + per_shard] for start in range(0, len(sequences), per_shard)]
    expected = [[document for sequence in shard for document in naive_documents(sequence)] for shard in by_shard]
    if not restore:
        expected = [[shard[0][1:], *shard[1:]] for shard in expected]
    assert stored(work / "store") == [document for shard in expected for document in shard]
    assert counts["shards"] == counts["lost"] == len(by_shard)
    assert counts["restored"] == (len(by_shard) if restore else 0)
    assert counts["positions"] == len(sequences) * LENGTH
    left_lost = counts["lost"] - counts["restored"]
    assert counts["positions"] == counts["tokens"] + counts["padding"] + counts["stray"] + left_lost
    assert counts["padding"] == sum(sequence.count(0) for sequence in sequences)
    assert TokenStore.open(work / "store").manifest["imported"] == counts


def test_the_first_token_of_a_shard_is_not_in_its_file(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, pack_documents([[300, 301]], LENGTH, LIMIT), LENGTH)
    assert np.fromfile(tmp_path / "keural_000.bin", dtype="<u4", offset=32).tolist()[:4] == [0, 300, 301, EOS]


def test_cuts_are_counted(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    documents = [
        [300] * 30,  # more than the limit: cut twice, alone in its sequence
        *([300] * 5, [301] * 9),  # 18 tokens: the second loses its end
        *([300] * 13, [301]),  # 15 + 3: of the second only the EOS of the cut is left
        *([300] * 12, [301]),  # 14 + 3: of the second BOS and EOS
        [300] * 3,  # the rest of the sequence is padding
    ]
    sequences = write(tmp_path / "shards", documents, 99)
    assert [sequence[-2:] for sequence in sequences] == [[300, EOS], [301, EOS], [EOS, EOS], [BOS, EOS], [0, 0]]
    counts = import_tokens(tmp_path / "shards", tmp_path / "store", "published", tokenizer)
    assert (counts["cut_long"], counts["cut_last"], counts["stray"], counts["padding"]) == (1, 3, 3, 11)
    assert (counts["documents"], counts["tokens"]) == (6, 5 * LENGTH - 3 - 11)


def test_a_shard_of_full_size_is_read_like_a_small_one(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    generator = np.random.default_rng(3)
    lengths = np.clip(generator.lognormal(6.0, 1.2, 600).astype(int), 1, 20_000)
    sequences = pack_documents([generator.integers(260, 400, length).tolist() for length in lengths])
    write_shard(tmp_path / "shards", 0, sequences)
    counts = import_tokens(tmp_path / "shards", tmp_path / "store", "published", tokenizer)
    assert stored(tmp_path / "store") == [document for sequence in sequences for document in naive_documents(sequence)]
    assert counts["sequences"] == len(sequences)


def replace(offset: int, content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        old = path.read_bytes()
        path.write_bytes(old[:offset] + content + old[offset + len(content) :])

    return change


def set_meta(**values: object) -> Callable[[Path], None]:
    return lambda path: void(path.write_text(json.dumps(json.loads(path.read_text()) | values)))


def void(_: object) -> None:
    """Drop a result."""


BAD = [
    (".bin", replace(0, b"KEURAX"), "magic"),
    (".bin", replace(8, b"\2"), "version 2"),
    (".bin", replace(12, b"\4"), "bytes, its header says 4 sequences"),
    (".bin", replace(28, b"\1"), "header is damaged"),
    (".bin", replace(32, b"\7"), "header is damaged"),
    (".bin", lambda path: void(path.write_bytes(path.read_bytes()[:-8])), "fetch it again"),
    (".bin", lambda path: void(path.write_bytes(b"")), "magic"),
    (".bin", lambda path: path.unlink(), "keural_000.bin"),
    (".idx", lambda path: path.unlink(), "keural_000.idx: is missing"),
    (".idx", replace(0, b"\4"), "says 4 sequences of 16"),
    (".idx", replace(8, b"\x24"), "sequence 0 is at byte 36"),
    (".idx", replace(16, b"\7"), "with 7 tokens"),
    (".idx", lambda path: void(path.write_bytes(path.read_bytes()[:-1])), "fetch the shard again"),
    (".idx", lambda path: void(path.write_bytes(b"")), "fetch the shard again"),
    (".meta", lambda path: path.unlink(), "keural_000.meta: is missing"),
    (".meta", set_meta(num_sequences=4), "num_sequences is 4"),
    (".meta", set_meta(seq_length="16"), "seq_length is '16'"),
    (".meta", set_meta(dtype="uint16"), "dtype is 'uint16'"),
    (".meta", set_meta(file_size_bytes=1), "file_size_bytes is 1"),
    (".meta", lambda path: void(path.write_text("[1]")), "num_sequences is None"),
    (".meta", lambda path: void(path.write_text("{")), "not valid JSON"),
    (".bin", replace(36, (5000).to_bytes(4, "little")), "sequence 0 has a token id outside the tokenizer"),
    (".bin", replace(36, bytes(4)), "sequence 0 has padding inside"),
    (".bin", replace(32 + 64, bytes(64)), "sequence 1 does not start with BOS"),
    (".bin", replace(32 + 64, b"\2"), "sequence 1 does not start with BOS"),
    (".bin", replace(32 + 64 + 4, b"\1\0\0\0"), "sequence 1 has a document without its end"),
]


@pytest.mark.parametrize(("suffix", "change", "message"), BAD)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: KeuralTokenizer, suffix: str, change: Callable[[Path], None], message: str
) -> None:
    write(tmp_path / "shards", [[300] * 12, [301] * 13, [302] * 12], 99)
    change(tmp_path / "shards" / f"keural_000{suffix}")
    with pytest.raises(UserError) as caught:
        import_tokens(tmp_path / "shards", tmp_path / "store", "published", tokenizer)
    assert message in str(caught.value)
    assert "keural_000" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_an_empty_directory_and_an_old_store_are_refused(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no keural_NNN\.bin"):
        import_tokens(tmp_path / "empty", tmp_path / "store", "published", tokenizer)
    with pytest.raises(UserError, match="no such file"):
        import_tokens(tmp_path / "nowhere", tmp_path / "store", "published", tokenizer)
    write(tmp_path / "shards", [[300]])
    with pytest.raises(UserError, match="not empty"):
        import_tokens(tmp_path / "shards", tmp_path / "shards", "published", tokenizer)


def test_the_command_says_what_was_lost(
    tmp_path: Path, tokenizer: KeuralTokenizer, keural: Callable[..., tuple[int, str, str]]
) -> None:
    write(tmp_path / "shards", [[300] * 30, [301] * 3])
    tokenizer.save(tmp_path / "tokenizer")
    arguments = ["--format", "published", "--tokenizer", str(tmp_path / "tokenizer")]
    code, printed, _ = keural("data", "import", str(tmp_path / "shards"), str(tmp_path / "store"), *arguments)
    assert code == 0
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert {"2 documents", "11 padding", "1 cut long", "1 lost", "1 restored"} <= lines
    code, _, complaint = keural("data", "import", str(tmp_path / "shards"), str(tmp_path / "store"), *arguments)
    assert (code, complaint.count("\n")) == (2, 1)
    arguments[1] = "megatrn"
    code, _, complaint = keural("data", "import", str(tmp_path / "shards"), str(tmp_path / "other"), *arguments)
    assert code == 2
    assert "did you mean 'megatron'" in complaint
