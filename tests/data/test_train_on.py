"""`data.train_on` says which turns are trained; a row's own word against a turn counts, and a cut never falls inside an answer."""

from typing import Any

import pytest

from keural.data.records import Conversation, Drop
from keural.data.tokens.encode import Encoded, Encoder
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.message import Message
from tests.helpers.train_small import small_stage

TURNS = (
    Message("system", "Be kind."),
    Message("user", "안녕?"),
    Message("assistant", "네, 안녕하세요."),
    Message("user", "and you?"),
    Message("tool", "42"),
    Message("assistant", "fine"),
)


def encoded(tokenizer: KeuralTokenizer, turns: tuple[Message, ...], train_on: str, length: int = 500) -> Encoded | Drop:
    source = SourceSpec(name="a", adapter="messages", path="a")
    spec = DataSpec(sources=[source], sequence_length=length, train_on=train_on)  # type: ignore[arg-type]
    (found,) = Encoder(tokenizer, spec).encode([Conversation(turns, "a:1")])
    return found


def trained_texts(tokenizer: KeuralTokenizer, found: Encoded | Drop) -> list[str]:
    """What is trained, turn by turn; each must end with the end of the turn."""
    assert isinstance(found, Encoded)
    ((ids, mask),) = found.sequences
    assert mask is not None
    texts, run = [], []
    for token, counted in zip([*ids, -1], [*mask, 0], strict=True):
        if counted:
            run.append(int(token))
        elif run:
            assert run[-1] == tokenizer.im_end_id
            texts.append(tokenizer.decode(run[:-1]))
            run = []
    return texts


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["네, 안녕하세요.", "fine"]),
        ("last_turn", ["fine"]),
        ("all", ["Be kind.", "안녕?", "네, 안녕하세요.", "and you?", "42", "fine"]),
    ],
)
def test_the_turns_that_it_names_are_trained(tokenizer: KeuralTokenizer, train_on: str, expected: list[str]) -> None:
    found = encoded(tokenizer, TURNS, train_on)
    assert trained_texts(tokenizer, found) == expected
    assert isinstance(found, Encoded)
    plain = encoded(tokenizer, TURNS, "assistant")
    assert isinstance(plain, Encoded)
    assert list(found.sequences[0][0]) == list(plain.sequences[0][0]), "the ids are the same"


@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
def test_a_turn_that_its_row_does_not_want_trained_is_not(tokenizer: KeuralTokenizer, train_on: str) -> None:
    turns = (*TURNS[:2], TURNS[2]._replace(trained=False), *TURNS[3:])
    assert "네, 안녕하세요." not in trained_texts(tokenizer, encoded(tokenizer, turns, train_on))


def test_a_last_turn_that_is_not_to_be_trained_leaves_nothing(tokenizer: KeuralTokenizer) -> None:
    turns = (*TURNS[:5], TURNS[5]._replace(trained=False))
    assert encoded(tokenizer, turns, "last_turn") == Drop("nothing_trained", "a:1")


@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
def test_a_long_conversation_is_cut_at_the_end_of_an_answer_and_says_so(tokenizer: KeuralTokenizer, train_on: str) -> None:
    """At every length: what is left ends with an assistant's turn, whole, and its last turn is trained."""
    turns = (*TURNS, Message("user", "so?"), Message("assistant", "done"))
    answers = {0: ["네, 안녕하세요.", "fine", "done"], 2: ["네, 안녕하세요.", "fine"], 5: ["네, 안녕하세요."]}
    whole = encoded(tokenizer, turns, train_on)
    assert isinstance(whole, Encoded)
    full = len(whole.sequences[0][0])
    cuts = set()
    for length in range(2, full + 1):
        found = encoded(tokenizer, turns, train_on, length)
        if isinstance(found, Drop):
            assert found.reason == "too_long"
            continue
        assert len(found.sequences[0][0]) <= length
        texts, expected = trained_texts(tokenizer, found), answers[found.cut_turns]
        assert texts == expected[-1:] if train_on == "last_turn" else [text for text in texts if text in answers[0]] == expected
        cuts.add(found.cut_turns)
    assert cuts == set(answers)


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        ("dpo", {"train_on": "all"}, "train_on is of conversations; it has no effect with objective dpo"),
        ("next_token", {"train_on": "last_turn"}, "train_on is of conversations; it has no effect with objective next_token"),
        ("sft", {"train_on": "user"}, "train_on"),
        ("sft", {"train_on": "all", "sources": [], "store": "x"}, "train_on is for sources; data in store is used as it is"),
    ],
)
def test_it_is_refused_where_it_has_no_effect(objective: str, data: dict[str, Any], message: str) -> None:
    base = {"sources": [{"name": "none", "adapter": "text"}], "sequence_length": 32}
    with pytest.raises(ValueError, match=message):
        small_stage(objective, data=base | data)


def test_data_prepared_before_it_was_there_is_found_again() -> None:
    assert "train_on" not in small_stage("sft").data.determining("data")
    assert (
        small_stage("sft", data=small_stage("sft").data.model_dump() | {"train_on": "all"}).data.determining("data")["train_on"]
        == "all"
    )
