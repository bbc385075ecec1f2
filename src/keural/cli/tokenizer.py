"""`keural tokenizer`: train, convert and examine tokenizers."""

from pathlib import Path
from typing import Annotated

import typer

from keural.cli.options import Out, Overrides, RecipeDir, open_recipe
from keural.terminal import show

app = typer.Typer(no_args_is_help=True, help="Train, convert and examine tokenizers.")


@app.command("train")
def tokenizer_train(recipe: RecipeDir, overrides: Overrides = None, out: Out = None) -> None:
    """Train the tokenizer of a recipe."""
    from keural.pipeline import workspace

    loaded, directory = open_recipe(recipe, overrides, out)
    workspace.check_inputs(loaded, (), directory)
    tokenizer = workspace.prepare_tokenizer(loaded, directory)
    show(f"{directory / 'tokenizer'}: {tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256}")


@app.command("convert")
def tokenizer_convert(
    model: Annotated[Path, typer.Argument(help="SentencePiece model file")],
    out: Annotated[Path, typer.Argument(help="directory to write")],
) -> None:
    """Write a SentencePiece model as a transformers tokenizer directory (tokenizer.json, chat template)."""
    from keural.files import atomic_directory, check_new
    from keural.tokenizer import KeuralTokenizer

    check_new(out)
    tokenizer = KeuralTokenizer.load(model)
    with atomic_directory(out) as directory:
        tokenizer.save(directory)
    show(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256}")


@app.command("report")
def tokenizer_report(
    model: Annotated[Path, typer.Argument(help="SentencePiece model file or tokenizer directory")],
    files: Annotated[list[Path], typer.Argument(help="text files to measure on")],
) -> None:
    """Characters and bytes per token, tokens per word, and round trips on given files."""
    from keural.tokenizer import KeuralTokenizer
    from keural.tokenizer.report import format_report, tokenizer_report

    show(format_report(tokenizer_report(KeuralTokenizer.load(model), files)))
