"""Facts to look up: where someone lives and what they like, told in the question itself."""

from random import Random
from typing import Literal

from keural.microworld import korean
from keural.microworld.content import PLACES, THINGS, Profile, Split, is_held_out, profiles
from keural.microworld.exercise import Answer, Exercise, Language, Task, korean_prompt

Ending = Literal["고", "다", "요", "어"]
Relation = Literal["lives", "likes"]

# Korean predicates: 고 joins to the next one, 다 is the written plain style, 요 polite, 어 blunt.
_LIVES = {"고": "살고", "다": "산다", "요": "살아요", "어": "살아"}
_LIKES = {"고": "좋아하고", "다": "좋아한다", "요": "좋아해요", "어": "좋아해"}
_KOREAN_QUESTIONS = {
    "lives": (("{p은} 어디에 살아요?", "{p은} 어디에 살아?"), ("{p의} 집은 어디에 있어요?", "{p의} 집은 어디에 있어?")),
    "likes": (("{p은} 무엇을 좋아해요?", "{p은} 무엇을 좋아해?"), ("{p이} 좋아하는 것은 뭐예요?", "{p이} 좋아하는 것은 뭐야?")),
}
_ENGLISH_QUESTIONS = {
    "lives": ("Where does {p} live?", "Where is {p}'s home?"),
    "likes": ("What does {p} like?", "Tell me what {p} likes."),
}


def _korean_fact(profile: Profile, relation: Relation, ending: Ending) -> str:
    """The predicate: 부산에 산다, 음악을 좋아한다."""
    if relation == "lives":
        return f"{profile.place[1]}에 {_LIVES[ending]}"
    return f"{korean.with_particle(profile.thing[1], '을')} {_LIKES[ending]}"


def _english_fact(profile: Profile, relation: Relation) -> str:
    return f"lives in {profile.place[0]}" if relation == "lives" else f"likes {profile.thing[0]}"


def _fact(profile: Profile, relation: Relation, language: Language, ending: Ending = "다") -> str:
    """One sentence with one fact."""
    if language == "ko":
        return f"{korean.with_particle(profile.person[1], '은')} {_korean_fact(profile, relation, ending)}."
    return f"{profile.person[0]} {_english_fact(profile, relation)}."


def _told(rng: Random, profile: Profile, language: Language, ending: Ending = "다") -> str:
    """One sentence with both facts in random order."""
    order: list[Relation] = ["lives", "likes"]
    first, second = rng.sample(order, 2)
    if language == "ko":
        facts = f"{_korean_fact(profile, first, '고')} {_korean_fact(profile, second, ending)}"
        return f"{korean.with_particle(profile.person[1], '은')} {facts}."
    return f"{profile.person[0]} {_english_fact(profile, first)} and {_english_fact(profile, second)}."


def _answer(profile: Profile, relation: Relation, language: Language) -> Answer:
    if language == "ko":
        return Answer(_fact(profile, relation, "ko", "요"), _fact(profile, relation, "ko", "어"))
    return Answer.english(_fact(profile, relation, "en"))


def _similar(rng: Random, profile: Profile, relation: Relation) -> Profile:
    """Another profile of the training split that differs in the fact alone."""
    if relation == "lives":
        others = [Profile(profile.person, place, profile.thing) for place in PLACES if place != profile.place]
    else:
        others = [Profile(profile.person, profile.place, thing) for thing in THINGS if thing != profile.thing]
    return rng.choice([other for other in others if not is_held_out(other)])


def _exercise(rng: Random, split: Split, language: Language) -> Exercise:
    profile = rng.choice(profiles(split))
    relation: Relation = rng.choice(("lives", "likes"))
    if language == "ko":
        question, polite = korean_prompt(rng, _KOREAN_QUESTIONS[relation])
        name = profile.person[1]
        particles = {f"p{particle}": korean.with_particle(name, particle) for particle in ("은", "이")}
        question = question.format_map(particles | {"p의": f"{name}의"})
    else:
        question, polite = rng.choice(_ENGLISH_QUESTIONS[relation]).format(p=profile.person[0]), True
    prompt = f"{_told(rng, profile, language, '요' if polite else '어')} {question}"
    other: Relation = "likes" if relation == "lives" else "lives"
    wrong = (_answer(_similar(rng, profile, relation), relation, language), _answer(profile, other, language))
    return Exercise("facts", language, prompt, polite, _answer(profile, relation, language), wrong)


def _consequences(profile: Profile, language: Language) -> tuple[str, str]:
    """What follows from the two facts."""
    if language == "ko":
        talk = f"{korean.with_particle(profile.person[1], '은')} {profile.thing[1]} 이야기를 자주 한다."
        return f"{profile.person[1]}의 집은 {profile.place[1]}에 있다.", talk
    return f"{profile.person[0]}'s home is in {profile.place[0]}.", f"{profile.person[0]} often talks about {profile.thing[0]}."


def _prose(rng: Random, split: Split, language: Language, parallel: bool) -> str:
    """A profile and what follows from it; in parallel texts the profile in both languages."""
    profile = rng.choice(profiles(split))
    told = _told(rng, profile, language)
    if parallel:
        return f"{told} {_told(rng, profile, 'en' if language == 'ko' else 'ko')}"
    return " ".join([told, *rng.sample(_consequences(profile, language), 2)])


FACTS = Task("facts", _exercise, _prose)
