"""`keural data`: prepare data and look at what a training step sees."""

from pathlib import Path
from typing import Annotated

import typer

from keural.cli.options import Out, Overrides, RecipeDir, StageFile, open_recipe, open_stage
from keural.limits import LARGEST
from keural.terminal import byte_progress, show, show_text

app = typer.Typer(no_args_is_help=True, help="Prepare data and look at what a training step sees.")

DataFormat = Annotated[str, typer.Option("--format", help="published (keural_NNN.bin, .idx, .meta; import only) or megatron")]


@app.command("prepare")
def data_prepare(recipe: RecipeDir, overrides: Overrides = None, out: Out = None) -> None:
    """Read, check and tokenise the data of every stage; print what was kept and what was dropped, and why."""
    from keural.cli import printing
    from keural.pipeline import workspace

    loaded, directory = open_recipe(recipe, overrides, out)
    workspace.check_inputs(loaded, loaded.stages, directory)
    with printing.tables_of_unusable():
        printing.print_data(workspace.prepare_all(loaded, loaded.stages, directory))


@app.command("try")
def data_try(
    path: Annotated[Path, typer.Argument(metavar="SOURCE.yaml|FILE|DIR", help="data, or a YAML file with a source or a stage")],
    given: Annotated[
        list[str] | None, typer.Argument(metavar="[data=DIR] [OPTION=VALUE]...", help="what paths are relative to; options to try")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="the adapter to try (default: the one that fits best)")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="count tokens with this one: a directory, a run or a .model file")] = None,
) -> None:
    """Say what data is before there is a recipe: format, adapter, rows that are kept and dropped, and the YAML to paste."""
    from keural.cli import data_try

    data_try.show_trials(path, adapter, given or [], tokenizer)


@app.command("fetch")
def data_fetch(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|evaluation", help="a recipe, or the sets of the tasks of `keural evaluate`")
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="where each set gets a folder; what is there already stays")],
    only: Annotated[list[str] | None, typer.Option(help="only this set; may be given several times")] = None,
) -> None:
    """Bring the public sets that a recipe or the tasks read, with git, at fixed commits; then `keural run RECIPE data=DIR`."""
    from keural.data.preview.fetch import fetch
    from keural.evaluate.tasks.places import FETCHED, SETS
    from keural.recipe.shipped import recipe_directory

    is_of_tasks = str(recipe) == SETS and not recipe.exists()
    fetch(FETCHED if is_of_tasks else recipe_directory(recipe), out, only or ())


@app.command("adapters")
def data_adapters(name: Annotated[str | None, typer.Argument(help="one of them")] = None) -> None:
    """List the adapters; or say what one reads, its options, and why it drops a row."""
    from keural.data.preview import reference

    show_text(reference.listing() if name is None else reference.explain(name))


@app.command("import")
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
    from keural.cli import printing
    from keural.data.tokens.import_export import ImportOptions, import_tokens
    from keural.tokenizer import KeuralTokenizer

    with byte_progress(f"import {source}") as advance:
        options = ImportOptions(restore_lost, license)
        counts = import_tokens(source, store, format_name, KeuralTokenizer.load(tokenizer), options, advance)
    printing.print_counts(f"{store}: imported from {source} ({format_name})", counts)


@app.command("export")
def data_export(
    store: Annotated[Path, typer.Argument(help="token store directory")],
    out: Annotated[Path, typer.Argument(help="directory to write; must not exist, or be empty")],
    format_name: DataFormat,
) -> None:
    """Write a token store of documents as other trainers read it."""
    from keural.data.tokens.import_export import export_tokens
    from keural.data.tokens.store import TokenStore

    opened = TokenStore.open(store)
    export_tokens(opened, out, format_name)
    show(f"{out}: {opened.num_sequences:,} documents, {opened.num_tokens:,} tokens, written as {format_name}")


@app.command("stats")
def data_stats(
    path: Annotated[Path, typer.Argument(help="token store, published shards, prepared or cleaned data, or a recipe")],
    overrides: Overrides = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Counts of a token store or of shards; what cleaning dropped, with examples; the mixture of prepared data or of a recipe."""
    from keural.cli import data_stats

    show_text(data_stats.describe(path, overrides or [], out, as_json))


@app.command("show")
def data_show(
    stage: StageFile,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, max=LARGEST, help="optimizer step, counted from 0")] = 0,
    rows: Annotated[int, typer.Option(min=1, max=LARGEST, help="rows to print")] = 4,
    dropped: Annotated[
        str | None, typer.Option(metavar="REASON", help="print rows that were dropped instead; all: for any reason")
    ] = None,
    out: Out = None,
) -> None:
    """Print the batch of one optimizer step: each row's documents, with trained tokens marked; or dropped rows.

    What is prepared already needs no data=DIR.
    """
    from keural.cli import printing
    from keural.pipeline import workspace

    loaded, name, directory = open_stage(stage, overrides, out)
    shown = loaded.stage(name)
    workspace.check_inputs(loaded, [shown], directory)
    prepared = workspace.prepare_all(loaded, [shown], directory)
    printing.note_unseen(prepared)
    if dropped is not None:
        printing.show_dropped(prepared.data[shown.name], dropped)
    else:
        printing.show_batch(prepared, shown, step, rows)
