"""Text as it comes out: a stream of ids gives what decoding at once gives, for both tokenizers; letters come back as typed."""

import unicodedata
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.serve.engines.base import Finish
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.jamo import RESTORED, compatibility_jamo
from keural.serve.text import stream_answer
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples

TEXTS = {
    "Korean": "안녕하세요! 오늘 날씨가 참 좋네요.\n뷁쉙 한자(漢字)도 씁니다.",
    "emoji": "좋아요 😀👍🏽 👨‍👩‍👧 🇰🇷",
    "code": 'def f(x):\n    return {"키": [x, 1.5e-3]}  # 설명\n\n\tprint(f(2))\n',
    "letters": "ㅋㅋㅋ 그래 ㅠㅠ ㅇㅇ ㄳ",
}


@dataclass
class Recital:
    """An engine that gives prepared ids."""

    tokenizer: KeuralTokenizer
    ids: list[int]
    ends: type[BaseException] | None = None
    context_length: int = 10_000

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams, stop: Collection[int]) -> Generator[int, None, Finish]:
        yield from self.ids
        if self.ends:
            raise self.ends
        return "stop"


@pytest.fixture(scope="session")
def published(published_tokenizer_file: Path) -> KeuralTokenizer:
    return KeuralTokenizer.load(published_tokenizer_file)


@pytest.fixture(params=["published", "lossless"])
def either(request: pytest.FixtureRequest) -> KeuralTokenizer:
    return request.getfixturevalue("published" if request.param == "published" else "tokenizer")


def streamed(tokenizer: KeuralTokenizer, ids: list[int], jamo: str = "as-decoded", **how: object) -> tuple[list[str], str]:
    """The pieces that were written, and the answer's text."""
    pieces: list[str] = []
    answer = stream_answer(Recital(tokenizer, ids, **how), [5], SamplingParams(), pieces.append, jamo)  # type: ignore[arg-type]
    return pieces, answer.text


@pytest.mark.parametrize("kind", TEXTS)
def test_a_stream_gives_the_text_of_decoding_at_once(either: KeuralTokenizer, kind: str) -> None:
    ids = either.encode(TEXTS[kind])

    pieces, text = streamed(either, ids)

    assert "".join(pieces) == text == either.decode(ids)
    assert len(pieces) > 1
    if either.kind == "lossless":
        assert text == TEXTS[kind]


@examples(50)
@given(data=st.data())
def test_any_ids_stream_as_they_decode_at_once(data: st.DataObject, tokenizer: KeuralTokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))

    pieces, text = streamed(tokenizer, ids)

    assert "".join(pieces) == text == tokenizer.decode(ids)


def byte_ids(text: str) -> list[int]:
    """The text as byte tokens, which cut through characters."""
    return [4 + byte for byte in text.encode()]


def test_characters_are_held_back_until_they_are_whole(either: KeuralTokenizer) -> None:
    assert streamed(either, byte_ids("가😀"))[0] == ["가", "😀"]


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt], ids=["stopped", "cancelled"])
def test_a_character_left_unfinished_is_marked_as_in_decoding_at_once(
    either: KeuralTokenizer, ends: type[BaseException] | None
) -> None:
    ids = [*byte_ids("가"), *byte_ids("나")[:2]]

    assert streamed(either, ids, ends=ends) == (["가", "\ufffd"], "가\ufffd")
    assert either.decode(ids) == "가\ufffd"


def test_control_characters_are_text_like_any_other(tokenizer: KeuralTokenizer) -> None:
    assert streamed(tokenizer, byte_ids("\x1b[2Ja\r\n"))[1] == "\x1b[2Ja\r\n"


def test_letters_come_back_as_typed(published: KeuralTokenizer) -> None:
    ids = published.encode(TEXTS["letters"])

    assert streamed(published, ids, "compatibility")[1] == "ㅋㅋㅋ 그래 ㅠㅠ ㅇㅇ ㄳ"
    assert streamed(published, ids, "as-decoded")[1] == "ᄏᄏᄏ 그래 ᅲᅲ ᄋᄋ ᆪ"


def test_restored_letters_are_read_again_as_the_same_ids(published: KeuralTokenizer) -> None:
    typed = [chr(code) for code in range(0x3131, 0x318F)]
    for text in [*typed, *(first + second for first in typed for second in typed), "감ㄳ", "ㅋㅋㅠㅠ"]:
        ids = published.encode(text)
        assert published.encode(compatibility_jamo(published.decode(ids))) == ids


def test_letters_written_as_separate_tokens_stay_separate(published: KeuralTokenizer) -> None:
    ids = [*published.encode("ㅋ"), *published.encode("ㅠ")]

    assert streamed(published, ids, "compatibility") == (["ㅋ", "ㅠ"], "ㅋㅠ")


def test_a_lossless_tokenizer_is_left_alone(tokenizer: KeuralTokenizer) -> None:
    text = "ᄏᄏᄏ ㅋㅋㅋ 각"

    assert streamed(tokenizer, tokenizer.encode(text), "compatibility")[1] == text


def test_the_table_is_the_inverse_of_nfkc() -> None:
    assert len(RESTORED) == 94
    assert all(unicodedata.normalize("NFKC", chr(typed)) == chr(decoded) for decoded, typed in RESTORED.items())


@given(st.text(st.characters(min_codepoint=0x1100, max_codepoint=0x11FF) | st.sampled_from("가각a ")))
def test_restoring_changes_nothing_that_nfkc_keeps(text: str) -> None:
    assert unicodedata.normalize("NFKC", compatibility_jamo(text)) == unicodedata.normalize("NFKC", text)


def test_the_command_restores_letters_unless_told_otherwise(
    keural: Callable[..., tuple[int, str, str]], published: KeuralTokenizer, tmp_path: Path
) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    config = KeuralConfig(**shape, vocab_size=published.vocab_size, num_hidden_layers=1, eos_token_id=published.im_end_id)
    model = KeuralMoECausalLM(config)
    (letter,) = published.encode("ㅋ")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[letter] = 1.0  # after this letter no other can follow
    save_model_directory(tmp_path / "echo", config, model.state_dict(), published, {})
    command = ["generate", tmp_path / "echo", "--raw", "--prompt", "ㅋ", "--temperature", 0, "--repetition-penalty", 1]

    restored = keural(*command, "--max-new-tokens", 3)[1]
    as_decoded = keural(*command, "--max-new-tokens", 3, "--jamo", "as-decoded")[1]

    assert restored == "ㅋㅋㅋ\n"
    assert as_decoded == "ᄏᄏᄏ\n"
