"""The `keural` command. Every subcommand is a thin layer over one function of the package.

A `UserError` becomes one line on standard error and exit code 2; a run that a signal stopped, and that saved, exits with 130.
"""

import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from transformers.utils import logging as transformers_logging

from keural.cli import checkpoints, data, tokenizer
from keural.cli.options import (
    EngineName,
    JamoStyle,
    MaxNewTokens,
    ModelPath,
    Out,
    Overrides,
    RecipeDir,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    Threads,
    TopP,
    open_recipe,
)
from keural.errors import UserError
from keural.recipe import SamplingDefaults

if TYPE_CHECKING:
    from keural.pipeline.run import Outcome
    from keural.serve.engines.sampling import SamplingParams

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.split("\n")[0], pretty_exceptions_enable=False)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app)


def main() -> None:
    """Run the command line; the process's exit code says how it went."""
    transformers_logging.disable_progress_bar()
    try:
        app()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0 or "LOCAL_RANK" not in os.environ:
            print(f"keural: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a file that may not be read, a path that cannot be: the user's, wherever it came up
        if error.filename is None or error.strerror is None:
            raise
        print(f"keural: error: {UserError(f'{str(error.filename)[:300]}: {error.strerror}')}", file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    recipe: RecipeDir,
    overrides: Overrides = None,
    out: Out = None,
    until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    tensorboard: Annotated[bool, typer.Option(help="also write TensorBoard files")] = False,
) -> None:
    """Run a recipe's whole pipeline; finished stages are skipped, an interrupted one is resumed."""
    from keural.pipeline.run import run as run_recipe

    loaded, directory = open_recipe(recipe, overrides, out)
    outcome = run_recipe(loaded, directory, until=until, tensorboard=tensorboard)
    _end(outcome)


@app.command()
def train(
    stage: Annotated[Path, typer.Argument(help="a stage's YAML file, with recipe.yaml beside it")],
    overrides: Overrides = None,
    out: Out = None,
    tensorboard: Annotated[bool, typer.Option(help="also write TensorBoard files")] = False,
) -> None:
    """Run one stage (with torchrun: on many processes); the stage it starts from must be finished."""
    from keural.cli import printing
    from keural.pipeline.run import run as run_recipe

    loaded, directory = open_recipe(printing.stage_file(stage).parent, overrides, out)
    outcome = run_recipe(loaded, directory, only=stage.stem, tensorboard=tensorboard)
    _end(outcome)


def _end(outcome: "Outcome") -> None:
    """Say how the run ended; exit with the signal's code when one stopped it."""
    from keural.cli import printing

    if int(os.environ.get("RANK", "0")) == 0:
        printing.print_ending(outcome, shlex.join(sys.argv[1:]))
    if outcome.interrupted:
        raise SystemExit(128 + signal.SIGINT)


@app.command(name="recipe")
def show_recipe(recipe: RecipeDir, overrides: Overrides = None) -> None:
    """Print a recipe with every setting resolved, and the size of its model."""
    from keural.model import KeuralConfig, count_parameters

    loaded, _ = open_recipe(recipe, overrides, None)
    shape = loaded.spec.model.model_dump(exclude={"rope_theta"})
    total, active = count_parameters(KeuralConfig(**shape, vocab_size=loaded.spec.tokenizer.vocab_size + 2))
    print(yaml.safe_dump(loaded.resolved(), allow_unicode=True, sort_keys=False), end="")
    print(f"# parameters: {total:,} in all, {active:,} active per token")


@app.command()
def chat(
    path: ModelPath,
    engine: EngineName = None,
    system: System = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    threads: Threads = None,
    jamo: JamoStyle = "compatibility",
) -> None:
    """Talk to a model in the terminal (/system TEXT, /reset, /help, /exit)."""
    from keural.serve.chat import run_chat

    sampling = _sampling(path, engine, temperature, top_p, repetition_penalty, max_new_tokens, seed)
    raise SystemExit(run_chat(path, sampling, system, jamo, engine, threads))


def _sampling(path: Path, engine: str | None, *given: float | int | None) -> "SamplingParams":
    """The settings given on the command line, and for the others those the model was saved with."""
    from keural.serve.engines.registry import chat_defaults

    names = (*SamplingDefaults._fields, "seed")
    changes: dict[str, Any] = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    return replace(chat_defaults(path, engine)[0], **changes)


@app.command()
def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Option(help="the user's message, or the text to continue with --raw")],
    engine: EngineName = None,
    system: System = None,
    raw: Annotated[bool, typer.Option(help="continue the text as it stands, without chat markers")] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    threads: Threads = None,
    jamo: JamoStyle = "compatibility",
) -> None:
    """Answer one prompt on standard output."""
    from keural.serve.generate import run_generate

    sampling = _sampling(path, engine, temperature, top_p, repetition_penalty, max_new_tokens, seed)
    raise SystemExit(run_generate(path, prompt, sampling, system, raw, jamo, engine, threads))
