"""The micro-world: correct Korean and English, and held-out content that no training row of the toy recipe contains."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from keural import microworld
from keural.errors import UserError
from keural.microworld import english, korean
from keural.microworld.content import PEOPLE, PLACES, THINGS, Verb, clauses, profiles, sums
from keural.microworld.smalltalk import talks
from keural.recipe import Recipe, load_recipe

TOY = Path(__file__).resolve().parents[2] / "recipes" / "toy"
KOREAN, ENGLISH = (
    "|".join([*sorted(map(number, range(1, 100)), key=len, reverse=True), "[0-9]+"]) for number in (korean.number, english.number)
)
ADDITIONS = [
    re.compile(form.format(n=rf"({numbers})"))
    for numbers, forms in (
        (KOREAN, (r"\b{n} 더하기 {n}[은는]", r"\b{n}에 {n}[을를] 더하면", r"\b{n}[과와] {n}의 합")),
        (ENGLISH, (r"\b{n} plus {n}\b", r"\b[Aa]dd {n} to {n}\b", r"\bsum of {n} and {n}\b", r"\b{n} ?[+] ?{n}\b")),
    )
    for form in forms
]
"""Every way in which the world adds two numbers."""
NUMBERS = re.compile(rf"\b(?:{ENGLISH})\b|(?<![가-힣])(?:{KOREAN})")
VALUES = {str(value): value for value in range(100)} | {
    number(value): value for number in (korean.number, english.number) for value in range(1, 100)
}

SMALL_SUMS = [(a, b) for a in range(1, 20) for b in range(1, 20) if a + b <= 20 or max(a, b) <= 12]
"""What is learnt by heart, in both orders."""


def additions(text: str) -> list[tuple[int, int]]:
    """The pairs of numbers that a text adds, the smaller one first."""
    found = [match for form in ADDITIONS for match in form.findall(text)]
    return [(min(pair), max(pair)) for pair in ((VALUES[a], VALUES[b]) for a, b in found)]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TOY)


@pytest.fixture(scope="module")
def rows_of_stages(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Every row that each stage of the toy recipe draws."""
    sources = {stage.name: stage.data.sources for stage in recipe.stages}
    return {
        stage: [row for source in of_stage for row in microworld.rows(source.options, recipe.spec.seed)]
        for stage, of_stage in sources.items()
    }


@pytest.fixture(scope="module")
def training_rows(recipe: Recipe, rows_of_stages: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every row that any stage of the toy recipe, or its tokenizer, is trained on."""
    rows = [row for source in recipe.spec.tokenizer.sources for row in microworld.rows(source.options, recipe.spec.seed)]
    return [*rows, *itertools.chain.from_iterable(rows_of_stages.values())]


def exchanges(row: dict[str, Any]) -> list[str]:
    """The texts of a row in which a held-out item could stand: the prompt with each of its answers, or each line of prose."""
    if "text" in row:
        return [row["text"]]
    prompt = " ".join(message["content"] for message in row["messages"])
    return [f"{prompt} {row[side]}" for side in ("chosen", "rejected")] if "chosen" in row else [prompt]


@pytest.fixture(scope="module")
def training_texts(training_rows: list[dict[str, Any]]) -> list[str]:
    return [text for row in training_rows for text in exchanges(row)]


def test_no_training_row_has_the_prompt_of_a_heldout_item(recipe: Recipe, training_rows: list[dict[str, Any]]) -> None:
    assert recipe.spec.evaluation.exact_match is not None
    items = microworld.heldout_items(recipe.spec.evaluation.exact_match.items_per_task, recipe.spec.seed)
    assert len(items) == len(microworld.TASKS) * recipe.spec.evaluation.exact_match.items_per_task
    told = {row["text"] if "text" in row else row["messages"][0]["content"] for row in training_rows}
    for item in items:
        document = microworld.as_document(item.prompt, item.language)
        forms = [f"{asked} {answer}" for asked in (item.prompt, document) for answer in item.answers]
        assert not told & {item.prompt, *forms}


def test_no_training_row_adds_the_numbers_of_a_heldout_sum(training_texts: list[str]) -> None:
    held = {(content.first, content.second) for content in sums("heldout")}
    adding = [text for text in training_texts if re.search(r"더하|의 합|plus|[Aa]dd |sum of|[+]", text) and text.count(": ") < 5]
    found = [additions(text) for text in adding]
    assert all(found), "every form is known here"
    assert not held & {pair for pairs in found for pair in pairs}
    assert {(7, 12), (8, 9), (1, 19), (23, 45)} <= {pair for pairs in found for pair in pairs} | held


def test_small_sums_are_learnt_by_heart_and_asked_in_words_that_no_training_row_has(training_rows: list[dict[str, Any]]) -> None:
    assert not [content for content in sums("heldout") if content.second < 20]
    assert {(c.first, c.second) for c in sums("train") if c.second < 20} == {(a, b) for a, b in SMALL_SUMS if a <= b}
    items = [item for item in microworld.heldout_items(120, 1) if item.task == "arithmetic"]
    for item in items:
        (pair,) = additions(item.prompt + ("는" if item.language == "ko" and item.prompt[-1] not in "?." else ""))
        totals = {str(sum(pair)), english.number(sum(pair)), korean.number(sum(pair))}
        assert any(re.search(rf"\b{total}(?:[.]|이?[에예]요)", item.answers[0]) for total in totals), item
    small = {stripped(item.prompt) for item in items if max(additions(item.prompt) or [(99, 99)])[1] < 20}
    assert len(small) > 20
    assert not small & {stripped(row["messages"][0]["content"]) for row in training_rows if "messages" in row}


def test_every_small_sum_is_drilled_in_words_and_in_digits_in_both_languages(
    rows_of_stages: dict[str, list[dict[str, Any]]],
) -> None:
    """Of equal rows of a stage one is kept, however often it is drawn, so what is drilled has to be asked in many ways."""
    seen: Counter[tuple[str, bool, int, int]] = Counter()
    for rows in rows_of_stages.values():
        chats = {(row["language"], *exchanges(row)) for row in rows if row.get("task") == "arithmetic" and "chosen" not in row}
        seen.update((language, bool(re.search("[0-9]", text)), *operands(text)) for language, text in chats)
    drilled = [seen[(language, digits, a, b)] for language in ("ko", "en") for digits in (True, False) for a, b in SMALL_SUMS]
    assert min(drilled) >= 5
    assert sum(drilled) / len(drilled) > 20
    assert sum(drilled) > 0.6 * seen.total(), "the others follow from the sums of their digits"


def test_every_stage_of_chats_has_all_that_people_type_first(rows_of_stages: dict[str, list[dict[str, Any]]]) -> None:
    """One wording among hundreds was in one chat of a stage or in none: "Hello!" was answered in Korean."""
    plain = {talk.text for talk in talks("train") if talk.is_plain}
    assert {"Hello!", "안녕하세요!", "who are you?", "누구세요?", "thanks", "고마워요."} <= plain
    for stage in ("sft-1", "sft-2", "sft-3"):
        assert plain <= {row["messages"][0]["content"] for row in rows_of_stages[stage]}, stage
    for options in ({"part": "instructions"}, {"part": "prose"}):
        rows = list(microworld.rows({**options, "count": 200, "tasks": ["plain_smalltalk"]}, 1))
        said = [row["messages"][0]["content"] if "messages" in row else row["text"] for row in rows]
        assert all(any(text.startswith(words) for words in plain) for text in said)
        assert not [text for text in said if re.search("Keural[.!]|my friend|케우랄[.!]?$|친구야", text)]


def test_no_pair_prefers_one_english_greeting_to_another(rows_of_stages: dict[str, list[dict[str, Any]]]) -> None:
    """There is no register to choose, and what is rejected to one greeting is right to another: it cost "Hello!" its answer."""
    pairs = [row for rows in rows_of_stages.values() for row in rows if row.get("task") == "smalltalk" and "chosen" in row]
    assert pairs
    assert {row["language"] for row in pairs} == {"ko"}
    of_register = [row for row in pairs if not microworld.is_polite(row["rejected"])]
    assert len(of_register) > 0.7 * len(pairs), "and no Korean one to another, as a rule"


def operands(text: str) -> tuple[int, int]:
    """The two numbers that a question adds, as they stand in it."""
    (pair,) = {pair for form in ADDITIONS for pair in form.findall(text)}
    return VALUES[pair[0]], VALUES[pair[1]]


@pytest.mark.parametrize(("task", "is_small"), [("small_sums", True), ("large_sums", False)])
def test_parts_of_arithmetic_are_drawn_apart(task: str, is_small: bool) -> None:
    chats = microworld.rows({"part": "instructions", "count": 200, "tasks": [task]}, 1)
    texts = [row["messages"][0]["content"] for row in chats]
    texts += [
        row["text"] for row in microworld.rows({"part": "prose", "count": 100, "tasks": [task], "forms": ["plain", "parallel"]}, 1)
    ]
    found = {pair for text in texts for pair in additions(text)}
    assert len(found) > 50
    assert all((larger < 20) == is_small for _, larger in found)


def stripped(question: str) -> str:
    """As it is typed in haste."""
    return question.lower().rstrip("?.= ")


def test_what_is_asked_in_digits_is_answered_in_digits_and_words_in_words() -> None:
    items = [item for item in microworld.heldout_items(120, 2) if item.task == "arithmetic"]
    for item in items:
        assert bool(re.search("[0-9]", item.prompt)) == bool(re.search("[0-9]", item.answers[0]))
    bare = [item for item in items if not re.search("[A-Za-z가-힣]", item.prompt)]
    assert bare
    assert all(re.fullmatch(r"[0-9]+[.]", item.answers[0]) for item in bare)


def share_of(split: str, found: Callable[[str], bool]) -> float:
    """The share of a thousand questions about sums, of training or held out, that `found` finds."""
    options = {"part": "instructions", "count": 1000, "tasks": ["arithmetic"], "split": split}
    return sum(found(row["messages"][0]["content"]) for row in microworld.rows(options, 1)) / 1000


def test_training_drills_what_is_learnt_late_and_the_questions_do_not_ask_it_more_often() -> None:
    def is_small(question: str) -> bool:
        return all(VALUES[number] < 20 for number in NUMBERS.findall(question))

    def is_in_digits(question: str) -> bool:
        return bool(re.search("[0-9]", question))

    assert (share_of("train", is_small), share_of("train", is_in_digits)) == pytest.approx((0.5, 0.35), abs=0.05)
    assert (share_of("heldout", is_small), share_of("heldout", is_in_digits)) == pytest.approx((0.3, 0.25), abs=0.05)


def test_small_talk_is_answered_in_its_language_and_tells_what_the_model_is() -> None:
    rows = list(microworld.rows({"part": "instructions", "count": 400, "tasks": ["smalltalk"]}, 1))
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        assert bool(re.search("[가-힣]", asked)) == bool(re.search("[가-힣]", answer)) == (row["language"] == "ko")
    answers = {row["messages"][1]["content"] for row in rows}
    assert {"I am Keural, a small language model.", "저는 작은 언어 모델 케우랄이에요."} <= answers
    said = {talk.text for talk in talks("train")}  # what people type first is never held out
    assert {"hello", "Hello!", "안녕", "안녕하세요", "Who are you?", "누구세요?", "Thanks!", "고마워요"} <= said


def test_no_training_sentence_has_subject_verb_and_object_of_a_heldout_clause(training_texts: list[str]) -> None:
    held = {(clause.subject.english, clause.verb.english, clause.object.english) for clause in clauses("heldout")}
    everything = [*clauses("train"), *clauses("heldout")]
    subjects = {word: c.subject.english for c in everything for word in (c.subject.english, c.subject.korean)}
    objects = {word: c.object.english for c in everything for word in (c.object.english, c.object.korean)}
    verbs = {form: c.verb.english for c in everything for form in verb_forms(c.verb)}
    finders = [(re.compile(pattern(words)), words) for words in (subjects, verbs, objects)]
    seen = 0
    for sentence in {sentence for text in training_texts for sentence in re.split(r"(?<=[.?]) ", text)}:
        found: list[set[str]] = []
        for finder, words in finders:
            found.append({words[match] for match in finder.findall(sentence)})
            if not found[-1]:
                break
        else:
            seen += 1
            assert not held & set(itertools.product(*found)), sentence
    assert seen > 1000


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
    someone = re.compile(pattern([name for person in PEOPLE for name in person]))
    told = [text for text in set(training_texts) if someone.search(text)]
    assert len(told) > 1000
    for text in told:
        found = [{entry for entry, finder in finder.items() if finder.search(text)} for finder in finders]
        if all(found):
            assert not held & set(itertools.product(*found)), text


def test_content_is_held_out_alike_for_every_seed() -> None:
    for content in (sums, clauses, profiles, talks):
        assert content("heldout")
        assert not set(content("heldout")) & set(content("train"))


def test_numbers_are_right_in_both_languages() -> None:
    assert [korean.number(value) for value in (7, 10, 12, 23, 90)] == ["칠", "십", "십이", "이십삼", "구십"]
    assert [english.number(value) for value in (7, 10, 12, 19, 20, 45)] == [
        "seven",
        "ten",
        "twelve",
        "nineteen",
        "twenty",
        "forty-five",
    ]
    for number in (korean.number, english.number):
        assert len({number(value) for value in range(1, 100)}) == 99


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
