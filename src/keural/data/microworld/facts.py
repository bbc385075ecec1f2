"""Facts to look up: who lives where or likes what, told in the question itself.

The person and value of a held-out fact occur together in no training text at all, neither stated nor in one context.
"""

from itertools import product
from random import Random

from keural.data.microworld import korean
from keural.data.microworld.content import Fact, Split, facts, is_held_out
from keural.data.microworld.exercise import Answer, Exercise, Language, Task, korean_prompt

# {p} and {q} are persons, {v} and {w} what is told of them; the question is about {p}, who is told of first or second.
_KOREAN_QUESTION = {
    "lives": ("{p은} 어디에 살아요?", "{p은} 어디에 살아?"),
    "likes": ("{p은} 무엇을 좋아해요?", "{p은} 무엇을 좋아해?"),
}
_ENGLISH_QUESTION = {"lives": "Where does {p} live?", "likes": "What does {p} like?"}


def _korean_predicate(fact: Fact, ending: str) -> str:
    """'lives in Seoul' / 'likes music' with an ending: 고 (and), 다 (plain), 요 (polite), 어 (blunt)."""
    if fact.relation == "lives":
        return f"{fact.value[1]}에 " + {"고": "살고", "다": "산다", "요": "살아요", "어": "살아"}[ending]
    thing = korean.with_particle(fact.value[1], "을")
    return f"{thing} " + {"고": "좋아하고", "다": "좋아한다", "요": "좋아해요", "어": "좋아해"}[ending]


def _korean(fact: Fact, ending: str) -> str:
    return f"{korean.with_particle(fact.person[1], '은')} {_korean_predicate(fact, ending)}"


def _english(fact: Fact) -> str:
    return f"{fact.person[0]} {'lives in' if fact.relation == 'lives' else 'likes'} {fact.value[0]}"


def _draw(rng: Random, split: Split) -> tuple[Fact, Fact]:
    """A fact of the split and another of the same relation, such that no one and nothing of the second belongs to held-out content."""
    fact: Fact = rng.choice(facts(split))
    while True:
        other: Fact = rng.choice(facts("train"))
        if other.relation != fact.relation or other.person == fact.person or other.value == fact.value:
            continue
        crossed = [Fact(fact.relation, *pair) for pair in product((fact.person, other.person), (fact.value, other.value))]
        if not any(is_held_out(mixed) for mixed in crossed if mixed != fact):
            return fact, other


def _told(rng: Random, one: Fact, other: Fact, language: Language, ending: str) -> str:
    """Both facts in random order, as one sentence or two."""
    first, second = rng.sample([one, other], 2)
    joined = rng.random() < 0.5
    if language == "ko":
        return (
            f"{_korean(first, '고')} {_korean(second, ending)}."
            if joined
            else f"{_korean(first, ending)}. {_korean(second, ending)}."
        )
    return f"{_english(first)} and {_english(second)}." if joined else f"{_english(first)}. {_english(second)}."


def _exercise(rng: Random, split: Split, language: Language) -> Exercise:
    fact, other = _draw(rng, split)
    crossed = Fact(fact.relation, fact.person, other.value)
    if language == "ko":
        question, polite = korean_prompt(rng, (_KOREAN_QUESTION[fact.relation],))
        question = question.replace("{p은}", korean.with_particle(fact.person[1], "은"))
        prompt = f"{_told(rng, fact, other, 'ko', '요' if polite else '어')} {question}"
        right, wrong = (Answer(_korean(f, "요") + ".", _korean(f, "어") + ".") for f in (fact, crossed))
        return Exercise("facts", language, prompt, polite, right, (wrong,))
    prompt = f"{_told(rng, fact, other, 'en', '')} {_ENGLISH_QUESTION[fact.relation].format(p=fact.person[0])}"
    right, wrong = (Answer.english(_english(f) + ".") for f in (fact, crossed))
    return Exercise("facts", language, prompt, True, right, (wrong,))


def _consequence(fact: Fact, language: Language) -> str:
    """What follows from the fact."""
    person, value = (part[language == "ko"] for part in (fact.person, fact.value))
    if language == "ko":
        return (
            f"{person}의 집은 {value}에 있다."
            if fact.relation == "lives"
            else f"{korean.with_particle(person, '은')} {value} 이야기를 자주 한다."
        )
    return f"{person}'s home is in {value}." if fact.relation == "lives" else f"{person} often talks about {value}."


def _prose(rng: Random, split: Split, language: Language, parallel: bool) -> str:
    """Two facts and what follows from each, in random order; in parallel texts the facts once more in the other language."""
    fact, other = _draw(rng, split)
    told = _told(rng, fact, other, language, "다")
    facts_again = rng.sample([fact, other], 2)
    if not parallel:
        return " ".join([told, *(_consequence(again, language) for again in facts_again)])
    return " ".join([told, *(f"{_english(again)}." if language == "ko" else f"{_korean(again, '다')}." for again in facts_again)])


FACTS = Task("facts", _exercise, _prose)
