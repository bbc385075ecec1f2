"""What `keural evaluate` does beyond its own likelihoods: tasks of lm-eval, and programs only where they are allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keural.errors import UserError
from keural.terminal import note

if TYPE_CHECKING:
    from keural.evaluate.evaluation import Evaluated
    from keural.evaluate.models import EvaluatedModel
    from keural.evaluate.tasks.spec import TaskSpec


@dataclass(frozen=True)
class HarnessAsked:
    """What the command says of lm-eval's tasks."""

    names: Sequence[str]
    include: Path | None
    shots: int | None
    limit: int | None
    run_code: bool

    def of(self, model: "EvaluatedModel", results: Path) -> "list[Evaluated]":
        """The tasks' results on a model. Raises `UserError` as `run_harness` does."""
        from keural.evaluate.evaluation import Evaluated
        from keural.evaluate.harness.running import HarnessSettings, run_harness

        settings = HarnessSettings(self.shots, self.limit, self.include, self.run_code)
        found = run_harness(self.names, model, results, settings)
        if found.cut:
            note(f"({model.name}: {found.cut:,} of lm-eval's requests were longer than the context and lost their beginning)")
        return [Evaluated(each, file, found.computed) for each, file in found.tasks.values()]


def allowed(specs: "Sequence[TaskSpec]", names: Sequence[str], run_code: bool) -> "list[TaskSpec]":
    """The tasks that may be asked: those that run programs only with `--run-code`.

    Raises `UserError` for one that is named; where it is only among those that are there, it is left out, and said.
    """
    found = []
    for spec in specs:
        runs = spec.generation is not None and spec.generation.code
        if runs and not run_code and spec.name in names:
            raise UserError(f"task {spec.name}: runs programs that the model wrote; --run-code allows it (see docs/evaluation.md)")
        if runs and not run_code:
            note(f"({spec.name} is left out: it runs programs that the model wrote, and only with --run-code)")
        else:
            found.append(spec)
    _tell_unguarded(found)
    return found


def _tell_unguarded(specs: "Sequence[TaskSpec]") -> None:
    """Say what this system does not keep programs from, where some are run."""
    if not any(spec.generation is not None and spec.generation.code for spec in specs):
        return
    from keural.evaluate.generated.code import has_landlock, has_namespaces

    if not has_namespaces():
        note("(this system allows no new namespaces: programs run with limits, but with a network)")
    if not has_landlock():
        note("(this system has no Landlock: programs run with limits, but can read and write what you can)")
