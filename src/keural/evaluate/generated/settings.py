"""How the answers of a task are generated and judged, as typed keys of the task's YAML.

In: the key `generation` of a task. Out: a `GenerationSpec`, or an error that names the key.
"""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from keural.evaluate.verifiers import REGISTRIES
from keural.limits import LARGEST_ANSWER, LARGEST_SEED, LARGEST_TEMPERATURE
from keural.recipe.base import Spec

MOST_SAMPLES = 1000


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


class ExtractionSpec(Spec):
    """One way to take the answer out of what was written. The first one gives the task's score, the others are kept beside it."""

    name: str = Field(min_length=1, max_length=40)
    """`strict` and `flexible` by custom."""
    pattern: str | None = None
    """Regular expression; of its groups the first that is not empty counts, without groups the match. None: all."""
    take: Literal["first", "last"] = "first"
    """Which of several matches."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        return None if pattern is None else _expression(pattern)


class NormalizationSpec(Spec):
    """What does not count when an extracted answer is compared with the right ones."""

    ignore: list[str] = Field(default_factory=list)
    """Regular expressions; what they match is taken out of both, one after the other."""
    ignore_case: bool = False
    """Small and capital letters are the same."""
    ignore_punctuation: bool = False
    """ASCII punctuation is taken out of both."""
    ignore_spaces: bool = False
    """White space at the ends does not count, inside it is one space."""

    @field_validator("ignore")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        return [_expression(pattern) for pattern in patterns]


class GenerationSpec(Spec):
    """How answers are written and judged."""

    stop: list[str] = Field(default_factory=list)
    """Texts before which an answer ends; the end of a turn or a text always ends it."""
    max_new_tokens: int = Field(256, ge=1, le=LARGEST_ANSWER)
    """An answer is cut after so many; how many were is counted."""
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)
    """Answers to each item; the score is the share of right ones, pass@1 of code."""
    temperature: float = Field(0.0, ge=0, le=LARGEST_TEMPERATURE)
    """0 takes the most probable token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Of sampling; each sample of each item has its own from it."""
    extraction: list[ExtractionSpec] = Field(default_factory=lambda: [ExtractionSpec(name="strict")], min_length=1)
    """How the answer is taken out of what was written."""
    normalization: NormalizationSpec = Field(default_factory=NormalizationSpec)
    """What does not count when it is compared."""
    verifier: str | None = None
    """Kinds of instructions that the items name (`ifeval`, `ifeval_ko`, `ko_instructions`), in place of right answers."""
    code: bool = False
    """What was written is a program's rest, judged by running the item's test; only with `--run-code`."""
    pass_at: list[int] = Field(default_factory=lambda: [1])
    """For code: the k of pass@k that are reported; 1 is the score."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("an empty text is the end of nothing")
        return stop

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.verifier is not None and self.verifier not in REGISTRIES:
            raise ValueError(f"verifier {self.verifier!r}: use one of {', '.join(REGISTRIES)}")
        if self.code and self.verifier is not None:
            raise ValueError("code is judged by its tests, not by a verifier")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples without temperature are all the same; give a temperature")
        if not self.pass_at or any(k < 1 or k > self.samples for k in self.pass_at) or 1 not in self.pass_at:
            raise ValueError(f"pass_at: 1 and other numbers up to the {self.samples} samples")
        if len({way.name for way in self.extraction}) < len(self.extraction):
            raise ValueError("extraction: two ways have the same name")
        return self
