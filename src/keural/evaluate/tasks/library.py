"""The tasks that come with the package, and what a name on the command line stands for.

In: names, files of the user's own, or a language. Out: `TaskSpec`s.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from keural.errors import UserError, for_all, nearest
from keural.evaluate.tasks.places import SHIPPED, is_there
from keural.evaluate.tasks.spec import TaskSpec, read_task


@functools.cache
def shipped() -> dict[str, TaskSpec]:
    """The package's tasks by name."""
    found = {}
    for file in sorted(SHIPPED.glob("*.yaml")):
        spec = read_task(file)
        assert spec.name == file.stem, f"{file} describes {spec.name}"
        found[spec.name] = spec
    return found


def select(wanted: Sequence[str], data: Path | None) -> list[TaskSpec]:
    """The tasks that are wanted: by name, by file (`.yaml`), or those of a language whose sets are there (`ko`, `en`; `all`).

    Without any, all whose sets are there. Raises `UserError` for unknown names, all of them at once.
    """
    found: dict[str, TaskSpec] = {}
    for specs in for_all(wanted or ["all"], lambda name: _named(name, data)):
        for spec in specs:
            if spec.name in found and found[spec.name] != spec:
                raise UserError(f"task {spec.name}: is given twice, with different settings; give another name to one of them")
            found[spec.name] = spec
    return list(found.values())


def _named(name: str, data: Path | None) -> list[TaskSpec]:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return [read_task(Path(name))]
    tasks = shipped()
    languages = {spec.language for spec in tasks.values()}
    if name in {*languages, "all"}:
        return _there(name, [spec for spec in tasks.values() if name in (spec.language, "all")], data)
    if name in tasks:
        return [tasks[name]]
    part = _part(name)
    if part is not None:
        return [part]
    raise UserError(
        f"unknown task {name!r}{nearest(name, [*tasks, *sorted(languages)])}; `keural evaluate --list` lists them, and a file of "
        "your own is named by its path"
    )


def _there(name: str, specs: list[TaskSpec], data: Path | None) -> list[TaskSpec]:
    """Those whose sets are there. Raises `UserError` when none is."""
    if data is None:
        raise UserError(
            f"--data DIR says where the sets of tasks lie; `keural data fetch evaluation DIR` brings them (tasks: {name})"
        )
    found = [spec for spec in specs if is_there(spec.places, data)]
    if not found:
        raise UserError(f"{data}: holds the set of no task ({name}); `keural data fetch evaluation {data}` brings the public ones")
    return found


def _part(name: str) -> TaskSpec | None:
    """The part of a task that a name such as `mmlu_anatomy` stands for."""
    for spec in shipped().values():
        if spec.parts is not None and name.startswith(f"{spec.name}_"):
            value = name.removeprefix(f"{spec.name}_")
            harness = None if spec.harness is None else f"{spec.harness}_{value}"
            return spec.model_copy(
                update={"name": name, "where": {spec.parts: value}, "parts": None, "cluster": None, "harness": harness}
            )
    return None
