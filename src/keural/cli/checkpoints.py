"""The commands around checkpoints: `import`, `export`, `merge`, `refresh-code`, `inspect`, `init`; part of the `keural` command."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from keural.cli.options import Overrides, RecipeDir, open_recipe
from keural.errors import UserError, nearest
from keural.limits import LARGEST
from keural.terminal import byte_progress, note, show, show_json

MAX_SHARD_GB = 1_000_000
DTYPES = ("float32", "float16", "bfloat16")

app = typer.Typer(no_args_is_help=True)
PANEL = "Checkpoints"

NewDir = Annotated[Path, typer.Argument(help="directory to write; must not exist, or be empty")]
Tokenizer = Annotated[Path | None, typer.Option(help="SentencePiece model, or a directory with tokenizer.model")]


@app.command(name="import", rich_help_panel=PANEL)
def import_(
    source: Annotated[Path, typer.Argument(help=".pt or .safetensors file, or a directory with one checkpoint")],
    out: NewDir,
    tokenizer: Tokenizer = None,
    config: Annotated[Path | None, typer.Option(help="config.json, in place of the one that came with the checkpoint")] = None,
    grow_vocabulary: Annotated[
        bool, typer.Option("--grow-vocabulary", help="add the two ChatML ids, at the mean of the other rows")
    ] = False,
    sliding_window: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="keys a token of a sliding layer sees, itself included")
    ] = None,
    verify: Annotated[bool, typer.Option(help="compare the checksums inside a .pt first")] = True,
) -> None:
    """Turn a published or foreign checkpoint into a model directory."""
    from keural.files import check_new, read_object
    from keural.pretrained.location import CHECKPOINTS, check_there

    check_new(out)
    check_there(source, CHECKPOINTS)
    if config is not None:
        read_object(config)
    if tokenizer is not None:
        check_there(tokenizer, "a SentencePiece model or a directory with tokenizer.model")
    from keural.convert.import_checkpoint import import_checkpoint

    with byte_progress(f"import {source}") as advance:
        import_checkpoint(
            source,
            out,
            tokenizer=tokenizer,
            config=config,
            grow_vocabulary=grow_vocabulary,
            sliding_window=sliding_window,
            verify=verify,
            advance=advance,
        )


@app.command(rich_help_panel=PANEL)
def export(
    directory: Annotated[Path, typer.Argument(help="model directory, e.g. runs/toy/final")],
    out: NewDir,
    format: Annotated[str, typer.Option("--format", help="hf, granite, gguf or pt")],
    quantize: Annotated[str | None, typer.Option(help="gguf only: f32, f16, bf16, q8_0, q4_k_m (default: as stored)")] = None,
    license: Annotated[str | None, typer.Option(help="hf and granite: licence of the weights, for the model card")] = None,
    shard_gb: Annotated[
        float | None, typer.Option(min=0.001, help="hf and granite: largest weight file, in GB (default 5)")
    ] = None,
) -> None:
    """Write a model as transformers, vLLM, SGLang, llama.cpp or the published scripts read it."""
    from keural.convert.export import ExportOptions
    from keural.convert.export import export as write

    def scores() -> dict[str, Any] | None:
        from keural.pipeline.scores import scores_of

        return scores_of(directory)

    if shard_gb is not None and not shard_gb < MAX_SHARD_GB:
        raise UserError(f"--shard-gb {shard_gb}: give a number of gigabytes below {MAX_SHARD_GB:,}")
    options = ExportOptions(quantize, license, None if shard_gb is None else int(shard_gb * 1e9), scores)
    with byte_progress(f"export {directory}") as advance:
        written = write(directory, out, format, options, advance, note)
    show(f"{written}: written as {format}")


@app.command(rich_help_panel=PANEL)
def merge(
    adapter: Annotated[Path, typer.Argument(help="adapter directory, or a stage that was trained with lora")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="directory to write; must not exist, or be empty")],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the model that it was trained on (default: where it was then)")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or float16 or bfloat16, which round most of an adapter away")] = "float32",
) -> None:
    """Write the model that an adapter and the model it was trained on are together."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown{nearest(dtype, DTYPES)}; known are {', '.join(DTYPES)}")
    from keural.files import check_new

    check_new(to)
    import torch

    from keural.lora.merge import merge as write

    with byte_progress(f"merge {adapter}") as advance:
        write(adapter, to, base, getattr(torch, dtype), advance, note)
    show(f"{to}: {adapter} in its base, {dtype}")


@app.command(name="refresh-code", rich_help_panel=PANEL)
def refresh_code(
    directory: Annotated[Path, typer.Argument(help="model directory, e.g. one that an earlier version exported")],
) -> None:
    """Put this version's network code into a model directory; weights and everything else stay as they are."""
    from keural.pretrained.network_code import refresh_code as refresh

    changed = refresh(directory)
    show(f"{directory}: {'now carries' if changed else 'already carried'} this package's network code")


@app.command(rich_help_panel=PANEL)
def inspect(
    path: Annotated[Path, typer.Argument(help="model directory, or a checkpoint that is not imported yet")],
    verify: Annotated[bool, typer.Option("--verify", help="compare the files with their checksums")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a model is, computed from its files, beside what the model card says."""
    from keural.pretrained.location import check_there

    check_there(path, "a model directory or a checkpoint")
    from keural.cli import printing
    from keural.convert.inspection import NOTHING, inspect_path

    values = inspect_path(path, verify)
    if as_json:
        show_json(values)
    else:
        printing.print_inspection(values)
    if verify and values["verified"].startswith(NOTHING):  # a check that could not be made has not passed
        raise UserError(f"{path}: {NOTHING}; compare the files with their source by other means, or inspect without --verify")


@app.command(rich_help_panel=PANEL)
def init(
    recipe: RecipeDir,
    out: NewDir,
    overrides: Overrides = None,
    tokenizer: Tokenizer = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 (default: bfloat16, or the dense model's)")
    ] = None,
    from_dense: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="a Llama-shaped model, whose feed-forward networks become the experts (upcycling)"),
    ] = None,
) -> None:
    """Write the start of a model in a recipe's shape: random, or a dense model whose logits it keeps."""
    from keural.files import check_new
    from keural.pretrained.location import check_there

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown{nearest(dtype, DTYPES)}; known are {', '.join(DTYPES)}")
    check_new(out)
    if from_dense is not None:
        check_there(from_dense, "the directory of a dense model")
    loaded, _ = open_recipe(recipe, overrides, None)
    from keural.pipeline import workspace
    from keural.tokenizer import KeuralTokenizer

    if tokenizer is not None:
        used = KeuralTokenizer.load(tokenizer)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            used = workspace.prepare_tokenizer(loaded, Path(scratch))
    import torch

    from keural.convert.initialise import initialise
    from keural.convert.upcycle import upcycle

    config = workspace.build_config(loaded, used)
    spec = loaded.spec
    with byte_progress(f"init {spec.name}") as advance:
        if from_dense is not None:
            kept = None if dtype is None else getattr(torch, dtype)
            upcycle(
                from_dense,
                out,
                config,
                used,
                recipe=spec.name,
                chat=spec.chat,
                seed=spec.seed,
                dtype=kept,
                named_tokenizer=tokenizer is not None,
                advance=advance,
            )
            return
        stored = dtype or "bfloat16"
        options = {"recipe": spec.name, "chat": spec.chat, "seed": spec.seed, "dtype": getattr(torch, stored)}
        initialise(out, config, used, **options, advance=advance)
    show(f"{out}: {spec.name}, {stored}, seed {spec.seed}")
