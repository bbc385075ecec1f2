"""Tokenising that was killed goes on where it was, and the store is the one of an uninterrupted run, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from keural.data.prepare import clear_parts, prepare
from keural.data.prepared import Prepared
from keural.data.tokens import encode
from keural.data.tokens.encoding_cache import EncodingCache
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples

ARRAYS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9)
RUN = """
import itertools, sys, time
from pathlib import Path
from keural.data.tokens import encode
from keural.data.prepare import prepare
from keural.recipe import DataSpec
from keural.tokenizer import KeuralTokenizer
encode.BATCH_CHARACTERS = 2000
data, out, tokenizer, spec = sys.argv[1:]
write, number = encode.EncodingCache.encode, itertools.count()
encode.EncodingCache.encode = lambda *arguments: (time.sleep(600 if next(number) >= 5 else 0), write(*arguments))[1]
prepare(DataSpec.model_validate_json(spec), "next_token", Path(data), KeuralTokenizer.load(tokenizer), Path(out), 1)
"""


def forbidden(texts: Sequence[str]) -> list[NDArray[np.int32]]:
    raise AssertionError("encoded again")


@examples(10)
@given(ids=ARRAYS)
def test_a_part_gives_back_what_was_encoded(tmp_path_factory: pytest.TempPathFactory, ids: list[list[int]]) -> None:
    parts = EncodingCache(tmp_path_factory.mktemp("parts"), "a" * 64)
    texts = [f"text {number}" for number in range(len(ids))]
    arrays = [np.array(one, dtype=np.int32) for one in ids]
    for encoder in (lambda _: arrays, forbidden):
        assert [one.tolist() for one in parts.encode(texts, encoder)] == ids


def test_other_texts_another_tokenizer_and_damage_are_encoded_anew(tmp_path: Path) -> None:
    def encoded(value: int) -> list[NDArray[np.int32]]:
        return [np.array([value], dtype=np.int32)]

    parts = EncodingCache(tmp_path, "a" * 64)
    parts.encode(["ab"], lambda _: encoded(1))
    assert parts.encode(["a", "b"], lambda _: encoded(2))[0] == 2
    assert EncodingCache(tmp_path, "b" * 64).encode(["ab"], lambda _: encoded(3))[0] == 3
    for path in tmp_path.iterdir():
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    assert parts.encode(["ab"], lambda _: encoded(4))[0] == 4
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert parts.encode(["ab"], lambda _: encoded(5))[0] == 5


def corpus(data_dir: Path, documents: int = 400) -> DataSpec:
    words = ["the", "cat", "sees", "a", "small", "red", "house", "고양이는", "작은", "빨간", "집을", "봅니다", "안녕하세요"]
    texts = [
        "\n".join(" ".join(words[(n * k + j) % len(words)] for j in range(9)) for k in range(1, 6)) + f" {n}"
        for n in range(documents)
    ]
    (data_dir / "corpus.txt").write_text("\n\n".join(texts))
    source = SourceSpec(name="corpus", adapter="text", path="corpus.txt", options={"split": "paragraph"})
    return DataSpec(sequence_length=128, sources=[source], heldout_per_mille=30)


def files(prepared: Prepared) -> dict[str, bytes]:
    directory = prepared.train.parent
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_killed_and_started_again_it_gives_the_same_bytes(
    tmp_path: Path, data_dir: Path, tokenizer: KeuralTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = corpus(data_dir)
    tokenizer.save(tmp_path / "tokenizer")
    whole = files(prepare(spec, "next_token", data_dir, tokenizer, tmp_path / "whole", 1))
    out = tmp_path / "killed"
    arguments = [str(data_dir), str(out), str(tmp_path / "tokenizer"), spec.model_dump_json()]
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while len(list(out.glob(".*.parts/*.ids"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(out.glob(".*.parts/*.ids")))
    assert kept >= 5
    calls = []
    encode_arrays = KeuralTokenizer.encode_arrays
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(KeuralTokenizer, "encode_arrays", lambda *given: (calls.append(1), encode_arrays(*given))[1])
    assert files(prepare(spec, "next_token", data_dir, tokenizer, out, 1)) == whole
    resumed = len(calls)
    calls.clear()
    prepare(spec, "next_token", data_dir, tokenizer, tmp_path / "again", 1)
    assert resumed == len(calls) - kept
    assert not list(out.glob(".*"))


def test_the_number_of_threads_and_the_size_of_batches_change_nothing(
    tmp_path: Path, data_dir: Path, tokenizer: KeuralTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = corpus(data_dir, 60)
    expected = files(prepare(spec, "next_token", data_dir, tokenizer, tmp_path / "0", 1))
    for number, (threads, characters) in enumerate([(1, 1), (3, 500), (8, 10**6)], start=1):
        monkeypatch.setattr(encode, "BATCH_CHARACTERS", characters)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, threads=threads: range(threads))
        assert files(prepare(spec, "next_token", data_dir, tokenizer, tmp_path / str(number), 1)) == expected


def test_an_error_leaves_no_parts(
    tmp_path: Path, data_dir: Path, tokenizer: KeuralTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = corpus(data_dir, 20)
    monkeypatch.setattr("keural.data.prepare._check_splits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(spec, "next_token", data_dir, tokenizer, tmp_path / "out", 1)
    assert not list((tmp_path / "out").glob(".*"))


class TestLeftParts:
    """What killed processes left is removed when all data is there, and nothing else."""

    def test_directories_of_ids_go(self, tmp_path: Path) -> None:
        EncodingCache(tmp_path / ".0123456789abcdef.parts", "a" * 64).encode(["a"], lambda _: [np.array([1], dtype=np.int32)])
        (tmp_path / ".empty.parts").mkdir()

        clear_parts(tmp_path)

        assert list(tmp_path.iterdir()) == []

    def test_a_link_is_not_followed_and_what_is_no_directory_of_ours_stays(self, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "mine").write_text("keep")
        out = tmp_path / "data"
        (out / "kept.parts").mkdir(parents=True)
        (out / ".kept").mkdir()
        (out / ".link.parts").symlink_to(elsewhere)
        (out / ".file.parts").write_text("keep")

        clear_parts(out)

        assert (elsewhere / "mine").read_text() == "keep"
        assert {path.name for path in out.iterdir()} == {"kept.parts", ".kept", ".link.parts", ".file.parts"}

    def test_damaged_ids_are_no_ids(self, tmp_path: Path) -> None:
        """Cut, lengthened or changed at any byte: the texts are encoded again."""
        cache = EncodingCache(tmp_path, "a" * 64)
        cache.encode(["ab", "c"], lambda _: [np.array([5, 6], dtype=np.int32), np.array([7], dtype=np.int32)])
        (file,) = tmp_path.glob("*.ids")
        whole = file.read_bytes()
        for damaged in (
            [whole[:place] for place in range(len(whole))]
            + [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
            + [whole + b"0", b""]
        ):
            file.write_bytes(damaged)
            again = cache.encode(["ab", "c"], lambda _: [np.array([1], dtype=np.int32), np.array([2], dtype=np.int32)])
            assert [ids.tolist() for ids in again] == [[1], [2]], damaged
