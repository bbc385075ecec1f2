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

import keural
from keural.card import SamplingDefaults
from keural.cli import checkpoints, data, evaluate, plan, tokenizer
from keural.cli.endings import one_line_endings
from keural.cli.options import (
    RECIPE,
    DryRun,
    EngineName,
    JamoStyle,
    MaxNewTokens,
    ModelPath,
    Out,
    Overrides,
    RecipeDir,
    ReferenceOnly,
    RepetitionPenalty,
    Seed,
    StageFile,
    System,
    Temperature,
    TensorBoard,
    Threads,
    TopP,
    Wandb,
    boards,
    open_recipe,
    open_stage,
)
from keural.errors import UserError
from keural.limits import LARGEST, LONGEST_SECONDS, MOST_SLOTS
from keural.terminal import show, show_text, yaml_text

if TYPE_CHECKING:
    from keural.pipeline.run import Outcome
    from keural.recipe import Recipe
    from keural.serve.engines.sampling_params import SamplingParams

RECIPES, DATA, USE = "Recipes and runs", "Data and tokenizers", "Talking to a model"
"""Groups of commands in the help; those around checkpoints have theirs."""


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"keural {keural.__version__}")
        raise typer.Exit


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.split("\n")[0], pretty_exceptions_enable=False)
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel=DATA)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.add_typer(evaluate.app, name="evaluate", rich_help_panel=RECIPES)
app.add_typer(plan.app)
app.add_typer(checkpoints.app)


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print the version")] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command line; the process's exit code says how it went."""
    with one_line_endings():
        sys.exit(app(prog_name="keural", standalone_mode=False))


@app.command(rich_help_panel=RECIPES)
def run(
    recipe: RecipeDir,
    overrides: Overrides = None,
    out: Out = None,
    until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    tensorboard: TensorBoard = False,
    wandb: Wandb = False,
    reference_only: ReferenceOnly = False,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe's whole pipeline; finished stages are skipped, an interrupted one is resumed."""
    shown_on = boards(tensorboard=tensorboard, wandb=wandb)
    loaded, directory = open_recipe(recipe, overrides, out)
    _check(loaded, directory, until=until)
    _run(loaded, directory, until=until, boards=shown_on, reference_only=reference_only, dry_run=dry_run)


@app.command(rich_help_panel=RECIPES)
def train(
    stage: StageFile,
    overrides: Overrides = None,
    out: Out = None,
    tensorboard: TensorBoard = False,
    wandb: Wandb = False,
    reference_only: ReferenceOnly = False,
    dry_run: DryRun = False,
) -> None:
    """Run one stage (with torchrun: on many processes); the stage it starts from must be finished."""
    shown_on = boards(tensorboard=tensorboard, wandb=wandb)
    loaded, name, directory = open_stage(stage, overrides, out)
    _check(loaded, directory, only=name)
    _run(loaded, directory, only=name, boards=shown_on, reference_only=reference_only, dry_run=dry_run)


def _check(recipe: "Recipe", directory: Path, *, until: str | None = None, only: str | None = None) -> None:
    """Refuse what cannot work before torch is imported, which takes seconds; under torchrun rank 0 looks for all, later."""
    from keural.pipeline import workspace

    if "LOCAL_RANK" not in os.environ:
        workspace.check_inputs(recipe, workspace.select_stages(recipe, until=until, only=only), directory)


def _run(recipe: "Recipe", directory: Path, **settings: Any) -> None:
    """Run stages of a recipe; print what was prepared for them, and how it ended."""
    from keural.cli import printing
    from keural.pipeline.run import run as run_recipe

    with printing.tables_of_unusable():
        _end(run_recipe(recipe, directory, on_data=printing.print_made, **settings))


def _end(outcome: "Outcome") -> None:
    """Say how the run ended; exit with the signal's code when one stopped it."""
    from keural.cli import printing

    if int(os.environ.get("RANK", "0")) == 0:
        printing.print_ending(outcome, shlex.join(sys.argv[1:]))
    if outcome.interrupted:
        raise SystemExit(128 + signal.SIGINT)


@app.command(name="recipe", rich_help_panel=RECIPES)
def show_recipe(
    recipe: Annotated[Path | None, RECIPE] = None,
    overrides: Overrides = None,
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="say what a key or section means, and nothing else")] = None,
) -> None:
    """Print a recipe with every setting resolved, and the size of its model; or what a key means."""
    if (recipe is None) == (explain is None):
        raise UserError("give either a recipe, to see its settings, or --explain KEY, to see what a key means")
    if explain is not None:
        from keural.recipe.reference import explain as explained

        show_text(explained(explain))
    else:
        assert recipe is not None
        _print_recipe(recipe, overrides)


def _print_recipe(recipe: Path, overrides: list[str] | None) -> None:
    from keural.model.parameters import CHATML_IDS, count_weights

    loaded, _ = open_recipe(recipe, overrides, None)
    total, active = count_weights(loaded.spec.model, loaded.spec.tokenizer.vocab_size + CHATML_IDS)
    show_text(yaml_text(loaded.resolved()))
    show(f"# parameters: {total:,} in all, {active:,} active per token")


@app.command(rich_help_panel=RECIPES)
def recipes(
    name: Annotated[str | None, typer.Argument(help="one of them")] = None,
    copy: Annotated[Path | None, typer.Option(metavar="DIR", help="write a copy of it here, to be changed")] = None,
) -> None:
    """List the recipes that come with the package, or copy one out."""
    from keural.recipe import shipped

    if copy is not None:
        if name is None:
            raise UserError("--copy needs the name of a recipe: keural recipes toy --copy my-toy")
        show(f"{shipped.copy(name, copy)}: a copy of {name}; run it with `keural run {copy}`")
        return
    chosen = shipped.names() if name is None else [shipped.shipped(name).name]
    for known, description in shipped.descriptions():
        if known in chosen:
            show(f"{known:<{max(map(len, chosen))}}  {description}")


@app.command(rich_help_panel=USE)
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
    sampling = _sampling(path, engine, temperature, top_p, repetition_penalty, max_new_tokens, seed)
    from keural.serve.chat import run_chat

    raise SystemExit(run_chat(path, sampling, system, jamo, engine, threads))


def _sampling(path: Path, engine: str | None, *given: float | int | None) -> "SamplingParams":
    """The settings given on the command line, and for the others those the model was saved with."""
    from keural.serve.engines.registry import chat_defaults

    names = (*SamplingDefaults._fields, "seed")
    changes: dict[str, Any] = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    return replace(chat_defaults(path, engine)[0], **changes)


@app.command(rich_help_panel=USE)
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


@app.command(rich_help_panel=USE)
def serve(
    path: ModelPath,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for other machines, with --api-key-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    engine: Annotated[
        str | None,
        typer.Option(help="transformers, llama.cpp (default: what the path holds), vllm or sglang"),
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(metavar="URL,...", help="vllm, sglang: servers that run already, instead of one of our own"),
    ] = None,
    upstream_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="their API key")] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="vllm, sglang: where the export is or is made (default: beside the model)"),
    ] = None,
    engine_args: Annotated[str, typer.Option(help="vllm, sglang: more of its command line, e.g. '--tensor-parallel-size 2'")] = "",
    slots: Annotated[
        int | None, typer.Option(min=1, max=MOST_SLOTS, help="answers at once; others wait (default: 4, with vllm or sglang 256)")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the model in the API (default: its recipe's, else its directory's)")] = None,
    system: System = None,
    repetition_penalty: RepetitionPenalty = None,
    threads: Threads = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="transformers on a GPU: without compiled steps and CUDA graphs, several times as slow")
    ] = False,
    jamo: JamoStyle = "compatibility",
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="let in who has a key, one on each line of it")] = None,
    insecure: Annotated[bool, typer.Option(help="let other machines in without a key")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="another name for a server on this machine")] = None,
    max_waiting: Annotated[
        int | None, typer.Option(min=0, max=LARGEST, help="answers that wait (default: 4 times --slots)")
    ] = None,
    deadline: Annotated[float, typer.Option(min=1, max=LONGEST_SECONDS, help="seconds for an answer, waiting included")] = 600,
    drain: Annotated[float, typer.Option(min=0, max=LONGEST_SECONDS, help="seconds for answers under way after a signal")] = 30,
    metrics_prefix: Annotated[str, typer.Option(help="of the names in /metrics; vllm suits ready dashboards")] = "keural",
) -> None:
    """Answer many at once through OpenAI's API, until Ctrl-C."""
    from keural.serve.server.settings import Limits, Settings
    from keural.serve.server.start import run_serve

    settings = Settings(
        host, port, engine, slots, name, system, jamo, threads, api_key_file, insecure, allow_host or (), metrics_prefix,
        upstream=upstream or (), upstream_key_file=upstream_key_file, export=export, engine_arguments=engine_args,
        repetition_penalty=repetition_penalty, eager=eager,
    )  # fmt: skip
    waiting = 4 * settings.answers_at_once if max_waiting is None else max_waiting
    settings = replace(settings, limits=Limits(waiting=waiting, deadline=deadline, drain=drain))
    raise SystemExit(run_serve(path, settings))
