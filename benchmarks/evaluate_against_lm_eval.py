"""`keural evaluate` against lm-eval's `hf` on the same model directory: every log-probability, every choice, and the time of both.

In: a model directory and the directory with the sets. Out: a line a task: the largest difference of log-probabilities, how many
items have the same choice and how many the same prompt, processor and wall seconds of both sides and their ratio, and the time of a
second run. lm-eval asks in its own words: its installed task files are included, only the place of the data is another.

    python benchmarks/evaluate_against_lm_eval.py runs/laptop/final /data/sets [--tasks kobest_copa,mmlu] [--limit N] [--no-bos]

Needs lm-eval 0.4.13 and datasets. Nothing is fetched: the hub is told to be offline.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

LETTERS = "ABCDEFGHIJ"
BATCH = 16
"""Rows of a batch of lm-eval's; ours are counted in tokens."""


def _lettered(item: Any) -> dict[str, Any]:
    """Choices and answer as the hub's ARC and OpenBookQA have them."""
    letters = list(LETTERS[: len(item.record.choices)])
    return {"choices": {"text": list(item.record.choices), "label": letters}, "answerKey": letters[item.record.gold]}


@dataclass(frozen=True)
class Asked:
    """How lm-eval is asked a task of ours."""

    file: str
    """Its own task file."""
    row: Callable[[Any], dict[str, Any]]
    """An item as the hub's columns have it."""
    more: Mapping[str, Any] = ()  # type: ignore[assignment]
    """Further keys of the task file."""


TASKS: dict[str, Asked] = {
    "kobest_copa": Asked(
        "kobest/kobest_copa.yaml",
        lambda item: {
            "premise": item.record.question,
            "question": dict(item.record.fields)["relation"],
            "alternative_1": item.choices[0],
            "alternative_2": item.choices[1],
            "label": item.record.gold,
        },
    ),
    "kobest_boolq": Asked(
        "kobest/kobest_boolq.yaml",
        lambda item: {"paragraph": item.record.passage, "question": item.record.question, "label": item.record.gold},
    ),
    "kobest_hellaswag": Asked(
        "kobest/kobest_hellaswag.yaml",
        lambda item: {
            "context": item.record.question,
            **{f"ending_{number}": text for number, text in enumerate(item.choices, start=1)},
            "label": item.record.gold,
        },
    ),
    "kobest_sentineg": Asked(
        "kobest/kobest_sentineg.yaml", lambda item: {"sentence": item.record.question, "label": item.record.gold}
    ),
    "arc_challenge": Asked("arc/arc_challenge.yaml", lambda item: {"question": item.record.question, **_lettered(item)}),
    "openbookqa": Asked("openbookqa/openbookqa.yaml", lambda item: {"question_stem": item.record.question, **_lettered(item)}),
    "mmlu": Asked(
        "mmlu/default/_default_template_yaml",
        lambda item: {
            "question": item.record.question,
            "subject": dict(item.record.fields)["subject"].replace("_", " "),
            "choices": list(item.record.choices),
            "answer": item.record.gold,
        },
        {"description": "The following are multiple choice questions (with answers) about {{subject}}.\n\n"},
    ),
    "truthfulqa_mc1": Asked(
        "truthfulqa/truthfulqa_mc1.yaml",
        lambda item: {
            "question": item.record.question,
            "mc1_targets": {"choices": list(item.choices), "labels": [int(right) for right in item.right]},
        },
        {"validation_split": "test"},
    ),
}
"""By our name. Those that the report speaks of come first."""


@dataclass(frozen=True)
class Agreement:
    """How near two sides are on a task."""

    task: str
    items: int
    largest: float
    """Of the differences of log-probabilities, in nats."""
    same_choice: int
    same_prompt: int


def ask_lm_eval(model: Path, tasks: Sequence[Any], limit: int | None, bos: bool, work: Path) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of each task by name, in the order of the set."""
    import lm_eval
    import lm_eval.models  # before anything else registers a model
    import yaml
    from lm_eval.tasks import TaskManager

    import keural  # noqa: F401 - registers the architecture

    installed = Path(lm_eval.__file__).parent / "tasks"
    for task in tasks:
        asked = TASKS[task.spec.name]
        rows = [asked.row(item) for item in task.items[:limit]]
        data = work / f"{task.spec.name}.json"
        data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        place = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
        more = {"fewshot_config": None, **dict(asked.more)}
        config = {"include": str(installed / asked.file), "task": f"ours_{task.spec.name}", "tag": None, **place, **splits, **more}
        (work / f"ours_{task.spec.name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32", "add_bos_token": bos},
        tasks=[f"ours_{task.spec.name}" for task in tasks],
        num_fewshot=0,
        batch_size=BATCH,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_path=str(work), include_defaults=False),
    )
    return {
        name.removeprefix("ours_"): sorted(samples, key=lambda sample: int(sample["doc_id"]))
        for name, samples in found["samples"].items()
    }


def ask_ours(model: Path, tasks: Sequence[Any], limit: int | None, bos: bool, results: Path) -> dict[str, Any]:
    """Our results of each task by name."""
    from keural.evaluate.evaluation import evaluate
    from keural.evaluate.models import Conditions, stored_model

    opened = stored_model(model, Conditions("bos" if bos else "text", "float32", too_long="cut"))
    return {task.spec.name: evaluate(opened, task, results, limit).results for task in tasks}


def agreement(task: str, ours: Any, theirs: Sequence[dict[str, Any]]) -> Agreement:
    """Item by item."""
    largest, same_choice, same_prompt = 0.0, 0, 0
    assert len(ours.items) == len(theirs), f"{task}: {len(ours.items)} items here, {len(theirs)} there"
    for item, sample in zip(ours.items, theirs, strict=True):
        values = [float(answer[0]) for answer, *_ in sample["resps"]]
        largest = max(largest, *(abs(one - two) for one, two in zip(item.logprobs, values, strict=True)))
        same_choice += max(range(len(values)), key=values.__getitem__) == max(range(len(values)), key=item.logprobs.__getitem__)
        asked = [context + continuation for context, continuation in sample["arguments"]]
        same_prompt += asked == [f"{item.question} {choice}" for choice in item.details["choices"]]
    return Agreement(task, len(theirs), largest, same_choice, same_prompt)


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function gives, its processor seconds and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = function()
    return found, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="kobest_copa,kobest_boolq,kobest_hellaswag,kobest_sentineg,arc_challenge,mmlu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--no-bos", action="store_true")
    given = parser.parse_args()
    import lm_eval.models.huggingface  # noqa: F401 - importing is no part of what is measured

    import keural.evaluate.scoring.network  # noqa: F401
    from keural.evaluate.tasks.library import select
    from keural.evaluate.tasks.loading import load

    timed_names = ("ours cpu", "theirs", "ratio", "ours wall", "theirs", "ratio", "again", "ratio")
    agreed_names = f"{'items':>6} {'max |d|':>9} {'choice':>7} {'prompt':>7}"
    print(f"{'task':<18} {agreed_names} " + " ".join(f"{name:>9}" for name in timed_names))
    for spec in select(given.tasks.split(","), given.data):
        task = load(spec, given.data, 0)
        with tempfile.TemporaryDirectory() as directory:
            work, bos = Path(directory), not given.no_bos
            ours, cpu, wall = timed(lambda: ask_ours(given.model, [task], given.limit, bos, work / "results"))  # noqa: B023
            theirs, their_cpu, their_wall = timed(lambda: ask_lm_eval(given.model, [task], given.limit, bos, work))  # noqa: B023
            _, _, again = timed(lambda: ask_ours(given.model, [task], given.limit, bos, work / "results"))  # noqa: B023
        found = agreement(spec.name, ours[spec.name], theirs[spec.name])
        figures = (cpu, their_cpu, their_cpu / cpu, wall, their_wall, their_wall / wall, again, wall / again)
        agreed = f"{found.items:>6,} {found.largest:>9.1e} {found.same_choice:>7,} {found.same_prompt:>7,}"
        print(f"{spec.name:<18} {agreed} " + " ".join(f"{figure:>9.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
