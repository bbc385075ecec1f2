"""Item by item against lm-eval's `hf` on the same directory, in its own words: log-probabilities, choices, prompts."""

from pathlib import Path

import pytest

from benchmarks.evaluate_against_lm_eval import agreement, ask_lm_eval, ask_ours
from keural.evaluate.tasks.library import shipped
from keural.evaluate.tasks.loading import load
from tests.helpers.small_sets import write_copa, write_mmlu

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("bos", [True, False])
def test_every_log_probability_is_that_of_lm_eval(model_dir: Path, tmp_path: Path, bos: bool) -> None:
    write_copa(tmp_path, 40)
    write_mmlu(tmp_path, 20)
    tasks = [load(shipped()[name], tmp_path) for name in ("kobest_copa", "mmlu")]

    theirs = ask_lm_eval(model_dir, tasks, None, bos, tmp_path)
    ours = ask_ours(model_dir, tasks, None, bos, tmp_path / "results")

    for task in tasks:
        found = agreement(task.spec.name, ours[task.spec.name], theirs[task.spec.name])
        assert found.largest <= 1e-4
        assert not found.differing
        assert found.choices == sum(len(item.choices) for item in task.items)
        assert found.same_choice == found.same_prompt == found.items == len(task.items)
