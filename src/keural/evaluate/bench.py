"""Where tasks are measured: a recipe's finished models, its tokenizer and its data; and what a task is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keural.data.prepared import Prepared
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.cached_step import check_cached_step
from keural.pretrained.stored_model import load_model
from keural.recipe import OBJECTIVES, Recipe
from keural.tokenizer import KeuralTokenizer

UNTRAINED = "untrained"
"""What the model before its first step is called."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A recipe whose stages are finished under `out`; each model is opened once."""

    recipe: Recipe
    out: Path
    tokenizer: KeuralTokenizer
    config: KeuralConfig
    data: Mapping[str, Prepared]
    _models: dict[str, KeuralMoECausalLM] = field(default_factory=dict)

    def model(self, name: str) -> KeuralMoECausalLM:
        """The model of a stage, or `UNTRAINED`, in evaluation mode."""
        if name not in self._models:
            self._models[name] = self._untrained() if name == UNTRAINED else _trained(self.out / name / "model")
        return self._models[name]

    def _untrained(self) -> KeuralMoECausalLM:
        torch.manual_seed(self.recipe.spec.seed)
        found: KeuralMoECausalLM = KeuralMoECausalLM(self.config).eval()
        return found

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


def before_and_after(bench: Bench, measure: Callable[[KeuralMoECausalLM], Figures]) -> tuple[Figures | None, Figures]:
    """What is measured on the model before the last preference stage, where there is one, and on the final model."""
    before = bench.before_preferences
    return measure(bench.model(before)) if before else None, measure(bench.model(bench.final))


@dataclass(frozen=True)
class Task:
    """Something that can be measured."""

    key: str
    """Of the recipe's `evaluation`: it is measured where there are settings under this key, which it is given."""
    measures: str
    """What, in one line."""
    run: Callable[[Bench, Any], Figures]
    """Measures it; the figures of all tasks are put together (see `scorecard.score`)."""
    check: Callable[[Any, Mapping[str, Prepared]], None] = lambda settings, data: None
    """Raises `UserError` for settings that cannot be measured on the prepared data, before anything is trained."""
