"""Streaming: the parts of the text, in order, and never half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples


def sequences(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """Any ids, with control ids, bytes and leading spaces more often than by chance."""
    specials = st.sampled_from([0, 1, 2, 3, 260, vocab_size - 2, vocab_size - 1])
    return st.lists(st.one_of(st.integers(0, vocab_size - 1), st.integers(4, 259), specials), max_size=40)


@pytest.mark.hypothesis
def test_pushed_parts_join_to_the_decoded_text(either: KeuralTokenizer) -> None:
    @examples(100)
    @given(sequences(either.vocab_size), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        decoder = either.stream_decoder(skip_special_tokens=skip)
        parts = [decoder.push(token_id) for token_id in ids] + [decoder.flush()]
        assert "".join(parts) == either.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.hypothesis
def test_decoded_text_is_the_bytes_with_invalid_parts_replaced(lossless: KeuralTokenizer) -> None:
    @examples(50)
    @given(sequences(lossless.vocab_size))
    def check(ids: list[int]) -> None:
        data = b"".join(lossless.token_bytes(token_id) for token_id in ids)
        assert lossless.decode(ids) == data.decode("utf-8", errors="replace")

    check()


def test_every_part_of_a_valid_text_is_whole(either: KeuralTokenizer) -> None:
    text = "웃음 😀👨‍👩‍👧 𠜎 뷁!"
    decoder = either.stream_decoder()
    parts = [decoder.push(token_id) for token_id in either.encode(text)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert decoder.flush() == ""


def test_half_a_character_at_the_end_becomes_one_replacement(either: KeuralTokenizer) -> None:
    ids = either.encode("a😀")[:-1]
    decoder = either.stream_decoder()
    assert "".join(decoder.push(token_id) for token_id in ids) == "a"
    assert decoder.flush() == "\ufffd"
    assert either.decode(ids) == "a\ufffd"


def test_published_kind_drops_spaces_before_the_text(published: KeuralTokenizer) -> None:
    assert published.decode([260, 260, 652, 652]) == "world world"
    assert published.decode([published.bos_id, 652]) == "world"


def test_decoder_starts_anew_after_flush(lossless: KeuralTokenizer) -> None:
    decoder = lossless.stream_decoder()
    decoder.push(lossless.encode("😀")[0])
    assert decoder.flush() == "\ufffd"
    assert "".join(decoder.push(token_id) for token_id in lossless.encode("끝")) == "끝"
