"""What is measured when a recipe is finished: the tasks that its evaluation asks for, and sample answers.

Reads the stages' model directories and held-out data, returns plain figures for `summary.json`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from keural.data.prepared import Prepared
from keural.evaluate.bench import Bench, Figures, Task
from keural.evaluate.generation import greedy
from keural.evaluate.registry import TASKS
from keural.model import KeuralMoECausalLM
from keural.recipe import Recipe
from keural.tokenizer import KeuralTokenizer, Message

SAMPLE_TOKENS = 64
"""A sample answer is cut after so many."""


def score(bench: Bench) -> dict[str, Any]:
    """Run the recipe's evaluation on its finished stages; returns `evaluation` and `samples` of the summary.

    Before all stages are finished only what is measured of every stage is there.
    """
    evaluation: Figures = {}
    complete = bench.final in bench.finished
    for task, settings in _wanted(bench.recipe):
        if complete or task.of_stages:
            evaluation = _joined(evaluation, task.run(bench, settings))
    samples = sample_answers(bench.recipe, bench.model(bench.final), bench.tokenizer) if complete else []
    return {"evaluation": evaluation, "samples": samples}


def check_measurable(recipe: Recipe, data: Mapping[str, Prepared]) -> None:
    """Refuse an evaluation that the prepared data cannot serve, before anything is trained. Raises `UserError`."""
    for task, settings in _wanted(recipe):
        task.check(settings, data)


def _wanted(recipe: Recipe) -> Iterator[tuple[Task, Any]]:
    """The tasks that the recipe has settings for, with these."""
    for task in TASKS:
        if settings := getattr(recipe.spec.evaluation, task.key):
            yield task, settings


def _joined(figures: Figures, more: Figures) -> Figures:
    """The figures of several tasks as one; where two have figures under the same name (`before`), these are joined."""
    same = {name: _joined(figures[name], more[name]) for name in figures.keys() & more.keys()}
    return figures | more | same


def sample_answers(recipe: Recipe, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> list[dict[str, str]]:
    """Greedy answers of `model` to the recipe's sample prompts."""
    chat = recipe.spec.chat
    if not chat.samples:
        return []
    system = [Message("system", chat.system)] if chat.system else []
    prompts = [[*system, Message("user", prompt)] for prompt in chat.samples]
    answers = greedy(model, tokenizer, prompts, min(chat.max_new_tokens, SAMPLE_TOKENS))
    return [
        {"language": "ko" if re.search("[가-힣]", prompt) else "en", "prompt": prompt, "answer": answer}
        for prompt, answer in zip(chat.samples, answers, strict=True)
    ]
