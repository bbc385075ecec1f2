"""What can be measured of a finished recipe: one row per task, found by the recipe's evaluation keys.

In: a recipe's `evaluation` and a `Bench` that opens the models of its stages. Out: figures for `summary.json`. A new task is a row
here, and the settings under its key in `keural.recipe.evaluation`.
"""

from keural.evaluate import heldout_text, toy_world
from keural.evaluate.bench import Task

TASKS: tuple[Task, ...] = (
    Task("exact_match", "toy world: greedy answers to held-out questions, and how polite they are", toy_world.questions),
    Task("exact_match", "toy world: which of two answers is more probable", toy_world.preferences),
    Task("bits_per_byte", "held-out text of a stage, with xz beside it", heldout_text.measure, heldout_text.check),
)
