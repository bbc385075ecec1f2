"""What a stage says while it runs: `metrics.jsonl`, a progress bar or plain lines, and boards (`boards.py`) when asked for.

In: one `StepReport` per optimizer step, and evaluations. Out: a file with each step exactly once, also after any number of
restarts; every line states a checksum of itself. A step's number is the one that `keural data show --step` takes; an evaluation has
the number of the last step before it.
"""

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keural.errors import UserError, why_unwritten
from keural.files import CHECKSUM, fingerprint, write_atomic
from keural.parsing import Malformed, parse_json
from keural.terminal import is_terminal, note, note_above, progress, say
from keural.train.loop import ASKED, StepReport
from keural.train.stage.alarms import Alarms
from keural.train.stage.boards import Board, figures_of, open_boards

SECONDS_BETWEEN_LINES = 5.0
SHOWN = ("loss", "bits_per_byte", "reward_margin", "reward_accuracy")
"""What a line about held-out data says."""


Line = dict[str, Any]


def read_metrics(path: Path) -> tuple[list[Line], int]:
    """The lines of a metrics file that are what was written, in order, and how many are not; none where there is no file.

    A last line that has no end is one that a killed process left, and no damage.
    """
    if not path.is_file():
        return [], 0
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for text in whole if (line := _parsed(text)) is not None]
    return lines, len(whole) - len(lines)


def _parsed(text: str) -> Line | None:
    """A line's values; None when its checksum is not theirs."""
    try:
        line = parse_json(text)
        return line if line.pop(CHECKSUM) == _checksum(line) and isinstance(line["step"], int) else None
    except (Malformed, KeyError, TypeError, AttributeError):
        return None


def line_text(line: Line) -> str:
    """A line as it is written, with its checksum."""
    return json.dumps(line | {CHECKSUM: _checksum(line)}) + "\n"


def _checksum(line: Line) -> str:
    return fingerprint(line)[:16]


def keep_until(path: Path, step: int) -> None:
    """Cut a metrics file back to the steps before `step`; damaged lines go too, and that is said."""
    if not path.exists():
        return
    lines, damaged = read_metrics(path)
    if damaged:
        say(f"{path}: {damaged} lines are damaged, and left out")
    write_atomic(path, "".join(line_text(line) for line in lines if line["step"] < step))


class Metrics:
    """Writer of a stage's metrics on rank 0, silent on the others; a context manager.

    Args:
        directory: the stage's run directory.
        name: the stage's name, shown before the figures.
        first_step: steps done already; later lines of an earlier process are removed.
        steps: steps of the whole stage.
        active: whether this rank writes.
        boards: names of `BOARDS` that are shown the figures, too. Raises `UserError` when one is not installed.
        alarms: told of every step; what they say is shown, and kept.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        first_step: int,
        steps: int,
        *,
        active: bool,
        boards: tuple[str, ...],
        alarms: Alarms | None = None,
    ) -> None:
        self.path, self.name, self.first_step, self.steps, self.active = (
            directory / "metrics.jsonl",
            name,
            first_step,
            steps,
            active,
        )
        self._alarms = alarms
        self._boards: list[Board] = open_boards(boards, directory, name, first_step) if active else []
        self._display: _Bar | _Lines | None = None

    def __enter__(self) -> Self:
        if self.active:
            keep_until(self.path, self.first_step)
            if self._alarms is not None:
                for line in read_metrics(self.path)[0]:
                    self._alarms.look(line)
            self._file = self.path.open("a", encoding="utf-8")
            kind = _Bar if is_terminal("stderr") else _Lines
            self._display = kind(self.name, self.first_step, self.steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._display is not None:
            self._display.close()
            with contextlib.suppress(OSError):  # a full disk has been reported, and would be again
                self._file.close()
        for board in self._boards:
            board.close()

    def step(self, report: StepReport, tokens: int, seconds: float) -> None:
        """Record a step; `tokens` and `seconds` are the stage's sums so far, restarts included."""
        if report.skipped == ASKED:
            figures = {"learning_rate": report.learning_rate, "tokens": tokens, "seconds": round(seconds, 3)}
            self._write({"step": report.step, "skipped": ASKED, **figures})
            return
        speed = report.tokens / report.seconds
        line = {
            "step": report.step,
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "tokens": tokens,
            "tokens_per_second": round(speed, 1),
            "seconds": round(seconds, 3),
            "balance_loss": report.balance_loss,
            "z_loss": report.z_loss,
            "routing_entropy": round(report.routing_entropy, 5),
            "routing_margin": round(report.routing_margin, 5),
            "dead_experts": report.dead_experts,
            "real_share": round(report.real_share, 5),
            "expert_load": report.expert_load,
            **report.metrics,
        }
        self._write(line | ({"skipped": report.skipped} if report.skipped else {}))
        for alarm in self._alarms.look(line) if self._alarms and self.active else ():
            self._write({"step": report.step, "alarm": alarm.name, "message": alarm.message})
            if self._display is not None:
                self._display.log(f"{self.name}: step {report.step + 1}: {alarm.message}")
        if self._display is not None:
            extra = f" margin {report.metrics['reward_margin']:.3f}" if "reward_margin" in report.metrics else ""
            self._display.show(report.step + 1, f"loss {report.loss:.4f}{extra} lr {report.learning_rate:.2e} {speed:,.0f} tok/s")

    def say(self, text: str) -> None:
        """Show a line beside the figures."""
        if self._display is not None:
            self._display.log(f"{self.name}: {text}")

    def evaluation(self, step: int, heldout: dict[str, float]) -> None:
        """Record held-out figures measured after step `step`."""
        self._write({"step": step, "heldout": heldout})
        if self._display is not None:
            figures = " ".join(f"{name} {value:.4f}" for name, value in heldout.items() if name in SHOWN)
            self._display.log(f"{self.name}: held-out {figures}")

    def _write(self, line: dict[str, Any]) -> None:
        if not self.active:
            return
        try:
            self._file.write(line_text(line))
            self._file.flush()
        except OSError as error:
            reason, advice = why_unwritten(error)
            raise UserError(f"{self.path}: cannot be written ({reason}); {advice} and run the same command again") from error
        for board in self._boards:
            board.add(line["step"], figures_of(line))


class _Bar:
    """A progress bar with the time left, for a terminal."""

    def __init__(self, name: str, first_step: int, steps: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = progress(*columns, TextColumn("{task.fields[figures]}", markup=False))
        self._task = self._progress.add_task(name, total=steps, completed=first_step, figures="")
        self._progress.start()

    def show(self, done: int, figures: str) -> None:
        self._progress.update(self._task, completed=done, figures=figures)

    def log(self, text: str) -> None:
        note_above(self._progress, text)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """A plain line every few seconds, for a log file."""

    def __init__(self, name: str, first_step: int, steps: int) -> None:
        self._name, self._first, self._steps = name, first_step, steps
        self._started = self._shown = time.monotonic()

    def show(self, done: int, figures: str) -> None:
        now = time.monotonic()
        if done not in (self._first + 1, self._steps) and now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        left = (now - self._started) / (done - self._first) * (self._steps - done)
        self.log(f"{self._name}: step {done}/{self._steps} {figures} {_clock(left)} left")

    def log(self, text: str) -> None:
        note(text)

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
