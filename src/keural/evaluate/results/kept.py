"""A task's results as a file: a header, then an item a line.

In: who was asked, and `TaskResults`. Out: `DIR/<model>/<task>-<digest>.jsonl`, written whole, and back: every line states a
checksum of itself, so that what is read is what was measured.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from keural.errors import UserError
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.files import CHECKSUM, fingerprint, read_text, write_atomic
from keural.parsing import Malformed, parse_json
from keural.pretrained.lineage import file_name


@dataclass(frozen=True)
class Asked:
    """Who answers: the name of a model, and everything besides a task that determines what it answers (weights, tokenizer, dtype,
    engine).
    """

    name: str
    of: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The name of the directory with its results."""
        return f"{file_name(self.name)}-{fingerprint(self.of)[:12]}"


def results_file(directory: Path, asked: Asked, task: TaskResults) -> Path:
    """Where the results of a task are kept."""
    return directory / asked.key / f"{file_name(task.task)}-{task.digest[:12]}.jsonl"


def kept_results(directory: Path, asked: Asked, task: TaskResults, measure: Callable[[], Sequence[ItemResult]]) -> TaskResults:
    """The results of `task`, which has no items yet: as they are kept, or measured now and kept.

    Raises `UserError` when the file is damaged or of something else.
    """
    path = results_file(directory, asked, task)
    header = {"of": dict(asked.of), "task": task.task, "language": task.language, "kind": task.kind, "digest": task.digest}
    if path.is_file():
        return replace(task, items=_read(path, header))
    items = tuple(measure())
    write_atomic(path, "".join(_line(value) for value in (header | {"items": len(items)}, *(item.to_json() for item in items))))
    return replace(task, items=items)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps({**value, CHECKSUM: fingerprint(value)[:16]}, ensure_ascii=False) + "\n"


def _read(path: Path, header: Mapping[str, Any]) -> tuple[ItemResult, ...]:
    lines = [_checked(path, number, text) for number, text in enumerate(read_text(path).splitlines(), start=1)]
    if not lines or lines[0] != {**header, "items": len(lines) - 1}:
        raise UserError(f"{path}: is of another model or task, or lines are missing; delete it to measure again")
    try:
        return tuple(ItemResult.from_json(line) for line in lines[1:])
    except ValidationError as error:
        raise UserError(f"{path}: holds what is no result of an item; delete it to measure again") from error


def _checked(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line: dict[str, Any] = parse_json(text)
        if line.pop(CHECKSUM) == fingerprint(line)[:16]:
            return line
    except (Malformed, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: line {number} is damaged (its checksum differs); delete the file to measure again")
