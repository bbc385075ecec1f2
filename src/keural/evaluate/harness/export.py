"""This package's tasks as lm-eval's: a YAML file and the items as JSON lines for each.

In: loaded tasks, a new directory. Out: files that `lm_eval --include_path DIR --tasks keural_NAME` runs offline. Prompts stand in
them as they are asked here, examples and all, so that both sides ask the same text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keural.evaluate.generated.kind import settings_of
from keural.evaluate.tasks.loading import LoadedTask
from keural.files import atomic_directory, check_new

PREFIX = "keural_"
_METRICS = {"sum": "acc", "per_character": "acc_norm", "per_byte": "acc_bytes"}
"""Rules of scoring as lm-eval's metrics; what it has no metric for is left out of its tables."""
_FUNCTIONS = "keural_verifiers"
VERIFIERS = '''"""Instructions judged by keural's own checks, for the tasks beside this file."""

import json

from keural.evaluate.verifiers import REGISTRIES, parse_instructions, verdicts


def _judge(registry, document, results):
    kinds, arguments = json.loads(document["instructions"]), json.loads(document["arguments"])
    instructions = parse_instructions(REGISTRIES[registry], kinds, arguments, document["id"])
    found = verdicts(REGISTRIES[registry], instructions, results[0])
    return {"strict": float(found.all_strict), "loose": float(found.all_loose)}


def ifeval(doc, results):
    return _judge("ifeval", doc, results)


def ifeval_ko(doc, results):
    return _judge("ifeval_ko", doc, results)


def ko_instructions(doc, results):
    return _judge("ko_instructions", doc, results)
'''


def export_tasks(tasks: Sequence[LoadedTask], out: Path) -> dict[str, str]:
    """Write the tasks into the new directory `out`; returns why some are left out, by name.

    Raises `UserError` where `out` is there and not empty, or cannot be written.
    """
    check_new(out)
    left_out: dict[str, str] = {}
    with atomic_directory(out) as directory:
        for task in tasks:
            reason, settings, rows = _EXPORTS[task.spec.kind](task)
            if reason:
                left_out[task.spec.name] = reason
                continue
            file = f"{task.spec.name}.jsonl"
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (directory / file).write_text(lines, encoding="utf-8")
            whole = _common(task, str((out / file).absolute())) | settings
            text = "".join(f"{key}: {_yaml(value)}\n" for key, value in whole.items())
            (directory / f"{PREFIX}{task.spec.name}.yaml").write_text(text, encoding="utf-8")
        (directory / f"{_FUNCTIONS}.py").write_text(VERIFIERS, encoding="utf-8")
    return left_out


class _Function(str):
    """A function in the file beside the task."""


def _yaml(value: Any) -> str:
    """A value in one line; JSON is YAML, functions have a tag of lm-eval's."""
    return f"!function {_FUNCTIONS}.{value}" if isinstance(value, _Function) else json.dumps(value, ensure_ascii=False)


def _common(task: LoadedTask, file: str) -> dict[str, Any]:
    return {
        "task": f"{PREFIX}{task.spec.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0, "digest": task.digest},
    }


Exported = tuple[str, dict[str, Any], list[dict[str, Any]]]
"""Why it is left out, or its settings and rows."""


def _choice(task: LoadedTask) -> Exported:
    if any(sum(item.right) != 1 for item in task.items):
        return "items with several right choices have no metric of lm-eval's", {}, []
    metrics = [_METRICS[rule] for rule in task.spec.scoring if rule in _METRICS] or ["acc"]
    rows = [
        {"id": item.id, "prompt": item.prompt, "choices": list(item.choices), "gold": item.right.index(True)} for item in task.items
    ]
    return (
        "",
        {
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": task.spec.delimiter,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        },
        rows,
    )


def _rolling(task: LoadedTask) -> Exported:
    return (
        "",
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        [{"id": item.id, "text": item.prompt} for item in task.items],
    )


def _generate(task: LoadedTask) -> Exported:
    settings = settings_of(task.spec)
    if settings.code:
        return "programs are run by this package alone; lm-eval has humaneval of its own", {}, []
    if settings.verifier is None and any(len(item.choices) != 1 for item in task.items):
        return "items with several right answers have no metric of lm-eval's", {}, []
    sampled = settings.temperature > 0
    whole: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "generation_kwargs": {
            "until": settings.stop,
            "max_gen_toks": settings.max_new_tokens,
            "do_sample": sampled,
            "temperature": settings.temperature,
            **({"top_p": settings.top_p} if sampled else {}),
        },
        "repeats": settings.samples,
    }
    if settings.verifier is not None:
        names = ("strict", "loose")
        whole |= {"doc_to_target": "id", "process_results": _Function(settings.verifier)}
        whole["metric_list"] = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
        fields = ("instructions", "arguments")
        return (
            "",
            whole,
            [{"id": item.id, "prompt": item.prompt, **{name: item.values[name] for name in fields}} for item in task.items],
        )
    rules = settings.normalization
    ignore = [*rules.ignore, *([r"\A\s+", r"\s+\Z"] if rules.ignore_spaces else [])]
    whole |= {
        "doc_to_target": "answer",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": rules.ignore_case,
                "ignore_punctuation": rules.ignore_punctuation,
                "regexes_to_ignore": ignore,
            }
        ],
        "filter_list": [{"name": way.name, "filter": _filters(way.pattern, way.take)} for way in settings.extraction],
    }
    return "", whole, [{"id": item.id, "prompt": item.prompt, "answer": item.choices[0]} for item in task.items]


def _filters(pattern: str | None, take: str) -> list[dict[str, Any]]:
    first = (
        [] if pattern is None else [{"function": "regex", "regex_pattern": pattern, "group_select": 0 if take == "first" else -1}]
    )
    return [*first, {"function": "take_first"}]


_EXPORTS: Mapping[str, Callable[[LoadedTask], Exported]] = {
    "choice": _choice,
    "pair": _choice,
    "rolling": _rolling,
    "generate": _generate,
}
