"""Where a task's set lies, and what brings it when it is not there.

In: the places that a task names, and the data directory. Out: a source that can be opened; or the command that fetches the set.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from keural.errors import UserError
from keural.evaluate.tasks.spec import PlaceSpec
from keural.files import read_yaml
from keural.recipe import SourceSpec
from keural.recipe.shipped import SETS_FILE

SHIPPED = Path(__file__).parent / "shipped"
FETCHED = SHIPPED / "sets"
"""Where it is written from where the public sets come."""
SETS = "evaluation"
"""What `keural data fetch` calls the sets of the tasks."""


def find(task: str, places: Sequence[PlaceSpec], data: Path | None) -> SourceSpec | None:
    """The first of the places that is there, as a source; None where none is. Raises `UserError` unless `data` is a directory."""
    if data is None:
        return None
    if data.exists() and not data.is_dir():
        raise UserError(f"--data {data}: is no directory; give the one in which the sets of tasks lie")
    if not data.exists():
        raise UserError(f"{data}: no such directory; `keural data fetch {SETS} {data}` makes it and brings the sets of tasks")
    for place in places:
        for path in _candidates(place, data):
            if _exists(data, path):
                return _source(task, place, path)
        if place.hub and (data / place.hub).is_dir():
            return _source(task, place, "")
    return None


def is_there(places: Sequence[PlaceSpec], data: Path) -> bool:
    """Whether one of the places is there."""
    return find("", places, data) is not None


def refuse_missing(task: str, places: Sequence[PlaceSpec], data: Path | None, what: str = "set") -> UserError:
    """What to say of a set that is not there: the commands that bring it."""
    directory = data or Path("DIR")
    ways = list(dict.fromkeys(way for place in places if (way := _way(place, directory))))
    advice = f"bring it with {' or '.join(ways)}" if ways else f"put {places[0].path} there"
    if data is None:
        return UserError(f"task {task}: --data DIR says where its {what} lies; {advice}")
    return UserError(f"task {task}: its {what} is not in {data}; {advice}")


def _way(place: PlaceSpec, directory: Path) -> str:
    """The command that brings what a place needs; none where there is none."""
    if place.hub:
        return f"`hf download --repo-type dataset {place.hub} --local-dir {directory / place.hub}`"
    name = PurePosixPath(place.path).parts[0]
    return f"`keural data fetch {SETS} {directory} --only {name}`" if name in read_yaml(FETCHED / SETS_FILE) else ""


def _candidates(place: PlaceSpec, data: Path) -> list[str]:
    """The paths that a place may have below the data directory: with the set's folder, or where that is the directory itself."""
    if not place.path:
        return []
    folder, *rest = PurePosixPath(place.path).parts
    return [place.path, *(["/".join(rest)] if rest and data.absolute().name == folder else [])]


def _exists(data: Path, path: str) -> bool:
    return (data / path).exists() or any(True for _ in data.glob(path))


def _source(task: str, place: PlaceSpec, path: str) -> SourceSpec:
    return SourceSpec(
        name=task or place.adapter,
        adapter=place.adapter,
        path=path,
        hub=place.hub,
        config=place.config,
        split=place.split,
        options=place.options,
        license=place.license,
    )
