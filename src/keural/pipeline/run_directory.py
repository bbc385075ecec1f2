"""The files of a run directory: their names, their types, and who may write them."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from keural.errors import UserError
from keural.files import read_object, write_atomic, write_json
from keural.recipe import StageSpec


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Refuse a second run in the same directory: the two would delete each other's files. The lock goes with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("wb")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another run directory") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another run is at work there; wait for it, or give another --out") from error
        except OSError:  # a file system without locks
            pass
        yield


def set_aside(directory: Path) -> None:
    """Keep an outdated directory under another name instead of overwriting it."""
    if directory.exists():
        number = next(n for n in range(1, 10_000) if not directory.with_name(f"{directory.name}.old-{n}").exists())
        directory.rename(directory.with_name(f"{directory.name}.old-{number}"))


def is_done(directory: Path, wanted: str) -> bool:
    """Whether a stage directory holds the finished result of exactly these settings."""
    marker = directory / "done.json"
    return marker.is_file() and fingerprint_in(marker) == wanted


def fingerprint_in(marker: Path) -> str:
    """The fingerprint that a marker states. Raises `UserError` where it has none."""
    found = read_object(marker).get("fingerprint")
    if not isinstance(found, str):
        raise UserError(f"{marker}: damaged (it has no fingerprint); delete it and run the same command again")
    return found


def open_stage_directory(directory: Path, stage: StageSpec, wanted: str) -> None:
    """Make a stage's directory, or take up the one of exactly these settings; another one is set aside."""
    marker = directory / "stage.json"
    if directory.exists() and not (marker.is_file() and fingerprint_in(marker) == wanted):
        set_aside(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "stage.yaml", yaml.safe_dump(stage.model_dump(), allow_unicode=True, sort_keys=False))
    write_json(marker, {"fingerprint": wanted})


def link_final(out: Path, stage_name: str) -> None:
    """Let `final` point to a stage's model."""
    link = out / "final"
    temporary = out / ".final.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path(stage_name) / "model", target_is_directory=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    temporary.replace(link)
