"""Pieces that a recipe asks for: cut alike wherever they stand, in SentencePiece and tokenizer.json, and nothing else is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from keural.recipe import TokenizerSpec
from keural.tokenizer import KeuralTokenizer, train_tokenizer
from tests.tokenizer.test_lossless import AWKWARD

MakeSpec = Callable[..., TokenizerSpec]
ASKED = ["십", "이십", "육십", "이에요", "ten"]


@pytest.fixture(scope="module")
def asked(bilingual_texts: list[str], make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> KeuralTokenizer:
    texts = [f"{text} 이십삼은 이십 육십팔이에요 often" for text in bilingual_texts]
    spec = make_spec(vocab_size=680, pieces=ASKED)
    return train_tokenizer(texts, spec, tmp_path_factory.mktemp("asked") / "tokenizer", seed=0)


def pieces(tokenizer: KeuralTokenizer, text: str) -> list[str]:
    return [tokenizer.decode([number]) for number in tokenizer.encode(text)]


def test_they_are_pieces_wherever_they_stand(asked: KeuralTokenizer) -> None:
    assert asked.vocab_size == 680 + 2
    assert pieces(asked, "이십") == ["이십"]
    assert pieces(asked, "육십") == ["육십"]
    assert pieces(asked, "십") == ["십"]
    for text in ("이십삼은", " 이십삼은", "육십팔이에요", "사십이에요", "often", "이십이십", "삼십이십"):
        found = pieces(asked, text)
        assert "".join(found) == text
        parts = [piece for piece in found if any(one in piece for one in ASKED)]
        assert parts
        assert set(parts) <= set(ASKED), found


def test_everything_is_restored_and_both_readings_agree(
    asked: KeuralTokenizer, as_json: Callable[[KeuralTokenizer], Tokenizer], bilingual_texts: list[str]
) -> None:
    converted = as_json(asked)
    for text in [*AWKWARD, *bilingual_texts[:40], "이십삼 더하기 육십팔이에요 ten often"]:
        ids = asked.encode(text)
        assert asked.decode(ids) == text
        assert converted.encode(text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pieces": ["십", "십"]}, "twice"),
        ({"pieces": ["a b"]}, "pieces"),
        ({"pieces": [""]}, "pieces"),
        ({"pieces": ["x" * 17]}, "pieces"),
        ({"pieces": ["a1"]}, "keeps for itself"),
        ({"pieces": ["<s>"]}, "keeps for itself"),
        ({"pieces": ["\u2581a"]}, "keeps for itself"),
        ({"pieces": ["십"], "kind": "published"}, "lossless"),
    ],
)
def test_what_cannot_be_a_piece_is_refused(make_spec: MakeSpec, settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        make_spec(vocab_size=640, **settings)


def test_of_a_tokenizer_that_is_loaded_none_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="lossless tokenizer that is trained"):
        TokenizerSpec(path="t", pieces=["십"])
