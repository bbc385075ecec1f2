"""Tasks are found by the recipe's keys, and their figures are put together."""

from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate import registry, scorecard
from keural.evaluate.bench import Bench, Task
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.recipe import EvaluationSpec, Recipe, RecipeSpec, StageSpec
from keural.tokenizer import KeuralTokenizer


def recipe_of(stages: list[StageSpec], **evaluation: Any) -> Recipe:
    tokenizer = {"vocab_size": 400, "sources": [{"name": "a", "adapter": "text"}]}
    names = [stage.name for stage in stages]
    spec = RecipeSpec.model_validate({"name": "r", "tokenizer": tokenizer, "stages": names, "evaluation": evaluation})
    return Recipe(spec, tuple(stages), Path("r"))


def stage(name: str, objective: str, init_from: str = "random") -> StageSpec:
    size = {"batch_pairs": 2} if objective == "dpo" else {"batch_tokens": 64}
    data = {"sources": [{"name": "a", "adapter": "text"}], "sequence_length": 32}
    train = {"steps": 1, "lr": 1e-3, **size}
    return StageSpec.model_validate({"name": name, "objective": objective, "init_from": init_from, "data": data, "train": train})


STAGES = [stage("sft", "sft"), stage("dpo", "dpo", "sft")]


def bench_of(recipe: Recipe, tokenizer: KeuralTokenizer, config: KeuralConfig, out: Path = Path("r"), finished: int = 9) -> Bench:
    """A bench on which the first `finished` stages are finished."""
    return Bench(recipe, out, tokenizer, config, {}, [stage.name for stage in recipe.stages[:finished]])


def score(recipe: Recipe, tokenizer: KeuralTokenizer, config: KeuralConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The evaluation, with a model that is only a name."""
    monkeypatch.setattr(Bench, "model", lambda self, name: name)
    return dict(scorecard.score(bench_of(recipe, tokenizer, config))["evaluation"])


def test_every_key_of_the_evaluation_has_a_task_and_every_task_a_key() -> None:
    assert {task.key for task in registry.TASKS} == set(EvaluationSpec.model_fields)
    assert all(task.measures for task in registry.TASKS)


def test_only_what_the_recipe_asks_for_is_measured_with_its_settings(
    tokenizer: KeuralTokenizer, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Task("exact_match", "the settings", lambda bench, spec: {"pairs": spec.pairs})
    other = Task("bits_per_byte", "nothing", lambda bench, spec: {"never": True})
    monkeypatch.setattr(scorecard, "TASKS", (asked, other))

    assert score(recipe_of(STAGES, exact_match={"pairs": 7}), tokenizer, make_config(), monkeypatch) == {"pairs": 7}
    assert score(recipe_of(STAGES), tokenizer, make_config(), monkeypatch) == {}


def test_figures_of_several_tasks_are_joined(tokenizer: KeuralTokenizer, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Task("exact_match", "a", lambda bench, spec: {"accuracy": 1, "before": {"stage": "sft", "accuracy": 0}})
    second = Task("exact_match", "b", lambda bench, spec: {"share": 1, "before": {"share": 0}})
    monkeypatch.setattr(scorecard, "TASKS", (first, second))

    joined = {"accuracy": 1, "share": 1, "before": {"stage": "sft", "accuracy": 0, "share": 0}}
    assert score(recipe_of(STAGES, exact_match={}), tokenizer, make_config(), monkeypatch) == joined


def test_a_task_that_cannot_be_measured_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: Any, data: Any) -> None:
        raise UserError("nothing to measure")

    monkeypatch.setattr(scorecard, "TASKS", (Task("exact_match", "a", lambda bench, spec: {}, check=refuse),))
    scorecard.check_measurable(recipe_of(STAGES), {})
    with pytest.raises(UserError, match="nothing to measure"):
        scorecard.check_measurable(recipe_of(STAGES, exact_match={}), {})


def test_before_the_last_stage_is_finished_only_what_is_measured_of_each_stage_is_there(
    tokenizer: KeuralTokenizer, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = Task("exact_match", "a", lambda bench, spec: {"stages": list(bench.finished)}, of_stages=True)
    final = Task("bits_per_byte", "b", lambda bench, spec: {"never": True})
    monkeypatch.setattr(scorecard, "TASKS", (each, final))
    asked = recipe_of(STAGES, exact_match={}, bits_per_byte=[{"name": "a", "stage": "sft"}])

    found = scorecard.score(bench_of(asked, tokenizer, make_config(), finished=1))
    assert found == {"evaluation": {"stages": ["sft"]}, "samples": []}


def test_the_toy_world_is_measured_before_and_after_the_preferences(
    tokenizer: KeuralTokenizer, model: KeuralMoECausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Bench, "model", lambda self, name: model)
    for one in STAGES:
        save_model_directory(tmp_path / one.name / "model", model.config, model.state_dict(), tokenizer, {"objectives": ["sft"]})
    asked = {"items_per_task": 2, "pairs": 6, "max_new_tokens": 2}
    recipe = recipe_of(STAGES, exact_match=asked)
    figures = scorecard.score(bench_of(recipe, tokenizer, model.config, tmp_path))["evaluation"]

    assert (figures["items"], figures["pairs"]) == (10, 6)
    assert figures["by_task"].keys() == {"arithmetic", "translation", "facts", "rewriting", "smalltalk"}
    assert figures["by_language"].keys() == {"ko", "en"}
    assert figures["before"].keys() == {"stage", "accuracy", "by_task", "by_language", "preference_accuracy"}
    assert figures["before"]["stage"] == "sft"
    assert figures["preference_accuracy"] == figures["before"]["preference_accuracy"]
    assert figures["polite_rate"].keys() == {"before", "after"}
    alone = recipe_of(STAGES[:1], exact_match=asked)
    figures = scorecard.score(bench_of(alone, tokenizer, model.config, tmp_path))["evaluation"]
    assert "before" not in figures
    assert figures["polite_rate"].keys() == {"after"}


@pytest.mark.parametrize(
    ("stages", "before"),
    [(STAGES, "sft"), (STAGES[:1], None), ([stage("dpo", "dpo", "./model")], None), ([*STAGES, stage("more", "sft", "dpo")], None)],
)
def test_preferences_are_compared_with_the_stage_before_them(
    tokenizer: KeuralTokenizer, make_config: Any, stages: list[StageSpec], before: str | None
) -> None:
    assert bench_of(recipe_of(stages), tokenizer, make_config()).before_preferences == before
