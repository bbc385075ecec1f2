"""What a run directory holds, read tolerantly: a run may have one stage, be interrupted, or lack an evaluation.

In: `runs/<recipe>/`. Out: a `Run` of plain values. Nothing is computed here beyond sums; files that are not there yet are absent
values, and the half-written last line of a killed run's metrics is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.files import read_json, read_text, read_yaml
from keural.model import KeuralConfig, count_parameters
from keural.parsing import Malformed, parse_json


@dataclass(frozen=True)
class Stage:
    """One stage: its settings, its result where it is finished, and its metrics."""

    name: str
    settings: dict[str, Any]
    done: dict[str, Any]
    steps: list[dict[str, Any]]
    """One entry per optimizer step, in order."""
    heldout: list[dict[str, Any]]
    """`{"step", "heldout": {...}}`, in order."""

    @property
    def finished(self) -> bool:
        """Whether the stage reached its end."""
        return bool(self.done)

    @property
    def objective(self) -> str:
        """next_token, sft or dpo; empty when unknown."""
        return str(self.done.get("objective") or self.settings.get("objective") or "")

    def total(self, key: str) -> float:
        """Tokens or seconds of the stage, from its result or summed over the steps that were done."""
        if key in self.done:
            return float(self.done[key])
        return sum(step.get(key) or 0.0 for step in self.steps)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was written."""
        pairs = [(int(step["step"]), float(step[key])) for step in self.steps if isinstance(step.get(key), int | float)]
        return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class Run:
    """A run directory."""

    name: str
    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    stages: list[Stage]
    summary: dict[str, Any]
    parameters: tuple[int, int] | None
    """Total and active parameters, when a stage has saved its model."""
    ended: datetime | None
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.total("seconds") for stage in self.stages)

    @property
    def tokens(self) -> float:
        """Tokens of all stages."""
        return sum(stage.total("tokens") for stage in self.stages)


def read_run(directory: Path) -> Run:
    """Read a run directory. Raises `UserError` when it holds neither a recipe, nor a summary, nor any stage."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a run directory such as runs/toy")
    recipe_file, summary_file = directory / "recipe.yaml", directory / "summary.json"
    recipe_text = read_text(recipe_file) if recipe_file.is_file() else ""
    resolved = _mapping(read_yaml(recipe_file)) if recipe_text else {}
    summary = _mapping(read_json(summary_file)) if summary_file.is_file() else {}
    stages = [_read_stage(directory / name, settings) for name, settings in _stage_names(directory, resolved, summary)]
    stages = [stage for stage in stages if stage.finished or stage.steps]
    if not (resolved or summary or stages):
        raise UserError(f"{directory}: is not a run directory (no recipe.yaml, summary.json or stage)")
    return Run(
        name=str(summary.get("recipe") or _mapping(resolved.get("recipe")).get("name") or directory.resolve().name),
        directory=directory,
        recipe=_mapping(resolved.get("recipe")),
        recipe_text=recipe_text,
        stages=stages,
        summary=summary,
        parameters=_parameters(directory, stages),
        ended=_ended(directory, stages),
        evaluation=_mapping(summary.get("evaluation")),
    )


def _stage_names(directory: Path, resolved: dict[str, Any], summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the stages in their order, with the settings the recipe gives them."""
    listed = {str(stage["name"]): stage for stage in resolved.get("stages", []) if isinstance(stage, dict) and "name" in stage}
    for stage in summary.get("stages", []):
        listed.setdefault(str(stage.get("name")), {})
    if not listed:
        found = sorted(directory.glob("*/metrics.jsonl"), key=lambda file: (file.stat().st_mtime, file.parent.name))
        listed = {file.parent.name: {} for file in found if ".old-" not in file.parent.name}
    yield from listed.items()


def _read_stage(directory: Path, settings: dict[str, Any]) -> Stage:
    lines = list(_lines(directory / "metrics.jsonl"))
    # A resumed stage repeats the steps after its last checkpoint; the later line counts.
    steps = {line["step"]: line for line in lines if "loss" in line}
    heldout = {line["step"]: line for line in lines if isinstance(line.get("heldout"), dict)}
    done_file = directory / "done.json"
    return Stage(
        name=directory.name,
        settings=settings or _yaml(directory / "stage.yaml"),
        done=_mapping(read_json(done_file)) if done_file.is_file() else {},
        steps=[steps[step] for step in sorted(steps)],
        heldout=[heldout[step] for step in sorted(heldout)],
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = parse_json(line)
        except Malformed:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            yield value


def _parameters(directory: Path, stages: list[Stage]) -> tuple[int, int] | None:
    for stage in reversed(stages):
        file = directory / stage.name / "model" / "config.json"
        if file.is_file():
            count = count_parameters(KeuralConfig.from_dict(read_json(file)))
            return count.total, count.active
    return None


def _ended(directory: Path, stages: list[Stage]) -> datetime | None:
    """When the run last wrote something."""
    files = [directory / "summary.json", *(directory / stage.name / "metrics.jsonl" for stage in stages)]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return datetime.fromtimestamp(max(times)).astimezone() if times else None


def _yaml(file: Path) -> dict[str, Any]:
    return _mapping(read_yaml(file)) if file.is_file() else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
