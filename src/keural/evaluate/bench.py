"""Where tasks are measured: a recipe's finished models, its tokenizer and its data; and what a task is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keural.data.prepared import Prepared
from keural.evaluate.models import UNTRAINED, Conditions, stored_model, untrained_model
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.results.store import Header, ModelIdentity, open_results, remembered_hashes, results_file
from keural.evaluate.tasks.asking import Prompting
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.cached_step import check_cached_step
from keural.pretrained.stored_model import load_model
from keural.recipe import OBJECTIVES, Recipe
from keural.tokenizer import KeuralTokenizer

MODEL, RESULTS = "model", "results"
"""Of a stage's and a run's directory: its model, and what models answered, item by item."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A recipe and the stages of it that are finished under `out`; each model is opened once."""

    recipe: Recipe
    out: Path
    tokenizer: KeuralTokenizer
    config: KeuralConfig
    data: Mapping[str, Prepared]
    finished: Sequence[str]
    """Names of the finished stages, in the recipe's order."""
    _models: dict[str, KeuralMoECausalLM] = field(default_factory=dict)

    def model(self, name: str) -> KeuralMoECausalLM:
        """The model of a stage, or `UNTRAINED`, in evaluation mode."""
        if name not in self._models:
            self._models[name] = self._untrained() if name == UNTRAINED else _trained(self.out / name / MODEL)
        return self._models[name]

    def _untrained(self) -> KeuralMoECausalLM:
        torch.manual_seed(self.recipe.spec.seed)
        found: KeuralMoECausalLM = KeuralMoECausalLM(self.config).eval()
        return found

    def identity(self, name: str, prompting: Prompting) -> ModelIdentity:
        """What determines the answers of a stage's model, or of `UNTRAINED`."""
        conditions = Conditions(prompting)
        if name == UNTRAINED:
            return untrained_model(self.out / self.finished[0] / MODEL, self.recipe.spec.seed, conditions).identity
        with remembered_hashes(self.out / RESULTS) as hashes:
            return stored_model(self.out / name / MODEL, conditions, name, hashes).identity

    def kept(self, header: Header, ask: Callable[[], Sequence[ItemResult]]) -> tuple[str, TaskResults]:
        """A model's results of a task with their file, from the run directory: as they are kept, or asked for now and kept.

        Raises `UserError` for damaged results.
        """
        path = results_file(self.out / RESULTS, header)
        with open_results(path, header) as writer:
            if len(writer.items) < header.size:
                found = [(number, item) for number, item in enumerate(ask()) if item.id not in writer.items]
                writer.append(found)
            return path.relative_to(self.out).as_posix(), writer.kept().results()

    @property
    def final(self) -> str:
        """The last stage."""
        return self.recipe.stages[-1].name

    @property
    def before_preferences(self) -> str | None:
        """The stage that the last one starts from, when the last one trains preferences: its figures show what that changed."""
        last = self.recipe.stages[-1]
        return last.predecessor if OBJECTIVES[last.objective].store == "pairs" else None


def _trained(directory: Path) -> KeuralMoECausalLM:
    model = load_model(directory)
    check_cached_step(model, directory)
    return model


@dataclass(frozen=True)
class Task:
    """Something that can be measured."""

    key: str
    """Of the recipe's `evaluation`: it is measured where there are settings under this key, which it is given."""
    measures: str
    """What, in one line."""
    run: Callable[[Bench, Any], Figures]
    """Measures it; the figures of all tasks are put together (see `scorecard.score`)."""
    of_stages: bool = False
    """Whether it measures each finished stage, so that there is something to measure before the recipe's last one."""
    check: Callable[[Any, Mapping[str, Prepared]], None] = lambda settings, data: None
    """Raises `UserError` for settings that cannot be measured on the prepared data, before anything is trained."""
