"""The contract of a run directory: the names, types and checksums of its files, and who may replace what.

In: typed values. Out: files that are believed only after they were compared with their checksums, and back. Everything that is of a
run as a whole is declared, written and read here; a file that belongs to one room's work is declared in that room (`train/` must
know its plan without knowing the pipeline) and listed here.

    run.json                  RunMarker: this directory is a run's
    recipe.yaml               the resolved recipe, its checksum in the first line
    tokenizer/done.json       TokenizerMarker; SHA-256 of every file beside it
    data/file-hashes.json     keural.files.FileHashes: checksums of the sources' files, a cache
    data/<id>/prepared.json   keural.data.prepared.PreparedFile
    data/<id>/dropped.jsonl   the first rows that were dropped for each reason; SHA-256 in prepared.json
    data/<id>/{train,heldout}/manifest.json   keural.data.tokens.store: SHA-256 of every file of the store, and its own
    data/cleaned-<id>/cleaning.json           keural.data.cleaning.summary.CleaningFile; SHA-256 of every file of documents
    reference/<id>/           keural.train.reference.records: manifest.json, and pairs.bin with a checksum for each pair
    <stage>/stage.json        StageMarker: what the stage is made from; stage.yaml the same for people
    <stage>/plan.json         keural.train.stage.step_plan.PlanFile
    <stage>/checks.json       keural.train.checks.record.ChecksFile
    <stage>/heldout-{before,after}.json       keural.train.stage.item_losses.ItemLosses: of held-out conversations
    <stage>/checkpoints/*/manifest.json       keural.train.checkpoints: SHA-256 of every file, and its own
    <stage>/metrics.jsonl     keural.train.stage.metrics: each line has a checksum
    <stage>/model/keural.json keural.pretrained.lineage: SHA-256 of every file of the model
    <stage>/adapter/keural.json keural.pretrained.lineage, the same of a stage's adapter, which its model has in it
    <stage>/model-checked.json  when the model was compared with its checksums: a cache
    <stage>/done.json         Done: the stage is finished
    evaluation.json           EvaluationFile: a cache
    results/<model>/<task>-<digest>.jsonl     keural.evaluate.results.store: what models answered; each line has a checksum
    results/scores.json       keural.pipeline.scores.ScoresFile: what `keural evaluate` has measured of the stages
    results/seen-<id>.json    keural.evaluate.contamination.SeenFile: which items a stage's data held, a cache
    summary.json              Summary
    report.html               for people; nothing reads it
    final                     link to the last finished stage's model
    *.old-<n>                 what was set aside; nothing reads it

What is in the way and cannot be shown to be this package's own work is never replaced, renamed or removed: the command refuses.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import Field

from keural.errors import UserError
from keural.files import CheckedFile, clear_leftovers, fingerprint, lock, read_checked_text, sha256_file, write_checked_text
from keural.recipe import Recipe

RUN, RECIPE, SUMMARY, EVALUATION, FINAL, DATA, TOKENIZER, REFERENCE, RESULTS = (
    "run.json", "recipe.yaml", "summary.json", "evaluation.json", "final", "data", "tokenizer", "reference", "results"
)  # fmt: skip
STAGE, STAGE_TEXT, DONE, PLAN, METRICS, MODEL, CHECKPOINTS, MODEL_CHECKED, ADAPTER = (
    "stage.json", "stage.yaml", "done.json", "plan.json", "metrics.jsonl", "model", "checkpoints", "model-checked.json", "adapter"
)  # fmt: skip
FORMAT = 1
"""Raised when the files of a run directory change so that an earlier one cannot be used."""

Settings = dict[str, Any]
"""What determines a result, as plain data; its fingerprint says whether a result is of these settings."""


class RunMarker(CheckedFile):
    """`run.json`: what is in this directory was put there by this package."""

    format: int
    keural: str
    """Version of the package that began the run."""


class TokenizerMarker(CheckedFile):
    """`tokenizer/done.json`."""

    remedy: ClassVar[str] = "delete the directory that it is in and run the same command again"

    fingerprint: str
    """Of the settings."""
    settings: Settings
    sha256: str
    """Of `tokenizer.model`, by which everything made with it knows the tokenizer."""
    files: dict[str, str]
    """SHA-256 of every file of the tokenizer, by name."""


class StageMarker(CheckedFile):
    """`stage.json`: what a stage's directory is made from."""

    fingerprint: str
    """Of the settings."""
    settings: Settings

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The marker of these settings."""
        return cls(fingerprint=fingerprint(settings), settings=settings)


class Done(CheckedFile):
    """`done.json`: a finished stage, and what came out (see `keural.train.stage.job.StageResult`)."""

    name: str
    objective: str
    init_from: str
    fingerprint: str
    init: str
    """Fingerprint of the weights that the stage started from."""
    seconds: float
    tokens: int
    steps: int
    loss_first: float
    loss_last: float
    heldout: dict[str, float]
    heldout_change: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What it changed of held-out conversations (`keural.pipeline.heldout_change`); empty where there are none, or an earlier
    version began the stage.
    """
    trained: int = 0
    """Parameters that were trained; 0 where an earlier version did not say."""
    data: list[str] = Field(default_factory=list)
    """Where its training data was: token stores, below the run directory where they are of the run; none where an earlier version
    did not say.
    """
    shards: bool = False
    """Whether that are published shards."""


class EvaluationFile(CheckedFile):
    """`evaluation.json`: what was measured last, and of what."""

    fingerprint: str
    result: dict[str, Any]


class Summary(CheckedFile):
    """`summary.json`: a run's stages, data, evaluation and sample answers."""

    recipe: str
    seconds: float
    """Of the command that finished the run; the stages have their own."""
    stages: list[Done]
    data: dict[str, list[dict[str, Any]]]
    """The table of sources of each stage."""
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Refuse a second run in the same directory: the two would delete each other's files. The lock goes with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("ab")
    except OSError as error:
        raise _unwritable(out, error) from error
    with file:
        if not lock(file.fileno()):
            raise UserError(f"{out}: another run is at work there; wait for it, or give another --out")
        clear_leftovers(out)
        yield


def claim(out: Path, recipe: Recipe) -> None:
    """Make `out` a run directory, with the resolved recipe that proves it, too, or make sure that it is one.

    Raises `UserError` when it holds anything that a run has not put there, or is a run of an earlier version.
    """
    if not is_run_directory(out):
        found = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
        if found:
            raise UserError(f"{out}: {_what_it_is(out)}; give another --out, or move away what is there")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(out, error) from error
        write_recipe(out, recipe)
        RunMarker(format=FORMAT, keural=_version()).write(out / RUN)
    final = out / FINAL
    if os.path.lexists(final) and not _is_our_link(final):
        raise UserError(f"{final}: is in the way: a run puts a link to its last model there, this is something else; move it away")


def is_run_directory(out: Path) -> bool:
    """Whether this package has made `out`. Raises `UserError` for a damaged proof, and for a run of another format."""
    marker = RunMarker.find(out / RUN)
    if marker is None:  # deleted, as advised where it was damaged: the recipe that a run writes proves it, too
        with contextlib.suppress(UserError):
            read_checked_text(out / RECIPE)
            RunMarker(format=FORMAT, keural=_version()).write(out / RUN)
            return True
        return False
    if marker.format != FORMAT:
        raise UserError(
            f"{out}: is a run of keural {marker.keural}, whose files this version does not read; go on with that one, or give "
            "another --out"
        )
    return True


def _what_it_is(out: Path) -> str:
    if not out.is_dir():
        return "is no directory"
    if (out / TOKENIZER / DONE).is_file() or any(out.glob(f"*/{STAGE}")):
        return (
            f"is a run of an earlier version of keural, whose files have no checksums (no {RUN}), so nothing there can be believed "
            "or gone on from; its models still open where their own checks allow it"
        )
    if (out / RECIPE).is_file():
        return "holds a recipe, and a run would overwrite it"
    return f"is not empty, and no run directory (it has no {RUN}), so a run would mix its files with others"


def _is_our_link(path: Path) -> bool:
    """Whether `path` is a link as `link_final` makes them."""
    return path.is_symlink() and (target := path.readlink()).name == MODEL and len(target.parts) == 2 and target.parts[0] != ".."


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({error.strerror}); choose another run directory")


def _version() -> str:
    try:
        return version("keural")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def write_recipe(out: Path, recipe: Recipe) -> None:
    """Keep the resolved recipe."""
    write_checked_text(out / RECIPE, yaml.safe_dump(recipe.resolved(), allow_unicode=True, sort_keys=False))


def set_aside(directory: Path) -> Path:
    """Keep an outdated directory under another name instead of overwriting it; gives the new name."""
    kept = next(path for n in range(1, 10_000) if not os.path.lexists(path := directory.with_name(f"{directory.name}.old-{n}")))
    return directory.rename(kept)


def changes(old: Settings, new: Settings) -> list[str]:
    """What differs between the settings of two results, one text for each key: `train.lr: 0.001 -> 0.0005`.

    A setting that is not there has its default. Other data shows as its settings where these differ, too.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in [*before, *(key for key in after if key not in before)] if before.get(key) != after.get(key)]
    told = [f"{key}: {_told(before, key)} -> {_told(after, key)}" for key in keys if key not in _CONTENTS]
    about_data = any(text.startswith(("data.", "tokenizer.", "sources")) for text in told)
    return told + [_CONTENTS[key] for key in keys if key in _CONTENTS and not (key == "data" and about_data)]


_CONTENTS = {
    "data": "the contents of its data",
    "contents": "the contents of its sources",
    "tokenizer": "the tokenizer",
    "init": "the model that it starts from",
    "order": "which pairs come together in a step, which another version of keural chose otherwise",
    "version": "the version of keural, which does something else with the same settings",
}
"""Keys of settings whose values are fingerprints, and what to call them."""


def _flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = "" if not prefix and key in {"stage", "spec"} else f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}." if name else "")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from _flat({str(item.get("name", number)): item for number, item in enumerate(value)}, f"{name}.")
        else:
            yield name, value


def _told(values: dict[str, Any], key: str) -> str:
    text = "its default" if key not in values else str(values[key])
    return text if len(text) <= 80 else f"{text[:77]}..."


def link_final(out: Path, stage_name: str) -> None:
    """Let `final` point to a stage's model. Raises `UserError` when something else is there."""
    link, temporary = out / FINAL, out / f".{FINAL}.{secrets.token_hex(4)}.tmp"
    temporary.symlink_to(Path(stage_name) / MODEL, target_is_directory=True)
    try:
        if os.path.lexists(link) and not _is_our_link(link):
            raise UserError(f"{link}: is not the link that a run puts there; move it away")
        temporary.replace(link)
    except OSError as error:
        raise _unwritable(link, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def tokenizer_files(directory: Path) -> dict[str, str]:
    """SHA-256 of a tokenizer's files, by name."""
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.name != DONE}
