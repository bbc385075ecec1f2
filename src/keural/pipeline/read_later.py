"""What a run reads when its training is over, read before it begins: a damaged file is found now, not hours later.

In: a run directory and its recipe. Out: nothing, or the refusal that would have come at the end.
"""

from pathlib import Path

from keural.evaluate.contamination import SeenFile
from keural.evaluate.results.store import check_results
from keural.pipeline.run_directory import DONE, EVALUATION, RESULTS, Done, EvaluationFile
from keural.pipeline.scores import SCORES, ScoresFile
from keural.recipe import Recipe
from keural.train.checks.record import CHECKS_FILE, ChecksFile


def check_read_later(recipe: Recipe, out: Path) -> None:
    """Raise `UserError` for a damaged file of an earlier command that the evaluation, the summary or the report will need."""
    for stage in recipe.stages:
        Done.find(out / stage.name / DONE)
        ChecksFile.find(out / stage.name / CHECKS_FILE)
    EvaluationFile.find(out / EVALUATION)
    ScoresFile.find(out / RESULTS / SCORES)
    for path in sorted((out / RESULTS).glob("seen-*.json")):
        SeenFile.read(path)
    for path in sorted((out / RESULTS).glob("*/*.jsonl")):
        check_results(path)
