"""One task as typed YAML: where its items are, how they are asked, how answers are judged.

In: the file of a task. Out: a `TaskSpec`, or a `UserError` that names the file and the key. Nothing in a task is code: its
templates are text with the values of an item put in (`keural.evaluate.tasks.template`).
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from keural.errors import UserError
from keural.evaluate.results.records import Kind
from keural.evaluate.tasks.template import check_template
from keural.files import read_yaml
from keural.limits import LARGEST_SEED
from keural.recipe.base import Spec, neutral, validate

Rule = Literal["sum", "per_character", "per_token", "per_byte", "mass"]
"""How the log-probabilities of an item's choices become a score.

sum: the most probable choice counts; per_character, per_token, per_byte: log-probabilities are first divided by the length of the
choice; mass: the share of the right choices in the probability of all.
"""
MOST_SHOTS = 100


class PlaceSpec(Spec):
    """Where items are: files in the data directory, or a data set of a hub."""

    adapter: str = Field(min_length=1)
    """How rows are read; the same name finds the set in training data (`data.decontaminate`)."""
    path: str = ""
    """File, directory or glob below the data directory. Its first part is the set's folder, which may itself be that directory."""
    hub: str | None = None
    """Data set of a hub, which lies in the data directory under this name."""
    config: str | None = None
    """Configuration (subset) of `hub`."""
    split: str | None = None
    """Split of `hub`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the adapter and the reader."""
    license: str | None = neutral("report", None)
    """Of the set, as model hubs write it."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.path) == bool(self.hub):
            raise ValueError("a place has either a path in the data directory or a hub")
        if self.path.startswith("/") or ".." in Path(self.path).parts:
            raise ValueError(f"path {self.path!r} leads out of the data directory")
        return self


class ShotsSpec(Spec):
    """Solved examples that stand before each item."""

    places: list[PlaceSpec] = Field(default_factory=list)
    """Where they are taken from, the first that is there; none: the task's own items, the asked one left out."""
    sampler: Literal["random", "first"] = "random"
    """Others for each item, or the first ones for all."""
    same: str | None = None
    """A field that examples share with the item: of `subject`, only examples of the item's subject are taken."""
    seed: int = Field(1234, ge=0, le=LARGEST_SEED)
    """Of the random choice."""
    number: int = Field(0, ge=0, le=MOST_SHOTS)
    """How many, where the command does not say."""


class WindowSpec(Spec):
    """How a text that is longer than the model's context is read."""

    length: int | None = Field(None, ge=2)
    """Tokens of a window; the model's context by default."""
    overlap: float = Field(0.5, ge=0, lt=1)
    """Part of a window that repeats the one before it, so that what is predicted there is not without context."""


class PairingSpec(Spec):
    """Pairs made of single answers that carry a label: of one question, each good one with each bad one."""

    good: list[str] = Field(min_length=1)
    """Labels of answers that are preferred."""
    bad: list[str] = Field(min_length=1)
    """Labels of answers that are not."""


class TaskSpec(Spec):
    """One task."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=100)
    """What it is called: lm-eval's name where lm-eval has the task and asks it in the same words."""
    title: str = neutral("report", "")
    """What it measures, in a few words."""
    language: str = Field(min_length=2, max_length=8)
    """ISO 639-1 code of what is asked."""
    kind: Kind
    """How it is asked."""
    places: list[PlaceSpec] = Field(min_length=1)
    """Where its items are; the first that is there is used."""
    shots: ShotsSpec = Field(default_factory=ShotsSpec)
    """Examples before each item."""
    preamble: str = ""
    """Template of what stands before examples and item."""
    question: str = "{{ question }}"
    """Template of an item's question."""
    choices: Literal["own", "letters"] | list[str] = "own"
    """Templates of the answers to choose from; `own`: those of the item, `letters`: A, B, … for as many as it has."""
    labelled: str | None = None
    """Name of the item's list of answers that are right or wrong, in place of its choices."""
    delimiter: str = " "
    """What stands between question and answer."""
    between: str = "\n\n"
    """What stands between examples."""
    words: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Values of an item's fields that are put into templates as other words: `{relation: {원인: 왜냐하면}}`."""
    scoring: list[Rule] = Field(default=["sum"], min_length=1)
    """How log-probabilities are judged; the first is the task's score, the others are kept with each item."""
    chance: float | None = Field(None, ge=0, le=1)
    """Score of who knows nothing; by default that of choosing blindly, item by item."""
    cluster: str | None = None
    """What items that are not independent share: passage, question, or a field of theirs."""
    where: dict[str, str] = Field(default_factory=dict)
    """Only items whose fields have these values."""
    parts: str | None = None
    """A field whose values name tasks of their own: `mmlu` with parts of `subject` also gives `mmlu_anatomy`."""
    window: WindowSpec = Field(default_factory=WindowSpec)
    """For rolling tasks."""
    pairing: PairingSpec | None = None
    """For pairs that are made of answers with labels."""
    harness: str | None = neutral("report", None)
    """lm-eval's name of the task whose figures these must equal."""
    note: str = neutral("report", "")
    """What a reader of the figures should know."""

    @field_validator("preamble", "question")
    @classmethod
    def _template(cls, text: str) -> str:
        check_template(text)
        return text

    @field_validator("choices")
    @classmethod
    def _templates(cls, choices: Any) -> Any:
        for text in choices if isinstance(choices, list) else ():
            check_template(text)
        if isinstance(choices, list) and len(choices) < 2:
            raise ValueError("choices: at least two")
        return choices

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.scoring)) < len(self.scoring):
            raise ValueError("scoring: a rule is given twice")
        if "mass" in self.scoring and self.labelled is None:
            raise ValueError("scoring: mass is of answers that are right or wrong; name their list in labelled")
        if self.kind == "pair" and not set(self.scoring) <= {"sum", "per_token", "per_character", "per_byte"}:
            raise ValueError("scoring: pairs know sum, per_token, per_character and per_byte")
        if self.kind != "choice" and (self.labelled or self.choices != "own"):
            raise ValueError(f"choices and labelled are for kind choice, not {self.kind}")
        if self.kind != "pair" and self.pairing is not None:
            raise ValueError("pairing is for kind pair")
        if self.kind == "rolling" and (self.shots.number or self.chance is not None):
            raise ValueError("rolling texts know neither examples nor chance")
        return self


def read_task(file: Path) -> TaskSpec:
    """The task that a YAML file describes. Raises `UserError` naming file and key, and the nearest key there is."""
    value = read_yaml(file)
    if not isinstance(value, dict):
        raise UserError(f"{file}: must be a map of a task's keys; see docs/evaluation.md")
    return validate(TaskSpec, value, file)
