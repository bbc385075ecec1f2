"""The contract of a run directory: the names, types and checksums of its files, and who may replace what.

In: typed values. Out: files that are believed only after they were compared with their checksums, and back. Everything that is of a
run as a whole is declared, written and read here; a file that belongs to one room's work is declared in that room (`train/` must
know its plan without knowing the pipeline) and listed here.

    run.json                  RunMarker: this directory is a run's
    recipe.yaml               the resolved recipe, its checksum in the first line
    tokenizer/done.json       TokenizerMarker; SHA-256 of every file beside it
    data/file-hashes.json     keural.files.FileHashes: checksums of the sources' files, a cache
    data/<id>/prepared.json   keural.data.prepared.PreparedFile
    data/<id>/{train,heldout}/manifest.json   keural.data.tokens.store: SHA-256 of every file of the store, and its own
    data/cleaned-<id>/cleaning.json           keural.data.cleaning.summary.CleaningFile; SHA-256 of every file of documents
    <stage>/stage.json        StageMarker: what the stage is made from; stage.yaml the same for people
    <stage>/plan.json         keural.train.step_plan.PlanFile
    <stage>/reference/*/      keural.train.reference: each value has a checksum
    <stage>/checkpoints/*/manifest.json       keural.train.checkpoint: SHA-256 of every file, and its own
    <stage>/metrics.jsonl     keural.train.metrics: each line has a checksum
    <stage>/model/keural.json keural.pretrained.lineage: SHA-256 of every file of the model
    <stage>/model-checked.json  when the model was compared with its checksums: a cache
    <stage>/done.json         Done: the stage is finished
    evaluation.json           EvaluationFile: a cache
    summary.json              Summary
    report.html               for people; nothing reads it
    final                     link to the last finished stage's model
    *.old-<n>                 what was set aside; nothing reads it

What is in the way and cannot be shown to be this package's own work is never replaced, renamed or removed: the command refuses.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import yaml

from keural.errors import UserError
from keural.files import CheckedFile, fingerprint, read_checked_text, read_object, remembered_check, sha256_file, write_checked_text
from keural.model import KeuralConfig, count_parameters
from keural.pretrained.lineage import check_sums
from keural.recipe import Recipe, StageSpec
from keural.report.collect import Run, Stage
from keural.terminal import say
from keural.train.checkpoint import newest_progress
from keural.train.metrics import read_metrics
from keural.train.step_plan import PlanFile

RUN, RECIPE, SUMMARY, EVALUATION, FINAL, DATA, TOKENIZER = (
    "run.json", "recipe.yaml", "summary.json", "evaluation.json", "final", "data", "tokenizer"
)  # fmt: skip
STAGE, STAGE_TEXT, DONE, PLAN, METRICS, MODEL, CHECKPOINTS, MODEL_CHECKED = (
    "stage.json", "stage.yaml", "done.json", "plan.json", "metrics.jsonl", "model", "checkpoints", "model-checked.json"
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
    """`done.json`: a finished stage, and what came out (see `keural.train.stage.StageResult`)."""

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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another run is at work there; wait for it, or give another --out") from error
        except OSError:  # a file system without locks
            pass
        yield


def claim(out: Path) -> None:
    """Make `out` a run directory, or make sure that it is one.

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


def find_done(directory: Path, wanted: str) -> Done | None:
    """The marker of a finished stage of exactly these settings; its model is another matter (`model_problem`)."""
    done = Done.find(directory / DONE)
    return done if done is not None and done.fingerprint == wanted else None


def model_problem(directory: Path) -> str | None:
    """What is wrong with the model of a finished stage; None when it is whole. Files that have not changed are not read again."""
    model = directory / MODEL
    if not (model / "keural.json").is_file():
        return f"its model is gone ({model})"
    try:
        remembered_check(model, directory / MODEL_CHECKED, lambda: check_sums(model))
    except UserError as error:
        return f"its model is damaged ({error})"
    return None


def is_finished(directory: Path, wanted: str) -> bool:
    """Whether a stage directory holds the finished result of exactly these settings, its model whole."""
    return find_done(directory, wanted) is not None and model_problem(directory) is None


def adopt(directory: Path, settings: Settings, trajectory: str) -> StageMarker | None:
    """The marker of a stage directory; None where there is no such directory.

    A marker that is gone is written again where another file shows that the directory was made from these very settings. Raises
    `UserError` when nothing shows that this package has made the directory.
    """
    if not os.path.lexists(directory):
        return None
    marker = StageMarker.find(directory / STAGE)
    if marker is not None:
        return marker
    done, progress = Done.find(directory / DONE), newest_progress(directory / CHECKPOINTS)
    made_from = progress.fingerprint if progress is not None else None
    if (done is not None and done.fingerprint == fingerprint(settings)) or made_from == trajectory:
        marker = StageMarker.of(settings)
        marker.write(directory / STAGE)
        return marker
    if done is not None or made_from is not None or PlanFile.find(directory / PLAN) is not None:
        return StageMarker.of({})  # its settings are not known, and are others
    raise UserError(f"{directory}: is in the way: nothing there shows that a run has made it (no {STAGE}); move it away")


def write_stage(directory: Path, stage: StageSpec, settings: Settings) -> None:
    """Say what a stage directory is made from."""
    directory.mkdir(parents=True, exist_ok=True)
    StageMarker.of(settings).write(directory / STAGE)
    write_checked_text(directory / STAGE_TEXT, yaml.safe_dump(stage.model_dump(), allow_unicode=True, sort_keys=False))


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


def read_run(directory: Path) -> Run:
    """What a report shows of a run, whole or not: stages may be missing or interrupted, an evaluation may not be there.

    Raises `UserError` when the directory is no run's, or a file of it is damaged. Lines of metrics that are damaged are left out,
    and said; of a killed run the last line may be half-written.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a run directory such as runs/toy")
    recipe_text = read_checked_text(directory / RECIPE) if (directory / RECIPE).is_file() else ""
    resolved = yaml.safe_load(recipe_text) if recipe_text else {}
    summary = Summary.find(directory / SUMMARY)
    listed: dict[str, dict[str, Any]] = {stage["name"]: stage for stage in resolved.get("stages", ())}
    for finished in summary.stages if summary else ():
        listed.setdefault(finished.name, {})
    if not listed:
        found = sorted(directory.glob(f"*/{METRICS}"), key=lambda file: (file.stat().st_mtime, file.parent.name))
        listed = {file.parent.name: {} for file in found if ".old-" not in file.parent.name}
    stages = [_read_stage(directory / name, settings) for name, settings in listed.items()]
    stages = [stage for stage in stages if stage.finished or stage.steps]
    if not (resolved or summary or stages):
        raise UserError(f"{directory}: is not a run directory (no {RECIPE}, {SUMMARY} or stage)")
    recipe = resolved.get("recipe", {})
    return Run(
        name=str((summary.recipe if summary else None) or recipe.get("name") or directory.resolve().name),
        directory=directory,
        recipe=recipe,
        recipe_text=recipe_text,
        stages=stages,
        summary=summary.model_dump() if summary else {},
        parameters=_parameters(directory, stages),
        ended=_ended(directory, stages),
        evaluation=summary.evaluation if summary else {},
    )


def _read_stage(directory: Path, settings: dict[str, Any]) -> Stage:
    lines, damaged = read_metrics(directory / METRICS)
    if damaged:
        say(f"{directory / METRICS}: {damaged} lines are damaged, and left out of the report")
    # A resumed stage repeats the steps after its last checkpoint; the later line counts.
    steps = {line["step"]: line for line in lines if "loss" in line}
    heldout = {line["step"]: line for line in lines if isinstance(line.get("heldout"), dict)}
    done, text = Done.find(directory / DONE), directory / STAGE_TEXT
    if done is not None and (missing := done.steps - len(steps)) > 0:
        say(f"{directory / METRICS}: {missing} of {done.steps} steps are missing there, and in the report")
    return Stage(
        name=directory.name,
        settings=settings or (yaml.safe_load(read_checked_text(text)) if text.is_file() else {}),
        done=done.model_dump() if done else {},
        steps=[steps[step] for step in sorted(steps)],
        heldout=[heldout[step] for step in sorted(heldout)],
    )


def _parameters(directory: Path, stages: list[Stage]) -> tuple[int, int] | None:
    for stage in reversed(stages):
        file = directory / stage.name / MODEL / "config.json"
        if file.is_file():
            count = count_parameters(KeuralConfig.from_dict(read_object(file)))
            return count.total, count.active
    return None


def _ended(directory: Path, stages: list[Stage]) -> datetime | None:
    """When the run last wrote something."""
    files = [directory / SUMMARY, *(directory / stage.name / METRICS for stage in stages)]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return datetime.fromtimestamp(max(times)).astimezone() if times else None
