"""What a report is made from: a run as plain values.

In: what `keural.pipeline.run_contents.read_run` has read and checked. Out: the same with its sums and series. Nothing is read
here; a run may have one stage, be interrupted, or lack an evaluation, and what is not there yet is an absent value.
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


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
    alarms: list[dict[str, Any]] = field(default_factory=list)
    """`{"step", "alarm", "message"}`, in order."""
    checks: dict[str, Any] = field(default_factory=dict)
    """What it was checked for before its first step (`keural.train.checks.record.ChecksFile`)."""

    @property
    def finished(self) -> bool:
        """Whether the stage reached its end."""
        return bool(self.done)

    @property
    def objective(self) -> str:
        """A name of `keural.recipe.OBJECTIVES`; empty when unknown."""
        return str(self.done.get("objective") or self.settings.get("objective") or "")

    def total(self, key: str) -> float:
        """Tokens or seconds of the stage, from its result or from its latest step, which has the sum so far."""
        if key in self.done:
            return float(self.done[key])
        return float(self.steps[-1].get(key) or 0.0) if self.steps else 0.0

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
