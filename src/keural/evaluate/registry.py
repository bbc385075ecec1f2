"""What can be measured of a finished recipe: one row per task, found by the recipe's evaluation keys.

In: a recipe's `evaluation` and a `Bench` that opens the models of its stages. Out: figures for `summary.json`. A new task is a row
here, and the settings under its key in `keural.recipe.evaluation`.
"""

from keural.evaluate import heldout_text, toy_world
from keural.evaluate.bench import Task

TASKS: tuple[Task, ...] = (
    Task(
        "exact_match",
        "toy world: answers to held-out questions and which of two answers is more probable, after every stage",
        toy_world.measure,
        of_stages=True,
    ),
    Task("bits_per_byte", "held-out text of a stage, with xz beside it", heldout_text.measure, check=heldout_text.check),
)
