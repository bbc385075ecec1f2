"""The lossless kind: whatever goes in comes out, through SentencePiece and through tokenizer.json, with the same ids."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from keural.errors import UserError
from keural.recipe import TokenizerSpec
from keural.tokenizer import KeuralTokenizer, train_tokenizer
from keural.tokenizer.segment import SEGMENT_CHARACTERS, segments
from tests.helpers.examples import examples

Convert = Callable[[KeuralTokenizer], Tokenizer]
MakeSpec = Callable[..., TokenizerSpec]

AWKWARD = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\0",
        "a\0b",
        "\u2581",
        " \u2581 ",
        "a\u2581b",
        "\u2581\u2581",
        "\u2585",
        " \u2047 ",
        "\ufffd",
    ),
    *(
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
        "<|im_start|>",
        "<|im_end|>",
        "<bos>",
        "<eos>",
        "<pad>",
        "<0x0A",
        "<<bos>>",
        "<0xE2><0x96><0x81>",
    ),
    *("def f(x):\n        return  x\n\n\n\n\n\n", "\t\t\t\t\t\ttabs", " " * 100, "\n" * 100, "x" * 3000, "가" * 3000, " a" * 3000),
    *(
        "ㅋㅋㅋ ㅠㅠ",
        "①½ｘ²ﬁ㈜㎏",
        "e\u0301 vs é",
        "\u1112\u1161\u11ab",
        "\ufeff",
        "\u200b\u200d",
        "👨‍👩‍👧‍👦",
        "\u2028\u2029\x85\x0b\x0c",
        "\U0010ffff",
    ),
]
CHARACTERS = st.characters(exclude_categories=["Cs"])
FRAGMENTS = st.sampled_from([*AWKWARD[:34], "고양이", " the", "    ", "return", "12", "、"])
STRINGS = st.one_of(st.text(CHARACTERS), st.lists(st.one_of(FRAGMENTS, CHARACTERS)).map("".join))


@pytest.fixture(scope="module")
def converted(lossless: KeuralTokenizer, as_json: Convert) -> Tokenizer:
    return as_json(lossless)


def lost(tokenizer: KeuralTokenizer, converted: Tokenizer, texts: list[str]) -> list[str]:
    """The texts that either path does not restore, or on which the two paths differ."""
    ours = tokenizer.encode_batch(texts, threads=2)
    theirs = [encoding.ids for encoding in converted.encode_batch_fast(texts)]
    return [
        text
        for text, ids, other in zip(texts, ours, theirs, strict=True)
        if ids != other or tokenizer.decode(ids) != text or converted.decode(other) != text
    ]


def test_awkward_strings_are_restored(lossless: KeuralTokenizer, converted: Tokenizer) -> None:
    assert lost(lossless, converted, AWKWARD) == []


@pytest.mark.parametrize(
    ("first", "end"),
    [(0, 0x10000), (0x1F000, 0x20000), (0x10F000, 0x110000), pytest.param(0x10000, 0x110000, marks=pytest.mark.slow)],
    ids=["the basic plane", "emoji", "the last ones", "all others"],
)
def test_every_character_is_restored(lossless: KeuralTokenizer, converted: Tokenizer, first: int, end: int) -> None:
    characters = [chr(code) for code in range(first, end) if not 0xD800 <= code < 0xE000]
    chunks = ["".join(characters[start : start + 64]) for start in range(0, len(characters), 64)]
    assert lost(lossless, converted, chunks) == []


@pytest.mark.hypothesis
def test_any_string_is_restored(lossless: KeuralTokenizer, converted: Tokenizer) -> None:
    @examples(125)
    @given(STRINGS)
    def check(text: str) -> None:
        assert lost(lossless, converted, [text]) == []

    check()


def test_ten_thousand_random_unicode_strings_are_restored(lossless: KeuralTokenizer, converted: Tokenizer) -> None:
    rng = random.Random(0)
    # Half from all of Unicode, half from what text is mostly made of, where pieces and bytes meet.
    ranges = [(0, 0xD800), (0xE000, 0x110000), (0x20, 0x7F), (0xAC00, 0xD7A4), (0x2580, 0x2583), (0x09, 0x21)]
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))) for _ in range(10_000)]
    assert lost(lossless, converted, texts) == []


@pytest.mark.hypothesis
def test_text_never_yields_control_ids(lossless: KeuralTokenizer) -> None:
    @examples(75)
    @given(STRINGS)
    def check(text: str) -> None:
        assert all(4 <= token_id < lossless.im_start_id for token_id in lossless.encode(text))

    check()


def test_real_lines_are_restored(real_lossless: KeuralTokenizer, as_json: Convert, corpus_sample: list[str]) -> None:
    assert lost(real_lossless, as_json(real_lossless), corpus_sample) == []


@pytest.mark.slow
def test_all_real_lines_and_documents_are_restored(
    real_lossless: KeuralTokenizer, as_json: Convert, corpus: dict[str, list[str]]
) -> None:
    converted = as_json(real_lossless)
    for name, lines in corpus.items():
        assert lost(real_lossless, converted, lines) == [], name
        assert lost(real_lossless, converted, ["\n".join(lines)]) == [], f"{name} as one text"


def test_layout_has_pieces(lossless: KeuralTokenizer) -> None:
    for text in [" " * count for count in range(1, 17)] + ["\n", "\n\n", "\n\n\n", "\t", "\t\t"]:
        assert len(lossless.encode(text)) == 1, repr(text)
    assert len(lossless.encode(" " * 32)) == 2


def test_digits_are_split_and_pieces_never_cross_a_space(lossless: KeuralTokenizer) -> None:
    pieces = [lossless.token_bytes(token_id) for token_id in range(260, lossless.im_start_id)]
    assert not any(len(piece.strip()) > 1 and piece.strip().isdigit() for piece in pieces)
    assert not any(b" " in piece.lstrip(b" ") for piece in pieces)


@given(st.text(st.sampled_from("ab \n"), max_size=4000))
def test_segments_join_to_the_text_and_are_bounded(text: str) -> None:
    assert "".join(segments(text)) == text
    assert all(len(segment) <= SEGMENT_CHARACTERS for segment in segments(text))


def test_segmentation_does_not_change_ordinary_text(lossless: KeuralTokenizer, bilingual_texts: list[str]) -> None:
    long = "".join(bilingual_texts[:40])
    assert len(segments(long)) > 3
    lines = [line for line in long.replace("\n", "\n\0").split("\0") if line]
    in_lines = [token_id for line in lines for token_id in lossless.encode(line.rstrip("\n"))]
    without_newlines = [token_id for token_id in lossless.encode(long) if not lossless.token_bytes(token_id).startswith(b"\n")]
    assert without_newlines == in_lines


def test_training_is_deterministic_and_sampling_follows_the_seed(
    bilingual_texts: list[str], make_spec: MakeSpec, lossless: KeuralTokenizer, tmp_path: Path
) -> None:
    again = train_tokenizer(iter(bilingual_texts), make_spec(vocab_size=640), tmp_path / "a", seed=0)
    assert again.sha256 == lossless.sha256
    small = make_spec(vocab_size=500, max_bytes=20_000)
    hashes = [train_tokenizer(bilingual_texts, small, tmp_path / str(seed), seed).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_trained_directory_loads_again(lossless: KeuralTokenizer, tmp_path: Path) -> None:
    lossless.save(tmp_path)
    loaded = KeuralTokenizer.load(tmp_path)
    assert (loaded.sha256, loaded.kind, loaded.vocab_size) == (lossless.sha256, "lossless", 642)


def test_published_style_is_trained_with_its_normalisation(
    bilingual_texts: list[str], make_spec: MakeSpec, as_json: Convert, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(bilingual_texts, make_spec(kind="published", vocab_size=600), tmp_path / "t", seed=0)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("published", 602)
    assert tokenizer.decode(tokenizer.encode("  ＡＢＣ   고양이를  ")) == "ABC 고양이를"
    converted = as_json(tokenizer)
    assert [converted.encode(text).ids for text in bilingual_texts] == tokenizer.encode_batch(bilingual_texts, threads=1)


def test_long_lines_are_used(make_spec: MakeSpec, tmp_path: Path, bilingual_texts: list[str]) -> None:
    one_line = " ".join("".join(bilingual_texts).split())
    assert len(one_line.encode()) > 50_000
    tokenizer = train_tokenizer([one_line], make_spec(vocab_size=640), tmp_path / "t", seed=0)
    assert len(tokenizer.encode(one_line)) < 0.5 * len(one_line)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", "  \t"]])
def test_no_text_is_refused(texts: list[str], make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer(texts, make_spec(vocab_size=400), tmp_path / "t", seed=0)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", ["lossless", "published"])
def test_too_little_text_says_how_many_pieces_are_possible(kind: str, make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too little text .* at most (\d+) pieces; lower vocab_size or add sources") as refusal:
        train_tokenizer(["고양이 고양이 hello hello"], make_spec(kind=kind, vocab_size=5000), tmp_path / "t", seed=0)
    possible = int(str(refusal.value).split("at most ")[1].split()[0])
    assert train_tokenizer(["고양이 고양이 hello hello"], make_spec(kind=kind, vocab_size=possible), tmp_path / "t", seed=0)


def test_too_small_a_vocabulary_says_how_many_pieces_are_needed(make_spec: MakeSpec, tmp_path: Path) -> None:
    texts = ["".join(map(chr, range(0xAC00, 0xAD00)))] * 3
    with pytest.raises(UserError, match=r"need at least \d+ pieces; raise vocab_size or lower character_coverage"):
        train_tokenizer(texts, make_spec(vocab_size=300, character_coverage=1.0), tmp_path / "t", seed=0)
