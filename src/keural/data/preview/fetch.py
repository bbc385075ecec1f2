"""Brings the sets of a recipe that are public: each from its repository, at a fixed commit, into a folder of its own.

In: a recipe's `sets.yaml`. Out: folders for `data=DIR`. Git is what fetches: a commit's name is the checksum of all its files, and
only the files that are wanted come over the network. Nothing that was fetched is run.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from keural.errors import UserError, for_all, nearest
from keural.files import atomic_directory, read_json, read_yaml, write_json
from keural.recipe.extends import sets_file
from keural.recipe.shipped import SETS_FILE
from keural.terminal import show

ORIGIN = ".origin.json"
"""In a set's folder: what it was fetched from. Readers pass over hidden files."""


class FetchedSet(BaseModel):
    """Where a set comes from."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    repository: Annotated[str, Field(pattern=r"^(https|file)://[^\s]+$")]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    license: str
    files: dict[str, str]
    """Files and folders of the repository, and what they are called in the set."""
    suffix: str = ""
    """Of folders, how the names end of the files that are taken."""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in (*files, *files.values()):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or ".git" in path.parts or name.startswith("-"):
                raise ValueError(f"{name!r} leads out of the set")
        return files


def sets_of(recipe: Path) -> dict[str, FetchedSet]:
    """The sets of a recipe's directory by name. Raises `UserError` when the recipe says of none where it comes from."""
    file = sets_file(recipe)
    if not file.is_file():
        raise UserError(f"{recipe}: has no {SETS_FILE}, which would say where its data comes from; bring the data yourself")
    listed, found = read_yaml(file), {}
    if not isinstance(listed, dict):
        raise UserError(f"{file}: must be a map of sets by name")
    for name, value in listed.items():
        try:
            found[name] = FetchedSet.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{file}: {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return found


def fetch(recipe: Path, out: Path, only: Sequence[str] = (), tell: Callable[[str], None] = show) -> None:
    """Bring the sets into folders of `out`; those that are there already stay. `tell` is told of each.

    Raises:
        UserError: for a name that is no set, without git, and at the end for all sets that could not be brought, a line each.
    """
    sets = sets_of(recipe)
    for name in only:
        if name not in sets:
            raise UserError(f"{name}: is no set of this recipe{nearest(name, sets)}; there are {', '.join(sets)}")
    if shutil.which("git") is None:
        raise UserError("git is not installed, and fetches the sets; install it")
    wanted = {name: sets[name] for name in only or sets}
    for_all(wanted.items(), lambda item: _bring(item[0], item[1], out / item[0], tell))


def _bring(name: str, wanted: FetchedSet, target: Path, tell: Callable[[str], None]) -> None:
    origin = {"repository": wanted.repository, "commit": wanted.commit, "license": wanted.license}
    if os.path.lexists(target):
        if (target / ORIGIN).is_file() and read_json(target / ORIGIN) == origin:
            return tell(f"{name}: is there")
        raise UserError(f"{target}: is in the way, and was not fetched by this recipe; move it away, or use it as it is")
    tell(f"{name}: {wanted.repository} ({wanted.license})")
    with atomic_directory(target) as folder:
        copy = folder / ".copy"
        _git(target, "init", "--quiet", str(copy))
        _git(target, "-C", str(copy), "remote", "add", "origin", wanted.repository)
        paths = [f"/{path}" if path != "." else f"/**/*{wanted.suffix}" for path in wanted.files]
        _git(target, "-C", str(copy), "sparse-checkout", "set", "--no-cone", *paths)
        _git(target, "-C", str(copy), "fetch", "--quiet", "--depth", "1", "--filter", "blob:none", "origin", wanted.commit)
        _git(target, "-C", str(copy), "checkout", "--quiet", wanted.commit)
        for path, place in wanted.files.items():
            _take(copy / path, folder / place, wanted.suffix, f"{name}: {path}")
        shutil.rmtree(copy)
        write_json(folder / ORIGIN, origin)
    return None


def _git(target: Path, *arguments: str) -> None:
    """Run git without questions, and without what a repository could make it do. Raises `UserError` with git's last line."""
    settings = ("core.symlinks=false", "core.hooksPath=/dev/null", "core.autocrlf=false", "advice.detachedHead=false")
    command = ["git", *(part for setting in settings for part in ("-c", setting)), *arguments]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"git ended with {done.returncode}"]
        raise UserError(f"{target}: git could not bring it: {said[-1]}; try again, or bring the data yourself")


def _take(source: Path, target: Path, suffix: str, name: str) -> None:
    """Move a file, or the files of a folder whose names end in `suffix`, out of the copy."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob(f"*{suffix}") if path.is_file())
    files = [file for file in files if ".git" not in file.relative_to(source.parent).parts]
    if not files:
        raise UserError(f"{name}: is not in the repository at that commit; the recipe's {SETS_FILE} is wrong")
    for file in files:
        place = target if source.is_file() else target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
