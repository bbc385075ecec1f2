"""Where a stage's figures are shown while it runs, beside `metrics.jsonl`: TensorBoard and Weights & Biases, when asked for.

In: names of boards. Out: writers that take each line's figures. Both are extras, and nothing is read from them: a stage that is
resumed goes by its checkpoints and its own file.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from keural.errors import UserError

STEP = "step"
"""What Weights & Biases draws the others over: its own counter would ignore steps that are done again after a restart."""


class Board(Protocol):
    """Takes the figures of steps."""

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of a step, or of an evaluation after it."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    """TensorBoard events in `tensorboard` of the stage's directory."""

    def __init__(self, directory: Path, name: str, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard was asked for and is not installed; install keural[tensorboard]") from error
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases by the name of the stage, in the group of the run directory; a resumed stage goes on in its run.

    Where it is sent, and whether at all, is decided by the variables that its users know: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY.
    """

    def __init__(self, directory: Path, name: str, first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("Weights & Biases was asked for and is not installed; install keural[wandb]") from error
        run = directory.absolute().parent
        identity = hashlib.blake2b(str(directory.absolute()).encode(), digest_size=8).hexdigest()
        try:
            self._run = wandb.init(
                name=f"{run.name}/{name}", group=run.name, id=identity, resume="allow", dir=str(directory), config={"stage": name}
            )
        except Exception as error:  # of its own kinds: no key, no network, a directory that it may not write
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"Weights & Biases cannot be reached ({reason}); log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, STEP: step})

    def close(self) -> None:
        self._run.finish()


BOARDS: dict[str, Callable[[Path, str, int], Board]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
"""Makes a board of a stage's directory, its name and the first step that is going to be written."""


def open_boards(names: tuple[str, ...], directory: Path, stage: str, first_step: int) -> list[Board]:
    """The boards of a stage. Raises `UserError` when one is not installed, or cannot be opened."""
    return [BOARDS[name](directory, stage, first_step) for name in names]


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl` by name, those of an evaluation under `heldout/`."""
    prefix = "heldout/" if "heldout" in line else ""
    values = {**line, **line.get("heldout", {})}
    return {
        f"{prefix}{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
