"""Translation and rewriting: clauses in two languages, present and past, affirmed and negated."""

from dataclasses import dataclass
from random import Random
from typing import Literal

from keural.microworld import english, korean
from keural.microworld.content import OBJECTS, SUBJECTS, Clause, Split, clauses, is_held_out
from keural.microworld.exercise import Answer, Exercise, Language, Task, korean_prompt

Style = Literal["plain", "polite", "blunt"]

_TO_KOREAN_FRAMES = (
    ("한국어로 옮겨 주세요: {}", "한국어로 옮겨 줘: {}"),
    ("이 문장을 한국어로 번역해 주세요. {}", "이 문장을 한국어로 번역해 줘. {}"),
    ("한국어로 뭐예요? {}", "한국어로 뭐야? {}"),
)
_TO_ENGLISH_FRAMES = ("Translate into English: {}", "Put this into English: {}", "How do you say this in English? {}")
_KOREAN_REWRITE_FRAMES = {
    "past": (
        ("과거형으로 바꿔 주세요: {}", "과거형으로 바꿔 줘: {}"),
        ("이 문장을 과거형으로 써 주세요. {}", "이 문장을 과거형으로 써 줘. {}"),
    ),
    "negative": (
        ("부정문으로 바꿔 주세요: {}", "부정문으로 바꿔 줘: {}"),
        ("이 문장을 부정문으로 써 주세요. {}", "이 문장을 부정문으로 써 줘. {}"),
    ),
}
_ENGLISH_REWRITE_FRAMES = {
    "past": ("Put this into the past tense: {}", "Rewrite this in the past tense. {}"),
    "negative": ("Make this negative: {}", "Rewrite this as a negative sentence. {}"),
}
_TIMES = {
    False: (("아침에", "in the morning"), ("오늘", "today"), ("저녁에", "in the evening")),
    True: (("어제", "yesterday"), ("어젯밤에", "last night")),
}


@dataclass(frozen=True, slots=True)
class Wording:
    """A clause with tense and polarity, ready to be worded in either language."""

    clause: Clause
    past: bool = False
    negative: bool = False

    def korean(self, style: Style, time: str = "") -> str:
        """The sentence, e.g. 학생이 책을 읽는다 / 읽어요 / 읽어, with an adverb of time before it."""
        subject = korean.with_particle(self.clause.subject.korean, "이")
        thing = korean.with_particle(self.clause.object.korean, "을")
        return f"{time} {subject} {thing} {self._korean_verb(style)}.".lstrip()

    def _korean_verb(self, style: Style) -> str:
        verb = self.clause.verb
        ending = "요" if style == "polite" else ""
        if self.negative:
            past, now = f"{verb.stem}지 않았", f"{verb.stem}지 않"
            if self.past:
                return past + ("다" if style == "plain" else "어" + ending)
            return now + ("는다" if style == "plain" else "아" + ending)
        if self.past:
            return verb.past_stem + ("다" if style == "plain" else "어" + ending)
        return verb.plain if style == "plain" else verb.informal + ending

    def english(self, time: str = "") -> str:
        """The sentence, e.g. The student reads a book; an adverb of time comes last."""
        verb, thing = self.clause.verb, self.clause.object
        if self.negative:
            action = f"{'did' if self.past else 'does'} not {verb.english}"
        else:
            action = verb.past if self.past else verb.present
        what = english.with_article(thing.english) if thing.counted else thing.english
        return f"The {self.clause.subject.english} {action} {what} {time}".rstrip() + "."

    def sentence(self, language: Language) -> str:
        """As it is quoted in questions and written in prose: plain style in Korean."""
        return self.korean("plain") if language == "ko" else self.english()

    def answer(self, language: Language) -> Answer:
        """As the assistant says it."""
        if language == "ko":
            return Answer(self.korean("polite"), self.korean("blunt"))
        return Answer.english(self.english())


def _similar(rng: Random, clause: Clause) -> Clause:
    """Another clause of the training split that differs in the subject or in the object."""
    others = [Clause(who, clause.verb, clause.object) for who in SUBJECTS if who != clause.subject]
    others += [Clause(clause.subject, clause.verb, OBJECTS[w]) for w in clause.verb.objects if OBJECTS[w] != clause.object]
    return rng.choice([other for other in others if not is_held_out(other)])


def _translation(rng: Random, split: Split, language: Language) -> Exercise:
    """`language` is the one to translate into, in which the question is asked."""
    wording = Wording(rng.choice(clauses(split)), past=rng.random() < 0.5)
    wrong = (Wording(_similar(rng, wording.clause), wording.past), Wording(wording.clause, not wording.past))
    if language == "ko":
        frame, polite = korean_prompt(rng, _TO_KOREAN_FRAMES)
    else:
        frame, polite = rng.choice(_TO_ENGLISH_FRAMES), True
    prompt = frame.format(wording.sentence("en" if language == "ko" else "ko"))
    answers = tuple(other.answer(language) for other in wrong)
    return Exercise("translation", language, prompt, polite, wording.answer(language), answers)


def _rewriting(rng: Random, split: Split, language: Language) -> Exercise:
    clause = rng.choice(clauses(split))
    aim = rng.choice(("past", "negative"))
    right = Wording(clause, past=aim == "past", negative=aim == "negative")
    wrong = (Wording(_similar(rng, clause), right.past, right.negative), Wording(clause, right.negative, right.past))
    if language == "ko":
        frame, polite = korean_prompt(rng, _KOREAN_REWRITE_FRAMES[aim])
    else:
        frame, polite = rng.choice(_ENGLISH_REWRITE_FRAMES[aim]), True
    prompt = frame.format(Wording(clause).sentence(language))
    return Exercise("rewriting", language, prompt, polite, right.answer(language), tuple(a.answer(language) for a in wrong))


def _timed(rng: Random, wording: Wording, language: Language) -> str:
    time = rng.choice(_TIMES[wording.past])
    return wording.korean("plain", time[0]) if language == "ko" else wording.english(time[1])


def _translation_prose(rng: Random, split: Split, language: Language, parallel: bool) -> str:
    """Two sentences about different clauses; in parallel texts one sentence in both languages."""
    first, second = (Wording(rng.choice(clauses(split)), rng.random() < 0.5) for _ in range(2))
    if not parallel:
        return f"{_timed(rng, first, language)} {_timed(rng, second, language)}"
    if language == "ko":
        return f"{first.korean('plain')} 영어로는 이렇다. {first.english()}"
    return f"{first.english()} In Korean it is: {first.korean('plain')}"


def _rewriting_prose(rng: Random, split: Split, language: Language, parallel: bool) -> str:
    """One clause affirmed and negated, or now and before; in parallel texts the latter sentence also in the other language."""
    clause = rng.choice(clauses(split))
    changed = Wording(clause, past=True) if rng.random() < 0.5 else Wording(clause, negative=True)
    texts = [Wording(clause).sentence(language), changed.sentence(language)]
    if parallel:
        texts = [texts[1], changed.sentence("en" if language == "ko" else "ko")]
    return " ".join(texts)


TRANSLATION = Task("translation", _translation, _translation_prose)
REWRITING = Task("rewriting", _rewriting, _rewriting_prose)
