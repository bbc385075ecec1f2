"""Arguments and options that several subcommands share."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keural.card import CARD
from keural.errors import UserError
from keural.limits import LARGEST_ANSWER, LARGEST_SEED, SMALLEST_PENALTY
from keural.serve.jamo import Jamo

if TYPE_CHECKING:
    from keural.recipe import Recipe

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.lr=1e-5, data=DIR, sft-1.train.steps=100")]
Out = Annotated[Path | None, typer.Option(help="run directory (default: runs/<recipe>)")]
RECIPE = typer.Argument(help="a recipe: directory with recipe.yaml, or a name of `keural recipes`")
RecipeDir = Annotated[Path, RECIPE]
StageFile = Annotated[Path, typer.Argument(help="a stage's YAML file, with recipe.yaml beside it, e.g. toy/sft-1.yaml")]
ModelDir = Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final")]
ModelPath = Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final, or a GGUF file or the directory with one")]
ReferenceOnly = Annotated[
    bool, typer.Option("--reference-only", help="train nothing; compute what reference values of preference pairs are missing")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="train nothing; take the largest step of each stage and say what it costs"),
]
TensorBoard = Annotated[bool, typer.Option(help="also write TensorBoard files")]
Wandb = Annotated[bool, typer.Option(help="also log to Weights & Biases, as WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY say")]
DEFAULT = "default: as saved with the model, else the card's"
System = Annotated[str | None, typer.Option(help="system message; an empty one is none (default: as saved with the model)")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help=f"0 is greedy ({DEFAULT}, {CARD.temperature})")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help=f"({DEFAULT}, {CARD.top_p})")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=SMALLEST_PENALTY, help=f"({DEFAULT}, {CARD.repetition_penalty})")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, max=LARGEST_ANSWER, help=f"({DEFAULT}, {CARD.max_new_tokens})")]
Seed = Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="repeatable sampling")]
EngineName = Annotated[str | None, typer.Option("--engine", help="transformers or llama.cpp (default: what the path holds)")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads to compute with (default: the engine's choice)")]
JamoStyle = Annotated[
    Jamo, typer.Option(help="published tokenizer: letters that stand alone as typed (ㅋㅋㅋ), or as they are decoded (ᄏᄏᄏ)")
]


def names_of(option: str, text: str) -> list[str]:
    """The names that an option gives with commas between them; none for an empty text. Raises `UserError` for an empty name."""
    names = [name.strip() for name in text.split(",")] if text else []
    if "" in names:
        raise UserError(f"{option} {text}: an empty name; give names with one comma between them")
    return names


def boards(**asked: bool) -> tuple[str, ...]:
    """Names of the boards that were asked for. Raises `UserError` when the package of one is not installed."""
    names = tuple(name for name, wanted in asked.items() if wanted)
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"--{name}: the {name} package is not installed: pip install 'keural[{name}]'")
    return names


def open_recipe(given: Path, overrides: list[str] | None, out: Path | None) -> "tuple[Recipe, Path]":
    """The recipe of a command, by directory or name, with its overrides, and the run directory."""
    from keural.recipe import load_recipe
    from keural.recipe.shipped import recipe_directory

    recipe = load_recipe(recipe_directory(given), overrides or ())
    return recipe, out or Path("runs") / recipe.spec.name


def open_stage(given: Path, overrides: list[str] | None, out: Path | None) -> "tuple[Recipe, str, Path]":
    """The recipe around a stage's file, with its overrides, the stage's name, and the run directory."""
    from keural.recipe.shipped import stage_file

    file = stage_file(given)
    recipe, directory = open_recipe(file.parent, overrides, out)
    return recipe, recipe.stage(file.stem).name, directory
