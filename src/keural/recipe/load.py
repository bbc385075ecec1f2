"""Recipes: what a run is made of, as strict typed objects read from YAML.

A recipe is a directory: `recipe.yaml` names the model, the tokenizer, the evaluation and the stages in order; `<stage>.yaml`
describes one stage. A recipe may say only in what it differs from another (`extends`). Everything is checked when it is read: an
unknown key, a wrong type or an impossible combination is a `UserError` that names the file and the key. Any value can be
overridden as `key=value`: a key of `recipe.yaml` (`seed=1`, `data=DIR`, `model.hidden_size=256`), a key of every stage
(`train.lr=1e-5`), or a key of one stage (`sft-2.train.lr=1e-5`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from keural.errors import UserError, nearest, quoted
from keural.limits import LARGEST_SEED, LONGEST_SECONDS
from keural.parsing import Malformed, parse_yaml
from keural.recipe.base import Spec, neutral, validate
from keural.recipe.evaluation import ChatSpec, EvaluationSpec
from keural.recipe.extends import EXTENDS, SHARED, read_recipe_files
from keural.recipe.model import ModelSpec
from keural.recipe.objectives import OBJECTIVES
from keural.recipe.tokenizer import TokenizerSpec
from keural.recipe.training import StageSpec

RESERVED_NAMES = {"data", "final", "random", "recipe", "reference", "results", "tokenizer", "untrained"}
"""What else a run directory, a key or a model is called; no stage may be."""


class RecipeSpec(Spec):
    """`recipe.yaml`: everything that is not one stage's own."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """What the run is called: small letters, digits, dots and dashes. Its directory is `runs/NAME` unless `--out` says
    otherwise."""
    description: str = neutral("report", "")
    """What the recipe is, in one line, for `keural recipes` and the report."""
    extends: str | None = neutral("place", None)
    """A recipe of the package by name, or a path relative to this file's directory, that this one differs from: its keys and those
    of its stages' files are laid over that recipe's, maps key by key, lists whole; null takes a key back. Every stage has a file
    here, if only with its name. A resolved recipe extends none."""
    shared: dict[str, Any] | None = neutral("place", None)
    """Keys of stages that every stage has unless its file says otherwise, as the file would have them: `{train: {eps: 1e-8}}`. Maps
    are joined key by key, lists are taken whole; null in a stage's file takes a key back. A resolved recipe shares none."""
    seed: int = Field(42, ge=0, le=LARGEST_SEED)
    """Of everything that is drawn: weights at the start, held-out records, order and mixture of the data."""
    data: str | None = neutral("place", None)
    """Directory that sources' paths are relative to; needed where a source has a path."""
    budget: str | None = None
    """Time for all stages with a budget_share, e.g. 20m, 90s, 2h; refused where no stage has one."""
    model: ModelSpec = Field(default_factory=ModelSpec)
    """Shape of the network. Left out, it is the published 14.83B model."""
    tokenizer: TokenizerSpec
    """The tokenizer of all stages."""
    stages: list[str] = Field(min_length=1)
    """Names of the stages in their order; `NAME.yaml` beside this file describes each."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """What is measured when all stages are finished."""
    chat: ChatSpec = Field(default_factory=ChatSpec)
    """How the final model chats unless told otherwise; it is kept with every model of the run."""
    notes: list[str] = neutral("report", default_factory=list)
    """Where the numbers come from, contradictions included."""

    @field_validator("budget")
    @classmethod
    def _budget_parses(cls, budget: str | None) -> str | None:
        if budget is not None:
            parse_duration(budget)
        return budget


@dataclass(frozen=True)
class Recipe:
    """A whole recipe: the pipeline's settings and its stages in order."""

    spec: RecipeSpec
    """`recipe.yaml`."""
    stages: tuple[StageSpec, ...]
    """The stages' files, in the order of `recipe.yaml`."""
    directory: Path
    """Where the files lie."""

    def stage(self, name: str) -> StageSpec:
        """The stage called `name`. Raises `UserError` naming the nearest one."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"{self.directory}: no stage {name!r}{nearest(name, [stage.name for stage in self.stages])}")

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain data."""
        return {"recipe": self.spec.model_dump(), "stages": [stage.model_dump() for stage in self.stages]}


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `20m`, `1.5h`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{quoted(text)} is not a duration (write 90s, 20m or 2h)")
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    if seconds > LONGEST_SECONDS:
        raise ValueError(f"{quoted(text)} is longer than three hundred years")
    return seconds


def load_recipe(directory: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read `directory/recipe.yaml` and the stages it names, apply `key=value` overrides, and check everything.

    Raises `UserError` for a missing file, an unknown key (with the nearest valid one), a wrong type or an impossible combination.
    """
    if directory.is_file():
        beside = f"; give {directory.parent}" if (directory.parent / "recipe.yaml").is_file() else ""
        raise UserError(f"{directory}: is a file, and a recipe is a directory with a recipe.yaml{beside}")
    recipe_file = directory / "recipe.yaml"
    recipe_data, stage_data, shares = read_recipe_files(directory)
    for override in overrides:
        _apply_override(override, recipe_data, stage_data, recipe_file)
    spec = validate(RecipeSpec, recipe_data, recipe_file)
    stages = tuple(_stage(data, directory / f"{name}.yaml", shares) for name, data in stage_data.items())
    recipe = Recipe(spec, stages, directory)
    _check_stages(recipe)
    return recipe


def _stage(data: dict[str, Any], file: Path, shares: bool) -> StageSpec:
    try:
        return validate(StageSpec, data, file)
    except UserError as error:
        raise UserError(f"{error} (what the file does not say is `shared` in recipe.yaml)") if shares else error from error


def _check_stages(recipe: Recipe) -> None:
    """What one file alone cannot show: names, order, lengths, budget."""
    earlier: list[str] = []
    for name, stage in zip(recipe.spec.stages, recipe.stages, strict=False):
        file = recipe.directory / f"{name}.yaml"
        if name in RESERVED_NAMES:
            raise UserError(f"{file}: a stage cannot be called {name!r}; choose another name")
        if stage.name != name:
            raise UserError(f"{file}: name {stage.name!r} differs from the file's; call it {name!r}")
        if recipe.spec.stages.count(name) > 1:
            raise UserError(f"{recipe.directory / 'recipe.yaml'}: stage {name!r} is listed twice")
        if stage.init_from in recipe.spec.stages and stage.init_from not in earlier:
            raise UserError(f"{file}: init_from {stage.init_from!r} is not an earlier stage")
        if stage.predecessor is not None and stage.predecessor not in earlier:
            hint = nearest(stage.init_from, ["random", *earlier])
            raise UserError(
                f"{file}: init_from {stage.init_from!r} is no earlier stage{hint}; write a model directory with a slash"
            )
        if stage.train.budget_share is not None and recipe.spec.budget is None:
            raise UserError(f"{file}: train.budget_share needs a budget: set budget in recipe.yaml or give budget=20m")
        if stage.data.sequence_length > recipe.spec.model.max_position_embeddings:
            raise UserError(f"{file}: data.sequence_length exceeds model.max_position_embeddings")
        earlier.append(name)
    for measure in recipe.spec.evaluation.bits_per_byte:
        if measure.stage not in earlier:
            hint = nearest(measure.stage, earlier)
            raise UserError(f"{recipe.directory / 'recipe.yaml'}: evaluation.bits_per_byte: no stage {measure.stage!r}{hint}")
        if measure.overlap >= (length := recipe.stage(measure.stage).data.sequence_length):
            raise UserError(
                f"{recipe.directory / 'recipe.yaml'}: evaluation.bits_per_byte {measure.name!r}: an overlap of {measure.overlap} "
                f"leaves nothing of windows of {length} tokens (data.sequence_length of {measure.stage}); make it smaller"
            )
    shares = sum(stage.train.budget_share or 0 for stage in recipe.stages)
    if shares > 1 + 1e-9:
        raise UserError(f"{recipe.directory}: the stages' budget_share sum to {shares:.3f}, more than 1")
    if recipe.spec.budget is not None and not shares:
        raise UserError(
            f"{recipe.directory / 'recipe.yaml'}: budget {recipe.spec.budget} has no effect, as no stage has train.budget_share; "
            "give stages one in place of steps or epochs, or leave budget out (budget=null)"
        )


def _apply_override(override: str, recipe: dict[str, Any], stages: dict[str, dict[str, Any]], file: Path) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {quoted(override)}: write key=value, e.g. train.lr=1e-5")
    try:
        value = parse_yaml(text)
    except Malformed as error:
        raise UserError(f"override {quoted(override)}: the value is not valid YAML ({error})") from error
    head, _, rest = key.partition(".")
    if head in stages and rest:
        _set(stages[head], rest, value, override)
    elif head in RecipeSpec.model_fields and not (head == "data" and rest):  # data=DIR, but data.sequence_length=512
        if head == "stages":
            raise UserError(f"override {quoted(override)}: stages cannot be overridden; edit {file} or use --until")
        if head in (EXTENDS, SHARED):
            raise UserError(f"override {quoted(override)}: {head} cannot be overridden; give the keys themselves, or edit {file}")
        if key in {"data", "budget"} and isinstance(value, int | float):
            value = text
        _set(recipe, key, value, override)
    elif head in StageSpec.model_fields:
        owners = [name for name, kind in OBJECTIVES.items() if rest and kind.settings == head]
        meant = [stage for stage in stages.values() if not owners or stage.get("objective") in owners]
        if not meant:
            raise UserError(f"override {quoted(override)}: no stage has objective {' or '.join(owners)}")
        for stage in meant:
            _set(stage, key, value, override)
    else:
        known = [*RecipeSpec.model_fields, *StageSpec.model_fields, *stages]
        raise UserError(f"override {quoted(override)}: unknown key {quoted(head)}{nearest(head, known)}")


def _set(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override {quoted(override)}: {quoted(parent)} is not a mapping")
    data[last] = value
