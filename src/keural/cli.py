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

from keural import cli_checkpoints
from keural.errors import UserError
from keural.recipe import Recipe, load_recipe
from keural.serve.jamo import Jamo

if TYPE_CHECKING:
    from keural.pipeline import Outcome
    from keural.serve.sampling import Sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.split("\n")[0], pretty_exceptions_enable=False)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train, convert and examine tokenizers.")
data_app = typer.Typer(no_args_is_help=True, help="Prepare data and look at what a training step sees.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(cli_checkpoints.app)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.lr=1e-5, data=DIR, sft-1.train.steps=100")]
Out = Annotated[Path | None, typer.Option(help="run directory (default: runs/<recipe>)")]
RecipeDir = Annotated[Path, typer.Argument(help="directory with recipe.yaml")]
ModelDir = Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final")]
ModelPath = Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final, or a GGUF file or the directory with one")]

DEFAULT = "default: as saved with the model, else the card's"
System = Annotated[str | None, typer.Option(help="system message; an empty one is none (default: as saved with the model)")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help=f"0 is greedy ({DEFAULT}, 0.7)")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help=f"({DEFAULT}, 0.9)")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, help=f"({DEFAULT}, 1.1)")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help=f"({DEFAULT}, 256)")]
Seed = Annotated[int | None, typer.Option(help="repeatable sampling")]
EngineName = Annotated[str | None, typer.Option("--engine", help="transformers or llama.cpp (default: what the path holds)")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads to compute with (default: the engine's choice)")]
DataFormat = Annotated[str, typer.Option("--format", help="published (keural_NNN.bin, .idx, .meta; import only) or megatron")]
JamoStyle = Annotated[
    Jamo, typer.Option(help="published tokenizer: letters that stand alone as typed (ㅋㅋㅋ), or as they are decoded (ᄏᄏᄏ)")
]


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
    from keural import pipeline

    loaded, directory = _recipe(recipe, overrides, out)
    outcome = pipeline.run(loaded, directory, until=until, tensorboard=tensorboard)
    _end(outcome)


@app.command()
def train(
    stage: Annotated[Path, typer.Argument(help="a stage's YAML file, with recipe.yaml beside it")],
    overrides: Overrides = None,
    out: Out = None,
    tensorboard: Annotated[bool, typer.Option(help="also write TensorBoard files")] = False,
) -> None:
    """Run one stage (with torchrun: on many processes); the stage it starts from must be finished."""
    from keural import console, pipeline

    loaded, directory = _recipe(console.stage_file(stage).parent, overrides, out)
    outcome = pipeline.run(loaded, directory, only=stage.stem, tensorboard=tensorboard)
    _end(outcome)


def _recipe(directory: Path, overrides: list[str] | None, out: Path | None) -> tuple[Recipe, Path]:
    """The recipe of a command, with its overrides, and the run directory."""
    recipe = load_recipe(directory, overrides or ())
    return recipe, out or Path("runs") / recipe.spec.name


def _end(outcome: "Outcome") -> None:
    """Say how the run ended; exit with the signal's code when one stopped it."""
    from keural import console

    if int(os.environ.get("RANK", "0")) == 0:
        console.print_ending(outcome, shlex.join(sys.argv[1:]))
    if outcome.interrupted:
        raise SystemExit(128 + signal.SIGINT)


@app.command(name="recipe")
def show_recipe(recipe: RecipeDir, overrides: Overrides = None) -> None:
    """Print a recipe with every setting resolved, and the size of its model."""
    from keural.model import KeuralConfig, count_parameters

    loaded, _ = _recipe(recipe, overrides, None)
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


def _sampling(path: Path, engine: str | None, *given: float | int | None) -> "Sampling":
    """The settings given on the command line, and for the others those the model was saved with."""
    from keural.serve.engine import chat_defaults

    names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed")
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
    from keural.serve.complete import run_generate

    sampling = _sampling(path, engine, temperature, top_p, repetition_penalty, max_new_tokens, seed)
    raise SystemExit(run_generate(path, prompt, sampling, system, raw, jamo, engine, threads))


@tokenizer_app.command("train")
def tokenizer_train(recipe: RecipeDir, overrides: Overrides = None, out: Out = None) -> None:
    """Train the tokenizer of a recipe."""
    from keural import pipeline

    loaded, directory = _recipe(recipe, overrides, out)
    pipeline.check_inputs(loaded, (), directory)
    tokenizer = pipeline.prepare_tokenizer(loaded, directory)
    print(f"{directory / 'tokenizer'}: {tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256}")


@tokenizer_app.command("convert")
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
    print(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256}")


@tokenizer_app.command("report")
def tokenizer_report(
    model: Annotated[Path, typer.Argument(help="SentencePiece model file or tokenizer directory")],
    files: Annotated[list[Path], typer.Argument(help="text files to measure on")],
) -> None:
    """Characters and bytes per token, tokens per word, and round trips on given files."""
    from keural.tokenizer import KeuralTokenizer
    from keural.tokenizer.report import format_report, tokenizer_report

    print(format_report(tokenizer_report(KeuralTokenizer.load(model), files)))


@data_app.command("prepare")
def data_prepare(recipe: RecipeDir, overrides: Overrides = None, out: Out = None) -> None:
    """Read, check and tokenise the data of every stage; print what was kept and what was dropped, and why."""
    from keural import console, pipeline

    loaded, directory = _recipe(recipe, overrides, out)
    pipeline.check_inputs(loaded, loaded.stages, directory)
    console.print_data(pipeline.prepare_all(loaded, loaded.stages, directory))


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="directory or file with tokenised data")],
    store: Annotated[Path, typer.Argument(help="token store to write; must not exist, or be empty")],
    format_name: DataFormat,
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer the data was made with: a .model file or a directory")],
    restore_lost: Annotated[
        bool, typer.Option(help="published: give the lost first token of each shard back as BOS (it was one by the packing rule)")
    ] = True,
    license: Annotated[str | None, typer.Option(help="licence of the data, for the manifest")] = None,
) -> None:
    """Turn tokenised data of another format into a token store; print what it held and what was lost."""
    from keural import console
    from keural.data.importing import ImportOptions, import_tokens
    from keural.tokenizer import KeuralTokenizer

    with console.byte_progress(f"import {source}") as advance:
        options = ImportOptions(restore_lost, license)
        counts = import_tokens(source, store, format_name, KeuralTokenizer.load(tokenizer), options, advance)
    console.print_counts(f"{store}: imported from {source} ({format_name})", counts)


@data_app.command("export")
def data_export(
    store: Annotated[Path, typer.Argument(help="token store directory")],
    out: Annotated[Path, typer.Argument(help="directory to write; must not exist, or be empty")],
    format_name: DataFormat,
) -> None:
    """Write a token store of documents as other trainers read it."""
    from keural.data.importing import export_tokens
    from keural.data.store import TokenStore

    opened = TokenStore.open(store)
    export_tokens(opened, out, format_name)
    print(f"{out}: {opened.num_sequences:,} documents, {opened.num_tokens:,} tokens, written as {format_name}")


@data_app.command("stats")
def data_stats(
    path: Annotated[Path, typer.Argument(help="token store, published shards, prepared or cleaned data, or a recipe")],
    overrides: Overrides = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Counts of a token store or of shards; what cleaning dropped, with examples; the mixture of prepared data or of a recipe."""
    from keural import data_stats

    print(data_stats.describe(path, overrides or [], out, as_json), end="")


@data_app.command("show")
def data_show(
    stage: Annotated[Path, typer.Argument(help="a stage's YAML file, with recipe.yaml beside it")],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="optimizer step, counted from 0")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="rows to print")] = 4,
    out: Out = None,
) -> None:
    """Print the batch of one optimizer step: each row's documents, with trained tokens marked."""
    from keural import console, pipeline

    loaded, directory = _recipe(console.stage_file(stage).parent, overrides, out)
    shown = loaded.stage(stage.stem)
    pipeline.check_inputs(loaded, [shown], directory)
    console.show_batch(pipeline.prepare_all(loaded, [shown], directory), shown, step, rows)
