"""Stop strings: the same text, however it comes in pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.serve.batching.requests import Chosen
from keural.serve.server.pieces import Pieces
from keural.serve.stops import StopStrings
from keural.tokenizer import KeuralTokenizer

WORDS = st.text("ab가😀", max_size=24)
STOPS = st.lists(st.text("ab가😀", min_size=1, max_size=4), max_size=3)


def shown(stops: list[str], pieces: list[str]) -> str:
    strings = StopStrings(stops)
    return "".join([*map(strings.push, pieces), strings.flush()])


@given(text=WORDS, stops=STOPS, cuts=st.lists(st.integers(0, 24)))
def test_pieces_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]

    assert shown(stops, pieces) == shown(stops, [text]) == shown(stops, list(text))


@given(text=WORDS, stops=STOPS)
def test_what_is_shown_is_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    whole = text if not ends else text[: ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))]

    assert shown(stops, list(text)) == whole


@given(text=WORDS, stops=STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    strings = StopStrings(stops)
    given_out = "".join(map(strings.push, text))

    if strings.found is None:
        held = text[len(given_out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(text=st.text(max_size=12), stops=st.lists(st.text(min_size=1, max_size=3), max_size=2), size=st.integers(1, 9))
def test_tokens_in_steps_of_any_size_give_the_same_pieces(
    text: str, stops: list[str], size: int, tokenizer: KeuralTokenizer
) -> None:
    tokens = [Chosen(token) for token in tokenizer.encode(text)]

    def collected(step: int) -> tuple[str, list[int], list[int], int]:
        pieces = Pieces(tokenizer, str, stops)
        parts = [pieces.push(tokens[start : start + step]) for start in range(0, len(tokens), step)] + [pieces.finish()]
        return (
            "".join(part.text for part in parts),
            [token.id for part in parts for token in part.tokens],
            [start for part in parts for start in part.starts],
            pieces.count,
        )

    assert collected(size) == collected(1)
    assert collected(1)[0] == shown(stops, [text])


@pytest.mark.parametrize(("stop", "left"), [(["abc", "bc"], "x"), (["bc", "abcd"], "xa"), (["cd", "d"], "xab")])
def test_the_stop_that_is_whole_first_counts(stop: list[str], left: str) -> None:
    assert shown(stop, ["xabcd"]) == left
