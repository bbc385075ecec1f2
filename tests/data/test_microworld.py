"""The micro-world: correct Korean and English, and held-out content that no training row of the toy recipe contains."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keural import microworld
from keural.errors import UserError
from keural.microworld import english, korean
from keural.microworld.content import PEOPLE, PLACES, THINGS, Verb, clauses, profiles, sums
from keural.recipe import Recipe, load_recipe

TOY = Path(__file__).resolve().parents[2] / "recipes" / "toy"
NUMBERS = {
    language: re.compile("|".join(sorted(map(number, range(20, 100)), key=len, reverse=True)))
    for language, number in (("ko", korean.number), ("en", english.number))
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TOY)


def training_rows(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Every row that any stage of the toy recipe, or its tokenizer, is trained on."""
    sources = [*recipe.spec.tokenizer.sources, *(source for stage in recipe.stages for source in stage.data.sources)]
    for source in sources:
        yield from microworld.rows(source.options, recipe.spec.seed)


def exchanges(row: dict[str, Any]) -> list[str]:
    """The texts of a row in which a held-out item could stand: the prompt with each of its answers, or each line of prose."""
    if "text" in row:
        return [row["text"]]
    prompt = " ".join(message["content"] for message in row["messages"])
    return [f"{prompt} {row[side]}" for side in ("chosen", "rejected")] if "chosen" in row else [prompt]


@pytest.fixture(scope="module")
def training_texts(recipe: Recipe) -> list[str]:
    return [text for row in training_rows(recipe) for text in exchanges(row)]


def test_no_training_row_has_the_prompt_of_a_heldout_item(recipe: Recipe, training_texts: list[str]) -> None:
    assert recipe.spec.evaluation.exact_match is not None
    items = microworld.heldout_items(recipe.spec.evaluation.exact_match.items_per_task, recipe.spec.seed)
    everything = "\n".join(training_texts)
    for item in items:
        assert item.prompt not in everything


def test_no_training_statement_has_both_operands_and_the_total_of_a_heldout_sum(training_texts: list[str]) -> None:
    for language, module in (("ko", korean), ("en", english)):
        held = {frozenset(map(module.number, (s.first, s.second, s.total))) for s in sums("heldout")}
        for text in training_texts:
            if text.count(": ") >= 5:
                continue  # a list of words with their translations
            found = NUMBERS[language].findall(text)  # statements, and questions with their answers, have three numbers each
            for start in range(0, len(found), 3):
                assert frozenset(found[start : start + 3]) not in held, text


def test_no_training_sentence_has_subject_verb_and_object_of_a_heldout_clause(training_texts: list[str]) -> None:
    held = {(clause.subject.english, clause.verb.english, clause.object.english) for clause in clauses("heldout")}
    everything = [*clauses("train"), *clauses("heldout")]
    subjects = {word: c.subject.english for c in everything for word in (c.subject.english, c.subject.korean)}
    objects = {word: c.object.english for c in everything for word in (c.object.english, c.object.korean)}
    verbs = {form: c.verb.english for c in everything for form in verb_forms(c.verb)}
    finders = [(re.compile(pattern(words)), words) for words in (subjects, verbs, objects)]
    for text in training_texts:
        for sentence in re.split(r"(?<=[.?]) ", text):
            found = [{words[match] for match in finder.findall(sentence)} for finder, words in finders]
            if all(found):
                assert not held & set(itertools.product(*found)), sentence


def verb_forms(verb: Verb) -> tuple[str, ...]:
    return (verb.english, verb.present, verb.past, verb.stem, verb.plain, verb.informal, verb.past_stem)


def pattern(words: Iterable[str]) -> str:
    """Any of the words: English ones whole, Korean ones at the start of a word (endings and particles follow)."""
    return "|".join(rf"\b{word}\b" if word.isascii() else rf"(?<![가-힣]){word}" for word in sorted(words, key=len, reverse=True))


def test_no_training_row_has_person_place_and_thing_of_a_heldout_profile(training_texts: list[str]) -> None:
    held = {(profile.person, profile.place, profile.thing) for profile in profiles("heldout")}
    assert held
    endings = ("", "", r"(?:을|를| 이야기)")  # 산 is a mountain, 산다 is to live
    finders = [
        {entry: re.compile(f"{pattern([entry[0]])}|{pattern([entry[1]])}{ending}") for entry in entries}
        for entries, ending in zip((PEOPLE, PLACES, THINGS), endings, strict=True)
    ]
    for text in training_texts:
        found = [{entry for entry, finder in finder.items() if finder.search(text)} for finder in finders]
        if all(found):
            assert not held & set(itertools.product(*found)), text


def test_content_is_held_out_alike_for_every_seed() -> None:
    for content in (sums, clauses, profiles):
        assert content("heldout")
        assert not set(content("heldout")) & set(content("train"))


def test_sums_are_right_in_both_languages() -> None:
    assert (korean.number(23), korean.number(90), english.number(45)) == ("이십삼", "구십", "forty-five")
    items = [item for item in microworld.heldout_items(40, 3) if item.task == "arithmetic" and item.language == "ko"]
    words = {korean.number(value): value for value in range(20, 100)}
    for item in items:
        found = re.findall("|".join(sorted(words, key=len, reverse=True)), item.prompt)
        total = korean.number(sum(words[word] for word in found))
        assert item.answers[0] == korean.is_noun(total, polite=True) + "."


@pytest.mark.parametrize(
    ("answer", "polite"),
    [
        ("육십팔이에요.", True),
        ("책을 읽습니다.", True),
        ("책을 읽어.", False),
        ("구십구야.", False),
        ("", False),
        ("It is ten.", False),
    ],
)
def test_politeness_is_read_from_the_ending(answer: str, polite: bool) -> None:
    assert microworld.is_polite(answer) is polite


def test_particles_follow_the_final_consonant() -> None:
    assert [korean.with_particle(word, "을") for word in ("책", "사과")] == ["책을", "사과를"]
    assert [korean.with_particle(word, "은") for word in ("서준", "유나")] == ["서준은", "유나는"]
    assert [korean.is_noun("책", polite) for polite in (True, False)] == ["책이에요", "책이야"]


def test_every_korean_item_has_a_polite_and_a_blunt_answer_and_every_chosen_answer_is_polite() -> None:
    for item in microworld.heldout_items(30, 1):
        if item.language == "ko":
            assert [microworld.is_polite(answer) for answer in item.answers] == [True, False]
    for pair in microworld.heldout_pairs(80, 1):
        assert pair.chosen != pair.rejected
        assert pair.language == "en" or microworld.is_polite(pair.chosen)


def test_rows_depend_on_options_and_seed_only() -> None:
    options = {"part": "instructions", "count": 50, "phase": 2}
    assert list(microworld.rows(options, 1)) == list(microworld.rows(options, 1))
    assert list(microworld.rows(options, 1)) != list(microworld.rows(options, 2))
    assert list(microworld.rows(options, 1)) != list(microworld.rows(options | {"phase": 3}, 1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"part": "prose", "count": 1, "from": ["plain"]}, "did you mean 'forms'"),
        ({"part": "prosa", "count": 1}, "did you mean 'prose'"),
        ({"part": "prose", "count": "many"}, "count"),
        ({"part": "prose", "count": 1, "register": "polite"}, "register"),
        ({"part": "prose", "count": 1, "tasks": []}, "tasks"),
        ({"count": 1}, "part"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        list(microworld.rows(options, 0))
