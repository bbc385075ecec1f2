"""`keural data stats`: what a directory with data, or a recipe, holds.

In: a path. Out: the text to print. What the directory is shows from the file it has.
"""

from pathlib import Path
from typing import Any

from keural.data.cleaning.summary import SUMMARY, CleaningFile
from keural.data.prepared import PreparedFile
from keural.data.preview import mixture_report
from keural.data.source_counts import rows_from_json
from keural.data.tokens import published_format
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.pipeline.workspace import find_stage_data
from keural.pretrained.kinds import is_training_checkpoint, what_is
from keural.recipe import OBJECTIVES, STORES, Recipe, StageSpec, load_recipe
from keural.recipe.shipped import RECIPE_FILE, names, recipe_directory
from keural.terminal import json_text, yaml_text

ANY_ID = 1 << 32
"""A vocabulary that refuses no id: which tokenizer shards were made with is not in their files."""


def describe(path: Path, overrides: list[str], out: Path | None, as_json: bool) -> str:
    """What `path` holds, as text. Raises `UserError` when it is nothing that is known, or damaged."""
    if not path.exists() and str(path) in names():
        path = recipe_directory(path)
    if path.exists() and not _is_data(path):
        raise UserError(f"{path}: {what_is(path)} (`keural data stats` takes data and recipes)")
    if (path / RECIPE_FILE).is_file():
        return _mixture(load_recipe(path, overrides), out, as_json)
    if overrides or out:
        raise UserError(f"{path}: is no recipe; key=value and --out are for recipes")
    if (path / "prepared.json").is_file():
        made = PreparedFile.read(path / "prepared.json")
        unit = STORES[TokenStore.open(path / "train", verify="size").kind].unit
        table = rows_from_json(made.table, path / "prepared.json")
        text = _text({path.name: mixture_report.prepared(table, unit)}, {}, as_json)
        cleaned = made.cleaned
        return f"{text}\ncleaned: {path.parent / cleaned} (ask for its stats, too)\n" if cleaned and not as_json else text
    if (path / SUMMARY).is_file():
        return _dump(CleaningFile.read(path / SUMMARY).model_dump(exclude={"files"}), as_json)
    if any(path.glob("keural_*.bin")):
        return _dump({"shards": _shards(path)}, as_json)
    return _dump(TokenStore.open(path).manifest, as_json)


def _is_data(path: Path) -> bool:
    """Whether a path is named like something that is described here; a run holds its recipe, and is none."""
    if (path / "run.json").is_file() or is_training_checkpoint(path):
        return False
    return any((path / name).is_file() for name in (RECIPE_FILE, "prepared.json", SUMMARY, "manifest.json")) or any(
        any(path.glob(pattern)) for pattern in ("*.ds", "keural_*.bin")
    )


def _dump(value: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json_text(value)
    return yaml_text(value)


def _shards(path: Path) -> dict[str, int]:
    found = published_format.Counts()
    for _, _, so_far in published_format.read_documents(published_format.find_shards(path), ANY_ID):
        found = so_far
    return found.table()


def _mixture(recipe: Recipe, out: Path | None, as_json: bool) -> str:
    directory = out or Path("runs") / recipe.spec.name
    reports = {stage.name: _stage(recipe, stage, directory) for stage in recipe.stages}
    return _text(reports, {stage.name: stage.notes for stage in recipe.stages}, as_json)


def _stage(recipe: Recipe, stage: StageSpec, out: Path) -> mixture_report.Report:
    """As prepared where the run directory has the data of these settings; else as planned."""
    found = find_stage_data(recipe, stage, out)
    if found is None:
        return mixture_report.planned(stage.data)
    return mixture_report.prepared(found.table, OBJECTIVES[stage.objective].unit)


def _text(reports: dict[str, mixture_report.Report], notes: dict[str, list[str]], as_json: bool) -> str:
    if as_json:
        return json_text(reports)
    return "\n".join(mixture_report.markdown(name, report, notes.get(name, [])) for name, report in reports.items())
