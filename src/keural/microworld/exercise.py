"""The common shape of all tasks: one question with its right and wrong answers, and how a family of tasks is described."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from keural.microworld.content import Split

Language = Literal["ko", "en"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer in both registers; in English they are the same."""

    polite: str
    blunt: str

    @classmethod
    def english(cls, text: str) -> "Answer":
        """An answer without registers."""
        return cls(text, text)

    def text(self, polite: bool) -> str:
        """The wording in a register."""
        return self.polite if polite else self.blunt


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question, the right answer and typical wrong ones; `polite` is the register of the question (always true in English)."""

    task: str
    language: Language
    prompt: str
    polite: bool
    right: Answer
    wrong: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A family of questions. Both functions draw content of the given split only, phrasings at random.

    `exercise(rng, split, language)` makes a question; `prose(rng, split, language, parallel)` a short text that states such
    content in one language, or in both when `parallel`. `split` "heldout" makes texts about held-out content.
    """

    name: str
    exercise: Callable[[Random, Split, Language], Exercise]
    prose: Callable[[Random, Split, Language, bool], str]


def korean_prompt(rng: Random, frames: tuple[tuple[str, str], ...]) -> tuple[str, bool]:
    """One of the (polite, blunt) frames in one of its registers, and whether that is the polite one."""
    polite = rng.random() < 0.5
    return rng.choice(frames)[0 if polite else 1], polite
