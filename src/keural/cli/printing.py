"""What the commands print: the end of a run, the data table, the batch of a step, what a model is, how far a conversion is."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from keural.data.loading.batch import Batch
from keural.data.source_counts import SourceRow
from keural.files import read_json
from keural.pipeline.workspace import Workspace, open_stream
from keural.recipe import StageSpec
from keural.serve.text import printable

if TYPE_CHECKING:
    from keural.pipeline.run import Outcome


def print_ending(outcome: "Outcome", arguments: str) -> None:
    """Stages, figures, sample exchanges and the line that opens a chat; or how to go on after an interruption.

    `arguments` are those that the command was given, every option included.
    """
    console = Console(highlight=False)
    if outcome.interrupted:
        again = f"{_command()} {arguments}"
        console.print(f"stopped and saved; the same command goes on from there:\n  {again}", markup=False, soft_wrap=True)
        return
    summary = read_json(outcome.directory / "summary.json")
    console.print(_stage_table(summary["stages"]))
    for line in _figures(summary["evaluation"]):
        console.print(line, markup=False, soft_wrap=True)
    for sample in summary["samples"]:
        console.print(Text(f"\n> {sample['prompt']}", style="bold"))
        console.print(sample["answer"], markup=False)
    console.print(f"\nreport: {outcome.directory / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"chat:   {_command()} chat {outcome.directory / 'final'}", markup=False, soft_wrap=True)


def _command() -> str:
    """The command as it was called, so that a printed line can be pasted even where the environment is not active."""
    return sys.argv[0] if Path(sys.argv[0]).name == "keural" else "keural"


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    table = Table(title="stages")
    for name in ("stage", "steps", "tokens", "seconds", "loss first", "loss last", "held out"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in stages:
        heldout = stage["heldout"].get("loss")
        table.add_row(
            stage["name"],
            f"{stage['steps']:,}",
            f"{stage['tokens']:,}",
            f"{stage['seconds']:.1f}",
            f"{stage['loss_first']:.3f}",
            f"{stage['loss_last']:.3f}",
            "" if heldout is None else f"{heldout:.3f}",
        )
    return table


def _figures(evaluation: dict[str, Any]) -> list[str]:
    lines = []
    if "accuracy" in evaluation:
        before = evaluation.get("before", {}).get("accuracy")
        lines.append(
            f"held-out exact match: {evaluation['accuracy']:.3f}"
            + (f" (before the last DPO {before:.3f})" if before is not None else "")
        )
        lines.append("  by task: " + ", ".join(f"{task} {value:.3f}" for task, value in evaluation["by_task"].items()))
        lines.append("  by language: " + ", ".join(f"{name} {value:.3f}" for name, value in evaluation["by_language"].items()))
        lines.append(f"held-out preferences: {evaluation['preference_accuracy']:.3f}")
        lines.append(
            "polite Korean answers: " + ", ".join(f"{when} {rate:.3f}" for when, rate in evaluation["polite_rate"].items())
        )
    for measure in evaluation.get("bits_per_byte", []):
        models = ", ".join(f"{name} {value:.3f}" for name, value in measure["models"].items())
        lines.append(f"bits per byte, {measure['name']} ({measure['bytes']:,} bytes): {models}, xz -9 {measure['xz']:.3f}")
    return lines


def print_data(workspace: Workspace) -> None:
    """Per stage and source: rows, kept, tokens, every reason of a drop with its count and first place, and what an epoch holds."""
    console = Console(highlight=False)
    for name, prepared in workspace.data.items():
        table = Table(title=name)
        for column in ("source", "rows", "kept", "tokens", "dropped"):
            table.add_column(column, justify="left" if column in {"source", "dropped"} else "right", overflow="fold")
        for row in prepared.table:
            drops = "\n".join(
                f"{reason} {count:,} (first: {row.first_drop[reason]}{_details(row, reason)})"
                for reason, count in row.drops.items()
            )
            drops += "".join(f"\n{reason} {count:,} (kept)" for reason, count in row.noted.items())
            drops += f"\nnot read: {', '.join(row.not_read)}" if row.not_read else ""
            drops = f"left out: {row.left_out}" if row.left_out else drops.strip()
            source, drops = escape(row.source), escape(drops)  # names of files may hold brackets
            table.add_row(source, f"{row.rows:,}", f"{row.kept:,}", f"{row.tokens:,}", drops)
        console.print(table)
        if any(row.mixture for row in prepared.table):
            console.print(_mixture_table(name, prepared.table))
        for evaluation_set, found in (prepared.contamination or {}).items():
            short = f", {found['too_short']:,} too short to be looked for" if found["too_short"] else ""
            line = f"contamination: {found['records']:,} records hold items of {evaluation_set} ({found['items']:,} items{short})"
            console.print(line, markup=False)
        for row in prepared.table:
            if row.survey:
                console.print(row.survey, markup=False, soft_wrap=True)
            if row.warning:
                console.print(f"warning: {row.warning}", markup=False)
            if "benchmark" in row.flags and not row.left_out:
                console.print(
                    f"warning: source {row.source!r} is a benchmark; after training on it scores of its family mean nothing "
                    "(data.benchmarks=false leaves it out)",
                    markup=False,
                )


def _details(row: SourceRow, reason: str) -> str:
    """What was found in the rows of a reason, the most frequent three of it."""
    found = (row.details or {}).get(reason, {})
    return "".join(f"; {detail} {count:,}" for detail, count in list(found.items())[:3])


def _mixture_table(name: str, rows: list[SourceRow]) -> Table:
    """What an epoch of mixed data holds: each part's share as it should be and as it is (of tokens; dpo: pairs), and how much."""
    table = Table(title=f"{name}: an epoch")
    for column in ("source", "target", "share", "repeats", "records", "tokens"):
        table.add_column(column, justify="left" if column == "source" else "right", overflow="fold")
    for row in rows:
        if share := row.mixture:
            shares = [f"{share.target:.1%}", f"{share.share:.1%}", f"{share.repeats:.2f}"]
            table.add_row(escape(row.source), *shares, f"{share.records:,}", f"{share.tokens:,}")
    return table


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    """A title and named counts, one a line."""
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    width = max(len(f"{count:,}") for count in counts.values())
    for name, count in counts.items():
        console.print(f"  {count:>{width},}  {name.replace('_', ' ')}", markup=False)


def show_batch(workspace: Workspace, stage: StageSpec, step: int, rows: int) -> None:
    """Print the first rows of the batch of `step`: trained tokens are underlined, documents of a row are apart."""
    console = Console(highlight=False)
    stream = open_stream(workspace, stage)
    batch = stream.batch(step)
    count, length = batch.input_ids.shape
    console.print(
        f"{stage.name} step {step}: {count} rows of {length} tokens, {int((batch.labels >= 0).sum())} trained", markup=False
    )
    for row in range(min(rows, count)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            console.print(_segment(workspace, batch, row, segment), soft_wrap=True)


def _segment(workspace: Workspace, batch: "Batch", row: int, segment: int) -> Text:
    """One document of a row: its place in the store, then its text; a token is underlined when predicting it is trained."""
    inside = (batch.segment_ids[row] == segment).nonzero()[0]
    ids = batch.input_ids[row, inside].tolist()
    trained = [False, *(batch.labels[row, inside[:-1]] >= 0).tolist()]
    text = Text(f"[row {row}, sequence {int(batch.sequence_ids[row, inside[0]])}, {len(ids)} tokens] ", style="dim")
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            piece = workspace.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            text.append(piece, style="not dim underline" if trained[start] else "not dim")
            start = end
    return text


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how many bytes were worked on; gives the function that is told of more."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(what), total=None)
        yield lambda count: progress.advance(task, count)


def print_inspection(values: Mapping[str, Any]) -> None:
    """What `keural inspect` found: the values, then the ledger of the model card's figures."""
    console = Console(highlight=False)
    for name, value in values.items():
        if name in {"ledger", "lineage"} or value is None:
            continue
        if isinstance(value, Mapping):
            console.print(f"{name}:", markup=False)
            for key, entry in value.items():
                console.print(f"  {key}: {_number(entry)}", markup=False, soft_wrap=True)
        else:
            console.print(f"{name}: {_number(value)}", markup=False, soft_wrap=True)
    lineage = values.get("lineage", {})
    if lineage:
        console.print(printable(f"lineage: {' -> '.join(lineage.get('chain', []))}"), markup=False, soft_wrap=True)
        for name in ("recipe", "stage", "source", "fingerprint", "keural", "transformers"):
            if name in lineage:
                console.print(printable(f"  {name}: {lineage[name]}"), markup=False, soft_wrap=True)
    if values.get("ledger"):
        console.print(_ledger_table(values["ledger"]))


def _ledger_table(entries: list[dict[str, str]]) -> Table:
    table = Table(title="the model card's figures, and those of these files")
    for name in ("item", "card", "files", "verdict"):
        table.add_column(name)
    for entry in entries:
        verdict = entry["verdict"] + (f": {entry['note']}" if entry["note"] else "")
        table.add_row(*(escape(entry[name]) for name in ("item", "stated", "computed")), escape(verdict))
    return table


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(str(value))
