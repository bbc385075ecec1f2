"""Rows of instructions, and how an answer is judged strictly and loosely."""

import time
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate.verifiers import IFEVAL, IFEVAL_KO, KOREAN, parse_instructions, verdicts


def follows(kind: str, answer: str, **arguments: Any) -> tuple[bool, bool]:
    registry = IFEVAL if kind in IFEVAL else KOREAN
    found = verdicts(registry, parse_instructions(registry, [kind], [arguments], "row"), answer)
    return found.all_strict, found.all_loose


@pytest.mark.parametrize(
    ("kinds", "arguments", "words"),
    [
        (["startend:quote"], [{}], ["row 3", "startend:quote", "startend:quotation"]),
        (["startend:quotation"], [], ["row 3", "1 instructions with 0"]),
        (["startend:quotation"], [{"end_phrase": "x"}], ["no argument 'end_phrase'"]),
        (["startend:end_checker"], [{"end_phrase": None}], ["lacks 'end_phrase'"]),
        (["startend:end_checker"], [{"end_phrase": 7}], ["end_phrase: 7 is not a text"]),
        (["length_constraints:number_words"], [{"num_words": "ten", "relation": "at least"}], ["not a whole number"]),
        (["length_constraints:number_words"], [{"num_words": True, "relation": "at least"}], ["not a whole number"]),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], ["about", "less than"]),
        (["keywords:existence"], [{"keywords": "cat"}], ["not a list of texts"]),
        (["keywords:existence"], [{"keywords": []}], ["not a list of texts"]),
    ],
)
def test_an_impossible_row_is_refused_by_name(kinds: list[str], arguments: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse_instructions(IFEVAL, kinds, arguments, "row 3")
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_rows_may_name_the_language_and_leave_gaps() -> None:
    row = {"num_words": 4.0, "relation": "at least", "keywords": None}
    (instruction,) = parse_instructions(IFEVAL, ["en:length_constraints:number_words"], [row], "row")
    assert instruction.arguments == {"num_words": 4, "relation": "at least"}


def test_loose_forgives_an_introduction_a_farewell_and_bold_print() -> None:
    assert follows("startend:quotation", 'Sure:\n"Yes."') == (False, True)
    assert follows("startend:end_checker", "All good.\nBye", end_phrase="good.") == (False, True)
    assert follows("startend:quotation", 'Sure:\n**"Yes."**\nBye') == (False, True)
    assert follows("startend:quotation", '**"Yes."**') == (False, True)
    assert follows("startend:quotation", 'It is "yes".') == (False, False)


def test_an_empty_answer_follows_nothing() -> None:
    assert follows("punctuation:no_comma", "  \n") == (False, False)
    assert follows("marks:no_comma", "") == (False, False)


def test_a_sign_is_counted_where_a_letter_is_asked_for() -> None:
    assert follows("keywords:letter_frequency", "Yes! Yes!", letter="!", let_frequency=2, let_relation="at least") == (True, True)
    assert follows("keywords:letter_frequency", "Yes!", letter="!", let_frequency=2, let_relation="at least") == (False, False)


def test_a_keyword_is_a_text_and_not_an_expression() -> None:
    assert follows("keywords:existence", "I like C++.", keywords=["C++"])[0]
    assert not follows("keywords:existence", "I like CCC.", keywords=["C++"])[0]


def test_korean_rows_know_particles_sentences_and_decomposed_letters() -> None:
    def strict(kind: str, arguments: dict[str, Any], answer: str) -> bool:
        return verdicts(IFEVAL_KO, parse_instructions(IFEVAL_KO, [kind], [arguments], "row"), answer).all_strict

    assert not strict("keywords:forbidden_words", {"forbidden_words": ["고양이"]}, "고양이를 봤다.")
    assert strict("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "2024. 3. 5.에 만났다.")
    assert strict("keywords:existence", {"keywords": ["각자"]}, "\u1100\u1161\u11a8자 가자.")
    assert "change_case:english_capital" not in IFEVAL_KO


@pytest.mark.parametrize("piece", ["a", ".", "\n", "* ", "[", "<<", ">>", "가. ", "“가", "\n\n* ", "| ", "- ", '"', "단계 "])
def test_degenerate_answers_are_judged_at_once(piece: str) -> None:
    arguments: dict[str, dict[str, Any]] = {
        "detectable_format:number_bullet_lists": {"num_bullets": 2},
        "detectable_format:title": {},
        "detectable_content:number_placeholders": {"num_placeholders": 2},
        "length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"},
        "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
        "speech:polite": {},
        "length:sentences": {"count": 3, "relation": "exactly"},
        "form:sections": {"word": "단계", "count": 2},
        "form:acrostic": {"word": "가나"},
    }
    answer = piece * (6000 // len(piece))
    begun = time.process_time()
    for kind, given in arguments.items():
        follows(kind, answer, **given)
    assert time.process_time() - begun < 2
