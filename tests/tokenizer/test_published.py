"""The published model: its ids, its conversion, and refusal of files that are not such models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import Tokenizer

from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples

Convert = Callable[[KeuralTokenizer], Tokenizer]

VECTORS: dict[str, list[int]] = {
    "안녕하세요 저는 큐럴 토크나이저를 테스트합니다.": [17935, 3425, 25141, 23551, 29179, 15119, 72982, 6016, 970, 261],
    "Hello, this is a tokenizer validation test for Keural.": [
        *(15411, 262, 311, 285, 271, 13192, 17341, 26319, 960, 288, 8449, 19862, 261),
    ],
    "def hello_world():\n    return 42": [6108, 26921, 281, 6203, 1063, 14, 492, 260, 275, 266],
    "안녕하세요 world 123 def test(): return True": [17935, 652, 260, 265, 266, 269, 8530, 960, 1063, 492, 2618],
    "𠜎": [244, 164, 160, 146],
    "Hello world": [15411, 652],
    "안녕하세요, Hello world!": [17935, 262, 12841, 652, 341],
    "The future of artificial intelligence": [550, 1245, 267, 14171, 9346],
    "인공지능의 미래는": [44491, 295, 56946],
    "한국어 자연어처리 기술의 발전은": [34866, 4851, 1008, 7721, 18792, 79531],
    "def fibonacci(n):": [6108, 260, 105208, 286, 376, 740],
    "\n": [14],
    "\t": [13],
    "a\n\nb": [363, 14, 14, 485],
    "😀": [244, 163, 156, 132],
    "2024년 12월 25일": [266, 263, 266, 275, 338, 260, 265, 266, 359, 260, 266, 273, 302],
    "": [],
    "  ": [],
    "system\n": [9840, 14],
    "user\n안녕하세요! 오늘 날씨가 어때요?": [5330, 14, 17935, 341, 2487, 24505, 96784, 325],
    "assistant\n": [127869, 14],
    "<|im_start|>": [770, 499, 5092, 281, 3154, 499, 434],
}
RESTORED = [
    "안녕하세요 저는 큐럴 토크나이저를 테스트합니다.",
    "Hello, this is a tokenizer validation test for Keural.",
    "안녕하세요 world 123 def test(): return True",
    "𠜎",
]


def test_ids_and_size_are_the_published_ones(published: KeuralTokenizer) -> None:
    assert published.kind == "published"
    assert published.vocab_size == 131_074
    assert (published.pad_id, published.bos_id, published.eos_id, published.unk_id) == (0, 1, 2, 3)
    assert (published.im_start_id, published.im_end_id) == (131_072, 131_073)
    assert published.sha256.startswith("b982818e")


@pytest.mark.parametrize("text", VECTORS)
def test_sentencepiece_gives_the_published_ids(published: KeuralTokenizer, text: str) -> None:
    assert published.encode(text) == VECTORS[text]


def test_converted_tokenizer_gives_the_published_ids(published: KeuralTokenizer, as_json: Convert) -> None:
    converted = as_json(published)
    assert {text: converted.encode(text).ids for text in VECTORS} == VECTORS


def test_published_round_trips(published: KeuralTokenizer) -> None:
    for text in RESTORED:
        assert published.decode(published.encode(text)) == text
    # Known defect, kept: runs of spaces collapse.
    assert published.decode(VECTORS["def hello_world():\n    return 42"]) == "def hello_world():\n return 42"


@pytest.mark.hypothesis
def test_decoding_is_sentencepieces(published: KeuralTokenizer, published_tokenizer_file: Path) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(published_tokenizer_file))

    @examples(50)
    @given(st.lists(st.one_of(st.sampled_from([0, 1, 2, 260, 264, 652]), st.integers(260, 131_071))))
    def check(ids: list[int]) -> None:
        assert published.decode(ids) == oracle.decode(ids)

    check()


def test_conversion_agrees_on_real_lines(published: KeuralTokenizer, as_json: Convert, corpus_sample: list[str]) -> None:
    assert disagreements(published, as_json(published), corpus_sample) <= len(corpus_sample) // 1000


@pytest.mark.slow
def test_conversion_agrees_on_all_real_lines(published: KeuralTokenizer, as_json: Convert, corpus: dict[str, list[str]]) -> None:
    lines = [line for of_set in corpus.values() for line in of_set]
    different = disagreements(published, as_json(published), lines)
    print(f"\n{different} of {len(lines)} lines differ")
    assert different <= len(lines) // 1000


def disagreements(tokenizer: KeuralTokenizer, converted: Tokenizer, lines: list[str]) -> int:
    theirs = [encoding.ids for encoding in converted.encode_batch_fast(lines)]
    return sum(ours != other for ours, other in zip(tokenizer.encode_batch(lines, threads=2), theirs, strict=True))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        KeuralTokenizer.load(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="no such file"):
        KeuralTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 4096, b'{"model": {}}'])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        KeuralTokenizer.load(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_model_is_refused(lossless: KeuralTokenizer, tmp_path: Path, keep: float) -> None:
    lossless.save(tmp_path)
    file = tmp_path / "tokenizer.model"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"tokenizer\.model: "):
        KeuralTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("normalizer_spec", "add_dummy_prefix", True),
        ("normalizer_spec", "remove_extra_whitespaces", True),
        ("normalizer_spec", "escape_whitespaces", False),
        ("trainer_spec", "byte_fallback", False),
        ("trainer_spec", "bos_id", -1),
        ("trainer_spec", "treat_whitespace_as_suffix", True),
        ("trainer_spec", "vocab_size", 77),
    ],
)
def test_model_with_other_settings_is_refused(
    lossless: KeuralTokenizer, tmp_path: Path, part: str, field: str, value: object
) -> None:
    lossless.save(tmp_path)
    file = tmp_path / "tokenizer.model"
    proto = sentencepiece_model.ModelProto()
    proto.ParseFromString(file.read_bytes())
    setattr(getattr(proto, part), field, value)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError):
        KeuralTokenizer.load(file)


def test_id_outside_the_vocabulary_is_refused(either: KeuralTokenizer) -> None:
    for token_id in (-1, either.vocab_size):
        with pytest.raises(UserError, match="outside the vocabulary"):
            either.decode([300, token_id])


def test_control_ids_decode_to_nothing_or_to_their_names(either: KeuralTokenizer) -> None:
    ids = [either.bos_id, either.im_start_id, *either.encode("a"), either.im_end_id, either.pad_id, either.unk_id, either.eos_id]
    assert either.decode(ids) == "a"
    assert either.decode(ids, skip_special_tokens=False) == "<bos><|im_start|>a<|im_end|><pad><unk><eos>"


def test_batches_are_encoded_like_single_texts(either: KeuralTokenizer) -> None:
    texts = ["", "하나 둘", "a  b\n\nc", "▁", "끝"]
    assert either.encode_batch(texts, threads=2) == [either.encode(text) for text in texts]
    assert either.encode_batch([], threads=2) == []


def test_lone_surrogate_is_refused(either: KeuralTokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        either.encode("a\ud800b")
