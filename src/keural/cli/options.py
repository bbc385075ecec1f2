"""Arguments and options that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer

from keural.recipe import CARD, Recipe, load_recipe
from keural.serve.jamo import Jamo

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.lr=1e-5, data=DIR, sft-1.train.steps=100")]
Out = Annotated[Path | None, typer.Option(help="run directory (default: runs/<recipe>)")]
RecipeDir = Annotated[Path, typer.Argument(help="directory with recipe.yaml")]
ModelDir = Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final")]
ModelPath = Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final, or a GGUF file or the directory with one")]
DEFAULT = "default: as saved with the model, else the card's"
System = Annotated[str | None, typer.Option(help="system message; an empty one is none (default: as saved with the model)")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help=f"0 is greedy ({DEFAULT}, {CARD.temperature})")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help=f"({DEFAULT}, {CARD.top_p})")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, help=f"({DEFAULT}, {CARD.repetition_penalty})")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help=f"({DEFAULT}, {CARD.max_new_tokens})")]
Seed = Annotated[int | None, typer.Option(help="repeatable sampling")]
EngineName = Annotated[str | None, typer.Option("--engine", help="transformers or llama.cpp (default: what the path holds)")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads to compute with (default: the engine's choice)")]
JamoStyle = Annotated[
    Jamo, typer.Option(help="published tokenizer: letters that stand alone as typed (ㅋㅋㅋ), or as they are decoded (ᄏᄏᄏ)")
]


def open_recipe(directory: Path, overrides: list[str] | None, out: Path | None) -> tuple[Recipe, Path]:
    """The recipe of a command, with its overrides, and the run directory."""
    recipe = load_recipe(directory, overrides or ())
    return recipe, out or Path("runs") / recipe.spec.name
