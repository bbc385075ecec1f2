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
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from keural.errors import UserError, nearest
from keural.evaluate.harness.samples import Sampled, item_of, kind_of, language_of_samples
from keural.evaluate.models import EvaluatedModel
from keural.evaluate.results.records import TaskResults
from keural.evaluate.results.store import Header, finished_results, open_results, results_file
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
    """What the tasks of a command came to."""

    tasks: Mapping[str, tuple[TaskResults, Path]]
    """By lm-eval's name the records, and the file that has them."""
    computed: int
    """Tasks that were computed now."""
    cut: int
    """Requests that lost their beginning now, because they were longer than the context."""


@dataclass(frozen=True)
class _Planned:
    """A task that is to be run, or was."""

    name: str
    task: Any
    path: Path
    header: Header
    wanted: int
    """Documents of it."""

    def kept(self) -> TaskResults | None:
        """Its records, where all that are wanted are there."""
        kept = finished_results(self.path, self.header)
        if kept is None:
            return None
        there = sum(place < self.wanted for place, _ in kept.items.values())
        return kept.results(self.wanted) if there == self.wanted else None


_NO_SETTINGS = HarnessSettings()


def run_harness(
    names: Sequence[str], model: EvaluatedModel, directory: Path, settings: HarnessSettings = _NO_SETTINGS
) -> HarnessResults:
    """Run lm-eval's tasks (groups and tags stand for theirs), each kept in a file of results below `directory`.

    Raises:
        UserError: where lm-eval is not installed, a task is unknown, its data cannot be had, or asks for what the model cannot do.
    """
    with _quiet():
        manager = _manager(settings.include, names)
        _check_names(names, manager)
        with _refusing(names):
            loaded = manager.load(list(names))["tasks"]
            planned = [_planned(name, task, model, directory, settings) for name, task in sorted(loaded.items())]
        kept = {plan.name: plan.kept() for plan in planned}
        missing = [plan for plan in planned if kept[plan.name] is None]
        cut = _run(missing, manager, model, settings, kept) if missing else 0
    found = {plan.name: (results, plan.path) for plan in planned if (results := kept[plan.name]) is not None}
    return HarnessResults(found, len(missing), cut)


def _planned(name: str, task: Any, model: EvaluatedModel, directory: Path, settings: HarnessSettings) -> _Planned:
    size = len(task.eval_docs)
    config = json.loads(json.dumps(task.dump_config(), default=_named))
    config["metadata"] = {key: value for key, value in (config.get("metadata") or {}).items() if key in ("version", "digest")}
    contents = [metadata.version("lm-eval"), config, settings.shots, size]
    header = Header(
        model=model.identity,
        task=f"{PREFIX}{name}",
        language="en",
        kind=kind_of(config),
        chance=None,
        digest=fingerprint(contents),
        size=size,
        shots=int(config.get("num_fewshot") or 0) if settings.shots is None else settings.shots,
    )
    wanted = size if settings.limit is None else min(size, settings.limit)
    return _Planned(name, task, results_file(directory, header), header, wanted)


def _run(
    missing: Sequence[_Planned],
    manager: Any,
    model: EvaluatedModel,
    settings: HarnessSettings,
    kept: dict[str, TaskResults | None],
) -> int:
    """Let lm-eval run what is missing, and keep it; returns how many requests were cut."""
    from lm_eval import simple_evaluate

    from keural.evaluate.harness.bridge import KeuralLM

    bridge = KeuralLM(model)
    with _refusing([plan.name for plan in missing]):
        found = simple_evaluate(
            model=bridge,
            tasks=[plan.task for plan in missing],
            num_fewshot=settings.shots,
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=model.conditions.prompting == "chat",
            system_instruction=model.conditions.system,
            confirm_run_unsafe_code=settings.run_code,
        )
    if found is None:  # lm-eval leaves what it found to another process
        raise UserError("lm-eval's tasks run in one process; start the command without torchrun (LOCAL_RANK is set here)")
    for plan in missing:
        kept[plan.name] = _keep(plan, found["samples"][plan.name], model)
    return bridge.cut


@contextlib.contextmanager
def _refusing(names: Sequence[str]) -> Iterator[None]:
    """What lm-eval raises, as one line: no network, no data, code that is not allowed, whatever a task may do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {first}") from error


def _manager(include: Path | None, names: Sequence[str]) -> Any:
    """lm-eval's table of tasks; its own thousands, which take seconds to read, only where they are asked for."""
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
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    return TaskManager(include_path=None if include is None else str(include))


def _check_names(names: Sequence[str], manager: Any) -> None:
    known = manager.all_tasks
    for name in names:
        if name not in known:
            raise UserError(f"lm-eval has no task {name!r}{nearest(name, known)}; `lm_eval ls tasks` lists them")


def _keep(plan: _Planned, samples: Sequence[Mapping[str, Any]], model: EvaluatedModel) -> TaskResults:
    """Write a task's samples as records."""
    by_document: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    items: list[tuple[int, Sampled]] = []
    seen = Counter[str]()
    for document, entries in sorted(by_document.items()):
        item = item_of(plan.header.kind, entries, model.asking)
        seen[item.id] += 1
        items.append((document, item if seen[item.id] == 1 else item.numbered(seen[item.id])))
    chances = {item.chance for _, item in items}
    language = language_of_samples([item.record for _, item in items])
    header = replace(plan.header, language=language, chance=chances.pop() if len(chances) == 1 else None)
    with open_results(plan.path, header) as writer:
        writer.append([(place, item.record) for place, item in items if item.id not in writer.items])
        return writer.kept().results(plan.wanted)


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
