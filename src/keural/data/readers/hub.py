"""Rows of a data set through the `datasets` library: from a hub at a fixed commit, from the local cache of it, or from a directory.

In: a source with `hub` (and `revision`, `config`, `split`) and without `path`. Out: its rows, streamed. A directory below the data
directory that is called as `hub` says is read in its place; it has the same layout (Parquet, JSON lines or text, perhaps a
README.md with configurations).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keural.data.readers.formats import Row
from keural.errors import UserError
from keural.recipe import SourceSpec

COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub(source: SourceSpec) -> bool:
    """Whether a source is read through `datasets`."""
    return bool(source.hub) and not source.path


def check_hub(source: SourceSpec, data_dir: Path | None) -> None:
    """Refuse what cannot be read again as it is now: a revision that can move; and files whose download has not ended.

    Raises `UserError`.
    """
    directory = directory_of(source, data_dir)
    if directory is not None:
        _check_whole(source, directory, data_dir)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source.hub)):
        raise UserError(f"source {source.name!r}: hub {source.hub!r} is neither owner/name nor a directory; check data=DIR")
    elif source.revision is None or not COMMIT.fullmatch(source.revision):
        given = f"revision {source.revision!r} can move" if source.revision else "no revision is given"
        raise UserError(f"source {source.name!r}: {given}; give revision: the 40 digits of a commit of {source.hub}")


def directory_of(source: SourceSpec, data_dir: Path | None) -> Path | None:
    """Where the files lie on this machine: below the data directory, or in the hub's cache; None where they do not."""
    directory = (data_dir or Path()).absolute() / Path(str(source.hub)).expanduser()
    if directory.is_dir():
        return directory
    if source.revision is None or not COMMIT.fullmatch(source.revision):
        return None
    hub, _ = _libraries(source)
    try:
        return Path(hub.snapshot_download(source.hub, repo_type="dataset", revision=source.revision, local_files_only=True))
    except Exception:  # the cache has no whole copy
        return None


def hub_rows(source: SourceSpec, data_dir: Path | None) -> Iterator[Row]:
    """The rows in order, named `hub#number`. Raises `UserError` when the set, the configuration or the split is not there."""
    _, datasets = _libraries(source)
    directory = directory_of(source, data_dir)
    place = {"path": str(directory)} if directory else {"path": source.hub, "revision": source.revision}
    try:
        table = datasets.load_dataset(**place, name=source.config, split=source.split or "train", streaming=True)
        for number, value in enumerate(table, start=1):
            yield Row(f"{source.hub}#{number}", value)
    except Exception as error:  # of many libraries: pyarrow, fsspec, aiohttp, zstandard, datasets
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"source {source.name!r}: {directory or source.hub} cannot be read ({what}); {_advice(source, data_dir)}"
        ) from error


def hub_content(source: SourceSpec, data_dir: Path | None) -> tuple[list[list[Any]], list[tuple[str, Path]]]:
    """What determines the rows beside the settings: the commit, or the files of a directory that is read in its place."""
    directory = directory_of(source, data_dir)
    if directory is None or (source.revision and directory.name == source.revision):
        return [[source.hub, source.revision]], []
    named = sorted((path.relative_to(directory).as_posix(), path) for path in directory.rglob("*") if path.is_file())
    return [], [(name, path) for name, path in named if not name.startswith(".cache/")]


def _check_whole(source: SourceSpec, directory: Path, data_dir: Path | None) -> None:
    for path in sorted(directory.rglob("*.incomplete")):
        raise UserError(f"source {source.name!r}: {path}: its download has not ended; {_advice(source, data_dir)}")


def _advice(source: SourceSpec, data_dir: Path | None) -> str:
    revision = f" --revision {source.revision}" if source.revision else ""
    target = (data_dir or Path("DIR")) / str(source.hub)
    return f"fetch it with: hf download --repo-type dataset {source.hub}{revision} --local-dir {target}"


def _libraries(source: SourceSpec) -> tuple[Any, Any]:
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"source {source.name!r}: reading from a hub needs datasets; pip install 'keural[data]'") from error
    return huggingface_hub, datasets
