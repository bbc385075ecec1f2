"""lm-eval's tasks on a model of this package: run by lm-eval, kept in this package's form.

In: names of lm-eval's tasks, a model. Out: `TaskResults`, one record for each document, written beside the package's own. What is
there already is not computed again.
"""

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError, nearest
from keural.evaluate.harness.samples import item_of, kind_of, language_of_samples
from keural.evaluate.models import EvaluatedModel
from keural.evaluate.results.records import TaskResults
from keural.evaluate.results.store import Header, open_results, results_file
from keural.files import fingerprint

PREFIX = "lm_eval."
"""Before the name of a task, so that it is never taken for the package's own."""
INSTALL = "lm-eval is not installed; install it with `pip install 'keural[eval]'`"


@dataclass(frozen=True)
class HarnessSettings:
    """What the command says beside the names."""

    shots: int | None = None
    limit: int | None = None
    include: Path | None = None
    """A directory with tasks of one's own."""
    run_code: bool = False
    """Whether tasks may run what the model wrote, by lm-eval's own means and in its own process."""


@dataclass(frozen=True)
class HarnessResults:
    """What a task came to."""

    results: TaskResults
    file: Path
    figures: Mapping[str, float]
    """lm-eval's own figures."""
    cut: int
    """Requests of all tasks of the command that lost their beginning."""


def run_harness(
    names: Sequence[str], model: EvaluatedModel, directory: Path, settings: HarnessSettings = HarnessSettings()
) -> list[HarnessResults]:
    """Run lm-eval's tasks (groups and tags stand for theirs), each kept in a file of results below `directory`.

    Raises:
        UserError: where lm-eval is not installed, a task is unknown, its data cannot be had, or asks for what the model cannot do.
    """
    with _quiet():
        manager = _manager(settings.include)
        _check_names(names, manager)
        from lm_eval import simple_evaluate

        from keural.evaluate.harness.bridge import KeuralLM

        bridge = KeuralLM(model)
        try:
            found = simple_evaluate(
                model=bridge,
                tasks=list(names),
                num_fewshot=settings.shots,
                limit=settings.limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=model.conditions.prompting == "chat",
                system_instruction=model.conditions.system,
                confirm_run_unsafe_code=settings.run_code,
            )
        except UserError:
            raise
        except Exception as error:  # a task of lm-eval may raise anything: no network, no data, code that is not allowed
            first = str(error).strip().split("\n")[0]
            raise UserError(f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {first}") from error
    return [_kept(task, found, model, directory, bridge.cut) for task in sorted(found["samples"])]


def _manager(include: Path | None) -> Any:
    try:
        import lm_eval.models  # noqa: F401  (before anything that registers a model)
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise UserError(f"lm-eval needs {error.name}, which is not installed; install it with pip") from error
        raise UserError(INSTALL) from error
    if include is not None and not include.is_dir():
        raise UserError(
            f"{include}: no such directory; it should hold tasks for lm-eval (`keural evaluate export-tasks` writes some)"
        )
    return TaskManager(include_path=None if include is None else str(include))


def _check_names(names: Sequence[str], manager: Any) -> None:
    known = manager.all_tasks
    for name in names:
        if name not in known:
            raise UserError(f"lm-eval has no task {name!r}{nearest(name, known)}; `lm_eval ls tasks` lists them")


def _kept(task: str, found: Mapping[str, Any], model: EvaluatedModel, directory: Path, cut: int) -> HarnessResults:
    """Write a task's samples as records."""
    samples, config = found["samples"][task], found["configs"][task]
    kind = kind_of(config)
    by_document: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    items, seen = [], Counter[str]()
    for document, entries in sorted(by_document.items()):
        item = item_of(kind, entries, model.asking)
        seen[item.id] += 1
        items.append((document, item if seen[item.id] == 1 else item.numbered(seen[item.id])))
    records = [(place, item.record) for place, item in items]
    header = Header(
        model=model.identity,
        task=f"{PREFIX}{task}",
        language=language_of_samples([record for _, record in records]),
        kind=kind,
        chance=items[0][1].chance if items and all(item.chance == items[0][1].chance for _, item in items) else None,
        digest=fingerprint(
            [found.get("lm_eval_version"), json.loads(json.dumps(config, default=_named)), found["n-shot"].get(task)]
        ),
        size=int(found["n-samples"][task]["original"]),
        shots=int(found["n-shot"].get(task) or 0),
    )
    path = results_file(directory, header)
    with open_results(path, header) as writer:
        writer.append([(place, record) for place, record in records if record.id not in writer.items])
        results = writer.kept().results([record.id for _, record in records])
    figures = {name: value for name, value in found["results"][task].items() if isinstance(value, int | float)}
    return HarnessResults(results, path, figures, cut)


def _named(value: Any) -> str:
    """A function of a task's configuration by its name, anything else by its type: what has no address in memory."""
    return str(getattr(value, "__qualname__", type(value).__name__))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without their progress bars and remarks, and nothing sent anywhere."""
    before = {
        name: os.environ.get(name) for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY")
    }
    level = logging.getLogger("lm_eval").level
    os.environ.update(dict.fromkeys(before, "1"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger("lm_eval").setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
