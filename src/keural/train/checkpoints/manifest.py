"""What a checkpoint says of itself: its manifest, read with checks.

In: a checkpoint's directory. Out: progress and checksums as they were written, or one line that says what is damaged.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from keural.errors import UserError
from keural.files import fingerprint as fingerprint_of
from keural.files import read_object

MANIFEST = "manifest.json"
FORMAT = 2
"""2: tensors in safetensors. 1: in pickles, metadata included."""
DIRECTORY = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a stage is: optimizer steps done, non-padding tokens seen, wall-clock seconds spent, task losses of its first and
    latest steps, and the latest held-out figures.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """The step plan of the stage, which a resumed run must share."""
    tokens_per_expert: list[list[float]] = field(default_factory=list)
    """Assignments per layer and expert of the latest step, by which the next one balances with `router.load: lagged`."""
    taken: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the latest steps, by which `train.skip_spikes` judges the next."""
    spikes: int = 0
    """Steps of the stage that were not taken for being spikes .."""
    spikes_in_a_row: int = 0
    """.. and the latest of them, since one was."""


class Manifest(BaseModel):
    """What `manifest.json` holds beside its own checksum."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    fingerprint: str
    progress: Progress
    world: int
    stage: dict[str, Any]
    files: dict[str, str]
    """SHA-256 of every other file in the directory."""
    frozen: str = ""
    """Digest of the weights that are not trained, and so not in here; empty where all are."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint by what its manifest says; its tensors were not looked at."""

    path: Path
    fingerprint: str
    progress: Progress


def newest_progress(directory: Path) -> Stored | None:
    """What the newest checkpoint in `directory` says of itself; None where there is none. Raises `UserError` when it is damaged."""
    found = [path for path in directory.iterdir() if DIRECTORY.fullmatch(path.name)] if directory.is_dir() else []
    if not found:
        return None
    newest = max(found, key=step_of)
    manifest = read_manifest(newest)
    return Stored(newest, manifest.fingerprint, manifest.progress)


REMEDY = "delete this directory to resume from the checkpoint before it, or from the start where there is none"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, as it was written. Raises `UserError`."""
    try:
        values = read_object(path / MANIFEST)
    except UserError as error:
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST} is missing or unreadable; {REMEDY}") from error
    checksum = values.pop("checksum", None)
    if checksum != fingerprint_of(values):
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST} was changed; {REMEDY}")
    if values.get("format") == 1:
        raise UserError(
            f"{path}: a checkpoint of an earlier version of keural, whose metadata could run code when it is read, so it is not; "
            f"finish the stage with the version that began it, or delete {path.parent} to start it again"
        )
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: a checkpoint of another version of keural; resume with that version, or {REMEDY}")
    try:
        return Manifest.model_validate_json(json.dumps(values))  # of JSON, a strict model still takes an object for a dataclass
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: damaged checkpoint: {MANIFEST}: {where}: {error.errors()[0]['msg']}; {REMEDY}") from error


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    match = DIRECTORY.fullmatch(path.name)
    assert match is not None
    return int(match[1])
