"""The models of a run that can be evaluated: every finished stage, and the network before its first step.

In: a path that somebody typed, and how models are asked. Out: where results are kept, and the models, in the order of their stages.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.evaluate.comparison.chosen import Chosen, results_of, results_with
from keural.evaluate.models import Conditions, EvaluatedModel, stored_model, untrained_model, why_no_chats
from keural.evaluate.results.store import remembered_hashes
from keural.files import FileHashes, read_checked_text
from keural.parsing import parse_yaml
from keural.pipeline.run_directory import DONE, MODEL, RECIPE, RESULTS, RUN, Done, RunMarker
from keural.pretrained.location import CONFIG, model_directory
from keural.terminal import note


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated."""

    models: list[EvaluatedModel]
    results: Path
    """Where results are kept."""
    is_run: bool
    """Whether these are the stages of a run."""


def what_to_evaluate(path: Path, conditions: Conditions, results: Path | None = None) -> Evaluation:
    """The stages of a run directory, or the model that a path stands for.

    Results are kept in the run, of a model elsewhere in `results` of the current directory, or where `results` says. Raises
    `UserError` where there is nothing that can be evaluated.
    """
    if (path / RUN).is_file():
        RunMarker.find(path / RUN)
        kept = results or path / RESULTS
        with remembered_hashes(kept) as hashes:
            return Evaluation(_stages(path, conditions, hashes), kept, True)
    run = model_directory(path).parents[1]
    kept = results or (run if (run / RUN).is_file() else Path()) / RESULTS
    with remembered_hashes(kept) as hashes:
        return Evaluation([stored_model(path, conditions, hashes=hashes)], kept, False)


def evaluated_before(path: Path, results: Path | None = None) -> Chosen:
    """The results of a model's directory, where `what_to_evaluate` keeps them, or those that another path stands for.

    A model is known by the bytes of its files. Raises `UserError` where there are no results.
    """
    if not (path / CONFIG).is_file():
        return results_of(path)
    found = what_to_evaluate(path, Conditions(), results)
    return results_with(found.results, path, found.models[0].identity)


def _stages(run: Path, conditions: Conditions, hashes: FileHashes) -> list[EvaluatedModel]:
    recipe = parse_yaml(read_checked_text(run / RECIPE))
    listed: list[dict[str, Any]] = recipe["stages"]
    finished = [stage["name"] for stage in listed if Done.find(run / stage["name"] / DONE) is not None]
    if not finished:
        raise UserError(f"{run}: no stage of this run is finished; `keural run` goes on with it")
    models: list[EvaluatedModel] = []
    if conditions.prompting == "chat":
        for name in finished:
            if (reason := why_no_chats(run / name / MODEL)) is not None:
                note(f"{name}: {reason}, and is not asked in a chat")
            else:
                models.append(stored_model(run / name / MODEL, conditions, name, hashes))
        if not models:
            raise UserError(f"{run}: no finished stage can be asked in a chat; leave --chat out")
        return models
    if listed[0]["init_from"] == "random":
        models.append(untrained_model(run / finished[0] / MODEL, recipe["recipe"]["seed"], conditions))
    return models + [stored_model(run / name / MODEL, conditions, name, hashes) for name in finished]
