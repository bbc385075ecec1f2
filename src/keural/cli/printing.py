"""What the commands print: the end of a run, the data table, the batch of a step, what a model is, how far a conversion is."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keural.data.adapters.reasons import reason_of
from keural.data.filtering.gates import gate_of
from keural.data.loading.batch import Batch
from keural.data.prepared import Prepared, read_dropped
from keural.data.source_counts import SourceRow
from keural.errors import UserError, nearest
from keural.pipeline.run_directory import SUMMARY, Done, Summary
from keural.pipeline.workspace import UnusableData, Workspace, open_stream
from keural.recipe import StageSpec
from keural.terminal import UNDERLINE, Piece, note, say, show, show_pieces, show_table, underline_words

Side = Literal["left", "right"]

if TYPE_CHECKING:
    from keural.pipeline.run import Outcome
    from keural.train.stage.dry_run import Tried


def print_ending(outcome: "Outcome", arguments: str) -> None:
    """Stages, figures, sample exchanges and the line that opens a chat; or how to go on after an interruption.

    `arguments` are those that the command was given, every option included.
    """
    if outcome.interrupted:
        say(f"stopped and saved; the same command goes on from there:\n  {_command()} {arguments}")
        return
    if outcome.tried:
        _show_tried(outcome.tried)
    if not outcome.trains:
        return
    summary = Summary.read(outcome.directory / SUMMARY)
    _show_stages(summary.stages)
    _show_scores(summary.evaluation.get("stages") or {})
    for line in _figures(summary.evaluation):
        show(line)
    for sample in summary.samples:
        show(f"\n> {sample['prompt']}", "bold")
        show(sample["answer"])
    show(f"\nreport: {outcome.directory / 'report.html'}")
    show(f"chat:   {_command()} chat {outcome.directory / 'final'}")
    show(f"in a browser: {_command()} serve {outcome.directory / 'final'}")


def _command() -> str:
    """The command as it was called, so that a printed line can be pasted even where the environment is not active."""
    return sys.argv[0] if Path(sys.argv[0]).name == "keural" else "keural"


def _columns(names: tuple[str, ...], left: tuple[str, ...]) -> dict[str, Side]:
    """Columns of a table: texts in `left`, numbers in the others."""
    return {name: "left" if name in left else "right" for name in names}


def _show_stages(stages: list[Done]) -> None:
    names = ("stage", "steps", "tokens", "seconds", "loss first", "loss last", "held out")
    rows = []
    for stage in stages:
        heldout = stage.heldout.get("loss")
        counts = (f"{stage.steps:,}", f"{stage.tokens:,}", f"{stage.seconds:.1f}")
        losses = (f"{stage.loss_first:.3f}", f"{stage.loss_last:.3f}", "" if heldout is None else f"{heldout:.3f}")
        rows.append((stage.name, *counts, *losses))
    show_table("stages", _columns(names, ("stage",)), rows)


def _show_scores(stages: dict[str, Any]) -> None:
    """What each model of the run scored on every task; a sign behind it where it differs significantly from the one before.

    Plain lines: a table with borders does not fit seven stages into the width of a terminal.
    """
    if not stages:
        return
    found = {task: cell for stage in stages.values() for task, cell in stage["tasks"].items()}
    tasks = [task for task, cell in found.items() if cell.get("kind") != "rolling"]
    if not tasks:
        return
    labels = [task.removeprefix("toy_").replace("_", " ") for task in tasks]
    names, width = ["start", *list(stages)[1:]], max(map(len, labels))
    show("\nright answers in %, before the first stage and after each; + and - are significant changes", "bold")
    show(" " * width + "".join(f"  {name:>5}" for name in names))
    for task, label in zip(tasks, labels, strict=True):
        cells = (
            _score(stage["tasks"].get(task)).rjust(max(5, len(name))) for name, stage in zip(names, stages.values(), strict=True)
        )
        show(f"{label:<{width}}  " + "  ".join(cells))


def _score(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["score"] is None:
        return ""
    change = cell.get("change") or {}
    sign = {None: " ", True: "+", False: "-"}[change.get("better")]
    return f"{100 * cell['score']:.0f}{sign}"


def _show_tried(tried: Sequence["Tried"]) -> None:
    """What a dry run found; hours are those of a stage's steps alone, if all were as large."""
    names = ("stage", "batch", "seconds", "tokens/s", "loss", "GiB", "steps", "hours")
    rows = []
    for stage in tried:
        step = (f"{stage.batch}", f"{stage.seconds:.2f}", f"{stage.tokens / stage.seconds:,.0f}")
        figures = (f"{stage.loss:.3f}", f"{stage.peak_gib:.1f}")
        hours = ("", "") if stage.steps is None else (f"{stage.steps:,}", f"{stage.steps * stage.seconds / 3600:,.1f}")
        rows.append((stage.name, *step, *figures, *hours))
    show_table("the largest step of each stage", _columns(names, ("stage",)), rows)


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


def note_unseen(workspace: Workspace) -> None:
    """Say of which stages the data is taken as it was prepared."""
    for name, prepared in workspace.data.items():
        if prepared.unseen:
            where = prepared.train.parent
            note(f"{name}: data as prepared in {where}; its sources were not looked at, for no data=DIR is given")


def print_made(workspace: Workspace) -> None:
    """The data that was prepared just now; what was there before was shown then."""
    note_unseen(workspace)
    print_data(replace(workspace, data={name: prepared for name, prepared in workspace.data.items() if prepared.made}))


@contextlib.contextmanager
def tables_of_unusable() -> Iterator[None]:
    """Print what was counted of sources where some cannot be used; the error goes on."""
    try:
        yield
    except UnusableData as refused:
        for name, table in refused.tables.items():
            _show_sources(name, table)
        raise


def _show_sources(name: str, table: Sequence[SourceRow]) -> None:
    names = ("source", "rows", "kept", "tokens", "dropped")
    show_table(name, _columns(names, ("source", "dropped")), [_data_row(row) for row in table])


def print_data(workspace: Workspace) -> None:
    """Per stage and source: rows, kept, tokens, every reason of a drop with its count and first place, and what an epoch holds."""
    note_unseen(workspace)
    for name, prepared in workspace.data.items():
        _show_sources(name, prepared.table)
        if any(row.mixture for row in prepared.table):
            _show_mixture(name, prepared.table)
        for evaluation_set, found in (prepared.contamination or {}).items():
            short = f", {found['too_short']:,} too short to be looked for" if found["too_short"] else ""
            show(f"contamination: {found['records']:,} records hold items of {evaluation_set} ({found['items']:,} items{short})")
        for row in prepared.table:
            if row.survey:
                show(row.survey)
            if row.warning:
                show(f"warning: {row.warning}")
            for line in row.suspicions or ():
                show(f"warning: source {row.source!r}: {line}")
            if "benchmark" in row.flags and not row.left_out:
                show(
                    f"warning: source {row.source!r} is a benchmark; after training on it scores of its family mean nothing "
                    "(data.benchmarks=false leaves it out)"
                )


def _data_row(row: SourceRow) -> tuple[str, ...]:
    listed = (
        f"{reason} {count:,} ({_gate(row, reason)}first: {row.first_drop[reason]}{_details(row, reason)})"
        for reason, count in row.drops.items()
    )
    drops = "\n".join(listed)
    drops += "".join(f"\n{reason} {count:,} (kept)" for reason, count in row.noted.items())
    drops += f"\nnot read: {', '.join(row.not_read)}" if row.not_read else ""
    drops += "".join(f"\n{line}" for line in row.assumed or ())
    drops = f"left out: {row.left_out}" if row.left_out else drops.strip()
    return row.source, f"{row.rows:,}", f"{row.kept:,}", f"{row.tokens:,}", drops


def _gate(row: SourceRow, reason: str) -> str:
    """The gate that dropped rows for a reason, and their share; nothing for other reasons."""
    gate = gate_of(reason)
    return f"gate {gate}, {row.drops[reason] / row.rows:.1%}; " if gate else ""


def _details(row: SourceRow, reason: str) -> str:
    """What was found in the rows of a reason, the most frequent three of it."""
    found = (row.details or {}).get(reason, {})
    return "".join(f"; {detail} {count:,}" for detail, count in list(found.items())[:3])


def _show_mixture(name: str, table: Sequence[SourceRow]) -> None:
    """What an epoch of mixed data holds: each part's share as it should be and as it is (of tokens; dpo: pairs), and how much."""
    rows = []
    for row in table:
        if share := row.mixture:
            shares = (f"{share.target:.1%}", f"{share.share:.1%}", f"{share.repeats:.2f}")
            rows.append((row.source, *shares, f"{share.records:,}", f"{share.tokens:,}"))
    names = ("source", "target", "share", "repeats", "records", "tokens")
    show_table(f"{name}: an epoch", _columns(names, ("source",)), rows)


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    """A title and named counts, one a line."""
    show(title)
    width = max(len(f"{count:,}") for count in counts.values())
    for name, count in counts.items():
        show(f"  {count:>{width},}  {name.replace('_', ' ')}")


def show_dropped(prepared: Prepared, reason: str) -> None:
    """Print the dropped rows that were kept, those of one reason or of `all`. Raises `UserError` for a reason that none has."""
    rows = [row for row in read_dropped(prepared) if reason in ("all", row["reason"])]
    if not rows:
        known = dict.fromkeys(name for row in prepared.table for name in row.drops)
        raise UserError(f"no row was dropped for {reason!r}{nearest(reason, known)}; dropped for: {', '.join(known) or 'nothing'}")
    counts = {(row.source, row.split, name): count for row in prepared.table for name, count in row.drops.items()}
    for (source, split, name), group in groupby(rows, key=itemgetter("source", "split", "reason")):
        show(f"{source}: {counts.get((source, split, name), 0):,} dropped for {name}{meaning_of(name)}", "bold")
        for row in group:
            detail = f": {row['detail']}" if row["detail"] else ""
            show(f"[{row['where']}{detail}] {row['row'] or '(not kept)'}")


def meaning_of(reason: str) -> str:
    """What a reason means and what can be done, as the end of a line."""
    known = reason_of(reason)
    return "" if known is None else f": {known.meaning}{f' -> {known.remedy}' if known.remedy else ''}"


def show_batch(workspace: Workspace, stage: StageSpec, step: int, rows: int) -> None:
    """Print the first rows of the batch of `step`: trained tokens are marked, documents of a row are apart."""
    stream = open_stream(workspace, stage)
    batch = stream.batch(step)
    count, length = batch.input_ids.shape
    trained = f"{int((batch.labels >= 0).sum())} trained, {underline_words()}"
    show(f"{stage.name} step {step}: {count} rows of {length} tokens, {trained}")
    for row in range(min(rows, count)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            show_pieces(_segment(workspace, batch, row, segment))


def _segment(workspace: Workspace, batch: Batch, row: int, segment: int) -> list[Piece]:
    """One document of a row: its place in the store, then its text; a token is underlined when predicting it is trained."""
    inside = (batch.segment_ids[row] == segment).nonzero()[0]
    ids = batch.input_ids[row, inside].tolist()
    trained = [False, *(batch.labels[row, inside[:-1]] >= 0).tolist()]
    pieces = [(f"[row {row}, sequence {int(batch.sequence_ids[row, inside[0]])}, {len(ids)} tokens] ", "dim")]
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            piece = workspace.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            pieces.append((piece, UNDERLINE if trained[start] else ""))
            start = end
    return pieces


def print_inspection(values: Mapping[str, Any]) -> None:
    """What `keural inspect` found: the values, then the ledger of the model card's figures."""
    for name, value in values.items():
        if name in {"ledger", "lineage"} or value is None:
            continue
        if isinstance(value, Mapping):
            show(f"{name}:")
            for key, entry in value.items():
                show(f"  {key}: {_number(entry)}")
        else:
            show(f"{name}: {_number(value)}")
    lineage = values.get("lineage", {})
    if lineage:
        show(f"lineage: {' -> '.join(lineage.get('chain', []))}")
        for name in ("recipe", "stage", "objectives", "tool_conversations", "source", "fingerprint", "keural", "transformers"):
            if name in lineage:
                show(f"  {name}: {lineage[name]}")
    if values.get("ledger"):
        _show_ledger(values["ledger"])


def _show_ledger(entries: list[dict[str, str]]) -> None:
    rows = []
    for entry in entries:
        verdict = entry["verdict"] + (f": {entry['note']}" if entry["note"] else "")
        rows.append((entry["item"], entry["stated"], entry["computed"], verdict))
    names = ("item", "card", "files", "verdict")
    show_table("the model card's figures, and those of these files", _columns(names, names), rows)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
