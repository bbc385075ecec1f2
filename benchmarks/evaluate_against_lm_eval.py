"""`keural evaluate` against lm-eval's `hf` on the same model directory: every log-probability, every choice, and the time of both.

In: a model directory and the directory with the sets. Out: a line a task: the largest difference of log-probabilities, how many
items have the same choice and how many the same prompt, likelihoods a second of both sides by processor and wall time and their
ratio, and the time of a second run. lm-eval asks in its own words: its installed task files are included, only the place of the
data is another. A log-probability that differs by more than 1e-4 is computed once more in float64, with the narrowest choice of
experts that was made for it: where two experts are as near to each other as rounding is large, float32 has no one answer.

    python -m benchmarks.evaluate_against_lm_eval runs/laptop/final /data/sets [--tasks kobest_copa,mmlu] [--limit N] [--no-bos]
    python -m benchmarks.evaluate_against_lm_eval runs/laptop/final /data/sets --toy recipes/toy runs/toy

With `--toy` the whole table of a finished toy run is measured anew, and timed. Needs lm-eval 0.4.13 and datasets. Nothing is
fetched: the hub is told to be offline.
"""

import argparse
import json
import os
import shutil
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
ALIKE = 1e-4
"""Nats by which a log-probability of a choice may differ."""


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
    choices: int
    largest: float
    """Of the differences of log-probabilities, in nats."""
    differing: list[tuple[int, int, float, float]]
    """Of each choice that differs by more than `ALIKE`: item, choice, and both sides' values."""
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
    from keural.evaluate.results.store import remembered_hashes

    with remembered_hashes(results) as hashes:
        opened = _opened(model, bos, hashes)
    return {task.spec.name: evaluate(opened, task, results, limit).results for task in tasks}


def _opened(model: Path, bos: bool, hashes: Any = None) -> Any:
    from keural.evaluate.models import Conditions, stored_model

    return stored_model(model, Conditions("bos" if bos else "text", "float32", too_long="cut"), hashes=hashes)


def agreement(task: str, ours: Any, theirs: Sequence[dict[str, Any]]) -> Agreement:
    """Item by item."""
    differences, differing, same_choice, same_prompt = [0.0], [], 0, 0
    assert len(ours.items) == len(theirs), f"{task}: {len(ours.items)} items here, {len(theirs)} there"
    for number, (item, sample) in enumerate(zip(ours.items, theirs, strict=True)):
        values = [float(answer[0]) for answer, *_ in sample["resps"]]
        pairs = list(enumerate(zip(item.logprobs, values, strict=True)))
        differences += [abs(one - two) for _, (one, two) in pairs]
        differing += [(number, choice, one, two) for choice, (one, two) in pairs if abs(one - two) > ALIKE]
        same_choice += max(range(len(values)), key=values.__getitem__) == max(range(len(values)), key=item.logprobs.__getitem__)
        asked = [context + continuation for context, continuation in sample["arguments"]]
        same_prompt += asked == [f"{item.question} {choice}" for choice in item.details["choices"]]
    return Agreement(task, len(theirs), len(differences) - 1, max(differences), differing, same_choice, same_prompt)


def in_float64(model: Path, bos: bool, question: str, choice: str) -> tuple[float, float]:
    """A choice's log-probability by the plain network in float64, and by how much the narrowest of its choices of experts was made.

    The second figure is the least difference, over layers and tokens, of the router's logits for the last expert that was taken and
    the first that was not.
    """
    import torch

    opened = _opened(model, bos)
    request, _ = opened.asking.likelihood(question, choice)
    network, start = opened.network.model.double(), len(request.context)
    with torch.inference_mode():
        found = network(torch.tensor([request.context + request.continuation]), use_cache=False, output_router_logits=True)
    rows = found.logits[0].log_softmax(-1)
    total = sum(rows[start - 1 + step, token].item() for step, token in enumerate(request.continuation))
    taken = network.config.num_experts_per_tok
    ranked = [logits.flatten(0, -2).sort(-1, descending=True).values for logits in found.router_logits]
    return total, min(float((logits[:, taken - 1] - logits[:, taken]).min()) for logits in ranked)


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function gives, its processor seconds and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = function()
    return found, time.process_time() - cpu, time.perf_counter() - wall


def time_toy_table(recipe_directory: Path, run: Path) -> None:
    """Measure the table of a finished toy run where no result is kept, and once more where all are."""
    from keural.evaluate.bench import Bench
    from keural.evaluate.toy_world import measure
    from keural.pretrained.directory import read_config
    from keural.recipe import load_recipe
    from keural.tokenizer import KeuralTokenizer

    recipe = load_recipe(recipe_directory)
    names = [stage.name for stage in recipe.stages if (run / stage.name / "model").is_dir()]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        for name in names:
            shutil.copytree(run / name / "model", out / name / "model")
        first = out / names[0] / "model"
        for what in ("measured", "kept"):
            bench = Bench(recipe, out, KeuralTokenizer.load(first), read_config(first), {}, names)
            table, cpu, wall = timed(lambda: measure(bench, recipe.spec.evaluation.exact_match))  # noqa: B023
            items = sum(task["n"] for stage in table["stages"].values() for task in stage["tasks"].values())
            print(f"toy table of {len(table['stages'])} models, {items:,} items, {what}: {cpu:.1f} s of processor, {wall:.1f} s")


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="kobest_copa,kobest_boolq,kobest_hellaswag,kobest_sentineg,arc_challenge,mmlu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--no-bos", action="store_true")
    parser.add_argument("--toy", nargs=2, type=Path, metavar=("RECIPE", "RUN"))
    given = parser.parse_args()
    if given.toy:
        time_toy_table(*given.toy)
    import lm_eval.models.huggingface  # noqa: F401 - importing is no part of what is measured

    import keural.evaluate.scoring.network  # noqa: F401
    from keural.evaluate.tasks.library import select
    from keural.evaluate.tasks.loading import load

    agreed_names = f"{'items':>6} {'max |d|':>9} {'> 1e-4':>6} {'choice':>7} {'prompt':>7}"
    print(f"{'likelihoods a second':<60}{'processor':>27} {'wall':>27} {'second run':>16}")
    print(f"{'task':<18} {agreed_names}   " + f"{'ours':>9} {'lm-eval':>9} {'ratio':>7} " * 2 + f"{'s':>8} {'ratio':>7}")
    seconds = [0.0] * 5
    for spec in select(given.tasks.split(","), given.data):
        task = load(spec, given.data, 0)
        with tempfile.TemporaryDirectory() as directory:
            work, bos = Path(directory), not given.no_bos
            ours, cpu, wall = timed(lambda: ask_ours(given.model, [task], given.limit, bos, work / "results"))  # noqa: B023
            theirs, their_cpu, their_wall = timed(lambda: ask_lm_eval(given.model, [task], given.limit, bos, work))  # noqa: B023
            _, _, again = timed(lambda: ask_ours(given.model, [task], given.limit, bos, work / "results"))  # noqa: B023
        found = agreement(spec.name, ours[spec.name], theirs[spec.name])
        seconds = [total + one for total, one in zip(seconds, (cpu, their_cpu, wall, their_wall, again), strict=True)]
        agreed = (
            f"{found.items:>6,} {found.largest:>9.1e} {len(found.differing):>6,} {found.same_choice:>7,} {found.same_prompt:>7,}"
        )
        rates = [
            f"{found.choices / a:>9,.0f} {found.choices / b:>9,.0f} {b / a:>7.2f}"
            for a, b in ((cpu, their_cpu), (wall, their_wall))
        ]
        print(f"{spec.name:<18} {agreed}   {' '.join(rates)} {again:>8.2f} {wall / again:>7.0f}", flush=True)
        for number, choice, one, two in found.differing:
            item = ours[spec.name].items[number]
            exact, margin = in_float64(given.model, bos, item.question, f"{spec.delimiter}{item.details['choices'][choice]}")
            told = f"ours {one:.6f}, lm-eval {two:.6f}, in float64 {exact:.6f}"
            print(f"  item {number}, choice {choice}: {told}; narrowest choice of experts {margin:.1e}", flush=True)
    cpu, their_cpu, wall, their_wall, again = seconds
    print(f"all: ours {cpu:.0f} s of processor, lm-eval {their_cpu:.0f} s ({their_cpu / cpu:.2f}); ", end="")
    print(f"second run {again:.2f} s of {wall:.1f} s ({wall / again:.0f})")


if __name__ == "__main__":
    main()
