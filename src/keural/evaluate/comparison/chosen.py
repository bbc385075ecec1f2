"""Whose results a path stands for: a model's directory of results, or a stage of a run.

In: a path that somebody typed. Out: the results of one model, and how it was asked. Only files of results are read, never a model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keural.errors import UserError, nearest
from keural.evaluate.results.records import TaskResults
from keural.evaluate.results.store import Kept, ModelIdentity, read_results

RESULTS = "results"
"""Of a run: the directory with the results of its stages."""
WHAT = "a model that has been evaluated, a stage such as runs/toy/sft-1, or a directory of results"


@dataclass(frozen=True)
class Chosen:
    """One model's results."""

    label: str
    tasks: Sequence[TaskResults]
    asked: Sequence[ModelIdentity]
    """What determined them; several where some tasks were asked in a chat and others as text."""


def results_of(path: Path) -> Chosen:
    """The results that a path stands for.

    The path is a directory with a model's results (`results/NAME-KEY`), one with those of a single model, a run of which a single
    model has been evaluated, or a run with the name of a stage behind it.

    Raises:
        UserError: when there are none, when several models or several results of one task could be meant, and for damaged files.
    """
    if any((path / RESULTS).glob("*/*.jsonl")):
        return _single(path, path / RESULTS)
    if path.name != RESULTS and any((path.parent / RESULTS).glob("*/*.jsonl")):
        return _named(path, path.parent / RESULTS)
    if files := sorted(path.glob("*.jsonl")):
        return _chosen(str(path), [read_results(file) for file in files], files)
    if any(path.glob("*/*.jsonl")):
        return _single(path, path)
    if not path.exists():
        raise UserError(f"{path}: no such directory; give {WHAT}")
    raise UserError(f"{path}: has no results; `keural evaluate` makes some. Give {WHAT}")


def results_with(directory: Path, path: Path, model: ModelIdentity) -> Chosen:
    """Of the results in a directory those of one model, whatever it was called and however it was asked.

    It is known by its weights and its tokenizer; `path` is what it is called in what is said.

    Raises:
        UserError: where there are none, and as `results_of` does.
    """
    files = {file: kept for named in _read(directory).values() for file, kept in named.items()}
    wanted = model.weights, model.tokenizer
    files = {file: kept for file, kept in files.items() if (kept.header.model.weights, kept.header.model.tokenizer) == wanted}
    if not files:
        made = f"`keural evaluate {path} --results {directory} --tasks ...`"
        raise UserError(f"{path}: {directory} has no results of this model; {made} makes some")
    return _chosen(str(path), list(files.values()), list(files))


def _read(directory: Path) -> dict[str, dict[Path, Kept]]:
    """All results below a directory, by the model's name and their file."""
    found: dict[str, dict[Path, Kept]] = {}
    for file in sorted(directory.glob("*/*.jsonl")):
        kept = read_results(file)
        found.setdefault(kept.header.model.name, {})[file] = kept
    return found


def _single(path: Path, directory: Path) -> Chosen:
    found = _read(directory)
    if len(found) > 1:
        first = path / next(reversed(found)) if directory != path else min(next(iter(found.values()))).parent
        raise UserError(f"{path}: holds the results of several models ({', '.join(found)}); name one, such as {first}")
    name, files = next(iter(found.items()))
    return _chosen(name, list(files.values()), list(files))


def _named(path: Path, directory: Path) -> Chosen:
    found = _read(directory)
    if path.name not in found:
        hint = nearest(path.name, found)
        raise UserError(f"{path}: {directory} has no results of {path.name!r}{hint}; there are those of {', '.join(found)}")
    files = found[path.name]
    return _chosen(str(path), list(files.values()), list(files))


def _chosen(label: str, kept: Sequence[Kept], files: Sequence[Path]) -> Chosen:
    seen: dict[tuple[str, str], Path] = {}
    for one, file in zip(kept, files, strict=True):
        key = one.header.task, one.header.digest
        if key in seen:
            raise UserError(
                f"{label}: was measured more than once on {one.header.task} (trained again, or asked in another way): "
                f"{seen[key].parent} and {file.parent}; give one of these directories"
            )
        seen[key] = file
    tasks = [results for one in kept if (results := one.results()).items]
    return Chosen(label, tasks, list(_distinct(one.header.model for one in kept)))


def _distinct(models: Iterable[ModelIdentity]) -> dict[ModelIdentity, None]:
    return dict.fromkeys(models)
