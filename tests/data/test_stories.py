"""Stories of the micro-world: distinct, the same for a seed, correct in both languages, and none that is held out in training."""

import re
from typing import Any

import pytest

from keural import microworld
from keural.data.adapters.microworld import ADAPTERS
from keural.data.records import Conversation
from keural.microworld import korean
from keural.microworld.stories import stories
from keural.recipe import SourceSpec

COUNT = 1200
PLOTS = 12


def told(part: str, count: int = COUNT, seed: int = 1, **options: Any) -> list[dict[str, Any]]:
    return list(microworld.rows({"part": part, "count": count, "tasks": ["stories"], **options}, seed))


@pytest.fixture(scope="module")
def prose() -> dict[str, list[str]]:
    rows = told("prose")
    return {language: [row["text"] for row in rows if row["language"] == language] for language in microworld.LANGUAGES}


def test_stories_are_the_same_for_a_seed_and_other_ones_for_another() -> None:
    assert told("prose", 50) == told("prose", 50)
    assert not {row["text"] for row in told("prose", 50)} & {row["text"] for row in told("prose", 50, seed=2)}


def test_no_story_is_told_twice_nor_as_another_with_other_names(prose: dict[str, list[str]]) -> None:
    """What is left when nouns are the same for all is the structure: which lines are told, in which order."""
    for texts in prose.values():
        assert len(set(texts)) == len(texts)
    names = "|".join(
        sorted({word for story in stories("train") for word in (story.hero, story.friend, story.thing.english)}, key=len)[::-1]
    )
    structures = {
        re.sub(rf"\b(?:the |a |an )?(?:{names})\b|\b(?:he|she|his|her|him)\b", "_", text, flags=re.I) for text in prose["en"]
    }
    assert len(structures) > 0.99 * len(prose["en"])


def test_no_training_row_tells_a_held_out_story() -> None:
    assert len(stories("train")) > 10_000
    held = set(stories("heldout"))
    assert 0.1 < len(held) / len(stories("train")) < 0.25
    assert not held & set(stories("train"))
    assert len({story.plot for story in held}) == len({story.plot for story in stories("train")}) == PLOTS
    shown = {row["text"] for row in told("prose", languages=["en"])}
    for row in told("prose", 300, split="heldout", languages=["en"]):
        assert row["text"] not in shown


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_drawn_story_is_of_its_split(split: str) -> None:
    """Read back from the text: nobody else's name and no other thing stands in a story of somebody, a friend and a thing."""
    things: dict[tuple[str, ...], list[str]] = {}
    for story in stories("train" if split == "train" else "heldout"):
        things.setdefault((story.hero, story.friend), []).append(story.thing.english)
    for row in told("instructions", 300, split=split, languages=["en"]):
        prompt, answer = (message["content"] for message in row["messages"])
        if found := re.fullmatch(r"Tell me a story about (?:an? )?(\w+) and (?:an? )?(\w+)[.]", prompt):
            assert any(thing in answer for thing in things[found.groups()]), (prompt, answer)


def test_every_slot_and_ending_is_filled(prose: dict[str, list[str]]) -> None:
    for texts in (*prose.values(), [m["content"] for row in told("instructions", 1000) for m in row["messages"]]):
        assert not [text for text in texts if re.search(r"[{}~_]|\ba [aeiou]|\ban [^aeiou]|  ", text)]
        assert all(re.fullmatch(r'[A-Z가-힣"].*[.?!"]', text) for text in texts)
    assert not [text for text in prose["en"] if re.search(r"[.]\"? [a-z]|[?!] [a-z]", text)]
    assert not [text for text in prose["en"] if re.search("[가-힣]", text)]
    assert not [text for text in prose["ko"] if re.search("[A-Za-z]", text)]


def test_korean_particles_follow_every_noun_of_a_story(prose: dict[str, list[str]]) -> None:
    nouns = {story.thing.korean for story in stories("train")} | {"토끼", "곰", "여우", "양", "민수", "지훈", "사슴"}
    wrong = {True: "[는가를와]", False: "[은이을과]"}
    seen = 0
    for noun in nouns:
        after = wrong[korean.ends_in_consonant(noun)]
        pattern = re.compile(
            rf"(?<![가-힣]){noun}(?:{after}|{'예요|였' if korean.ends_in_consonant(noun) else '이[었라]'})(?= |[.])"
        )
        assert not [text for text in prose["ko"] if pattern.search(text)], noun
        seen += sum(noun in text for text in prose["ko"])
    assert seen > len(prose["ko"])


def test_a_korean_story_is_told_in_the_register_in_which_it_is_asked_for() -> None:
    for row in told("instructions", 400, languages=["ko"]):
        prompt, answer = (message["content"] for message in row["messages"])
        outside = re.sub(r'"[^"]*"', "", answer)
        polite = microworld.is_polite(prompt)
        assert all(sentence.endswith("어요" if polite else "어") for sentence in re.findall(r"([가-힣]+)[.]", outside)), answer
    assert all(text.endswith("다.") for text in (row["text"] for row in told("prose", 100, languages=["ko"])))


def test_parallel_stories_are_the_same_in_both_languages() -> None:
    for row in told("prose", 200, forms=["parallel"], languages=["ko"]):
        first, second = row["text"].split("\n\n")
        assert re.search("[가-힣]", first)
        assert not re.search("[A-Za-z]", first)
        assert not re.search("[가-힣]", second)
        for english_name, name in (("rabbit", "토끼"), ("bear", "곰"), ("Minsu", "민수"), ("umbrella", "우산")):
            assert (name in first) == (english_name in second) or name == "곰"


def test_a_pair_prefers_the_story_in_order() -> None:
    for row in told("pairs", 50, contrasts=["wrong"]):
        assert row["chosen"] != row["rejected"]
        assert sorted(row["chosen"].split()) == sorted(row["rejected"].split())


def test_a_story_is_held_out_by_what_it_tells_not_by_what_all_are_asked_in() -> None:
    source = SourceSpec(name="stories", adapter="microworld", options={"part": "instructions", "count": 1})
    for row in told("instructions", 20):
        record = ADAPTERS["microworld"].convert(row, source, "here")
        assert isinstance(record, Conversation)
        assert record.origin == record.messages[-1].content
    other = next(microworld.rows({"part": "instructions", "count": 1}, 1))
    record = ADAPTERS["microworld"].convert(other, source, "here")
    assert isinstance(record, Conversation)
    assert record.origin is None
