"""Results on disk: a file for each model and task, to which finished items are appended.

In: records of items. Out: the same records, checked. A file is JSON lines: first a header that says what was measured with what,
then a line for each item (or for one that could not be asked, with the reason), each with a checksum of itself. Lines are appended
a batch at a time and flushed to the disk, so that a process that is killed loses the batch that it was at. What a kill left
half-written, a last line without its end, is cut off, and said; anything else that is not as it was written refuses the file.

    DIR/<model>-<key>/<task>-<digest>.jsonl
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keural.errors import UserError
from keural.evaluate.results.records import ItemResult, Kind, TaskResults
from keural.files import CHECKSUM, FileHashes, cannot_write, fingerprint, lock, open_file
from keural.parsing import Malformed, parse_json
from keural.pretrained.lineage import file_name
from keural.terminal import say

FORMAT = 1
_SUM = 16
"""Digits of a line's checksum."""
_REMEDY = "restore it, or delete the file and evaluate again"


@dataclass(frozen=True)
class ModelIdentity:
    """Everything of a model, and of how it is asked, that determines its results."""

    name: str
    """For people; no part of the key."""
    weights: str
    """Checksum of the files that decide what it computes."""
    tokenizer: str
    """SHA-256 of its tokenizer."""
    prompting: str
    """How it is asked: bos, text or chat."""
    template: str
    """Of chats, what is rendered beside the question."""
    dtype: str
    engine: str

    @property
    def key(self) -> str:
        """Of its results, whatever it is called."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != "name"})[:12]


@dataclass(frozen=True)
class Header:
    """The first line of a file: what was measured, with what."""

    model: ModelIdentity
    task: str
    language: str
    kind: Kind
    chance: float | None
    digest: str
    size: int
    """Items of the task."""
    shots: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the set that gave no item."""
    format: int = FORMAT


@dataclass(frozen=True)
class LeftOut:
    """An item that this model was not asked."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Kept:
    """What a file holds: by the item's id its place in the set and its result, or why there is none."""

    header: Header
    items: Mapping[str, tuple[int, ItemResult | LeftOut]]
    baselines: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Scores of who does not read, by the number of the set's first items that they are of."""

    def results(self, first: int | None = None) -> TaskResults:
        """As results of the task, of the first so many items of the set alone where that is given, in the order of the set."""
        number = self.header.size if first is None else min(first, self.header.size)
        chosen = [pair for pair in self.items.values() if first is None or pair[0] < first]
        ordered = [entry for _, entry in sorted(chosen, key=lambda pair: pair[0])]
        left_out = dict(self.header.left_out)
        for entry in ordered:
            if isinstance(entry, LeftOut):
                left_out[entry.reason] = left_out.get(entry.reason, 0) + 1
        return TaskResults(
            task=self.header.task,
            language=self.header.language,
            kind=self.header.kind,
            chance=self.header.chance,
            digest=self.header.digest,
            items=[entry for entry in ordered if isinstance(entry, ItemResult)],
            left_out=left_out,
            baselines=self.baselines.get(number, {}),
        )


def results_file(directory: Path, header: Header) -> Path:
    """Where results belong: in the directory of the model's key, whatever name it began with."""
    name = f"{header.task}-{header.digest[:12]}.jsonl"
    known = sorted(directory.glob(f"*-{header.model.key}")) if directory.is_dir() else []
    return (known[0] if known else directory / f"{file_name(header.model.name)}-{header.model.key}") / name


def read_results(path: Path) -> Kept:
    """What a file of results holds; a half-written last line is passed over. Raises `UserError` naming the line that is damaged."""
    kept, _ = _read(path)
    if kept is None:
        raise UserError(f"{path}: holds no results yet: the process that began it was stopped; evaluate again")
    return kept


def check_results(path: Path) -> None:
    """Raise `UserError` naming the line of a file of results that is damaged; a half-written last line is none."""
    _read(path)


def finished_results(path: Path, header: Header) -> Kept | None:
    """What the file holds to which results of `header` would be appended; None where that is nothing, or not whole.

    Raises `UserError` for a damaged file and one of something else.
    """
    if not path.is_file():
        return None
    kept, end = _read(path)
    if kept is None or path.stat().st_size > end:
        return None
    _check_same(path, kept.header, header)
    return kept


HASHES = "checksums.json"
"""In a directory of results: checksums of the models' files, which are read again only when they have changed."""


@contextmanager
def remembered_hashes(directory: Path) -> Iterator[FileHashes]:
    """Checksums of files as a directory of results remembers them, which it does from then on; only where it is there already.

    Where it cannot be written to, nothing is remembered: whatever comes to be kept there says so.
    """
    hashes = FileHashes(directory / HASHES)
    yield hashes
    if directory.is_dir():
        with suppress(UserError):
            hashes.save()


def find_results(directory: Path) -> list[Path]:
    """The files of results below a directory, in order of their names. Raises `UserError` when there is no such directory."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; `keural evaluate` writes one with results")
    return sorted(directory.glob("*/*.jsonl"))


class ResultsWriter:
    """An open file of results: what it held, and a way to append."""

    def __init__(self, path: Path, file: Any, kept: Kept) -> None:
        self.path, self._file = path, file
        self.header = kept.header
        self.items = dict(kept.items)
        self.baselines = dict(kept.baselines)

    def append(self, entries: Iterable[tuple[int, ItemResult | LeftOut]]) -> None:
        """Write items with their places in the set, and wait until they are on the disk. Raises `UserError` on a full one."""
        new = list(entries)
        self._write(b"".join(_line({"number": number, **_as_json(entry)}) for number, entry in new))
        self.items |= {entry.id: (number, entry) for number, entry in new}

    def append_baselines(self, first: int, scores: Mapping[str, float]) -> None:
        """Write what who does not read scores on the first so many items of the set. Raises as `append` does."""
        self._write(_line({"first": first, "baselines": dict(scores)}))
        self.baselines[first] = scores

    def _write(self, lines: bytes) -> None:
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def kept(self) -> Kept:
        """All that it holds now."""
        return Kept(self.header, self.items, self.baselines)


@contextmanager
def open_results(path: Path, header: Header) -> Iterator[ResultsWriter]:
    """Open a file of results to append to, or begin one with `header`; what a kill left half-written is cut off, and said.

    Raises `UserError` for a damaged file, one of something else, and one that another process writes to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            open_file(path).close()  # a pipe is refused, not waited for
        file = path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        if not lock(file.fileno()):
            raise UserError(f"{path}: another process evaluates the same model on the same task; wait for it")
        kept, end = _read(path)
        if (size := path.stat().st_size) > end:
            say(f"{path}: its last line was half-written when a process was stopped; {size - end:,} bytes are cut off")
            file.truncate(end)
        if kept is None:
            kept = Kept(header, {})
            file.write(_line(asdict(header)))
            file.flush()
        _check_same(path, kept.header, header)
        yield ResultsWriter(path, file, kept)


def _check_same(path: Path, found: Header, wanted: Header) -> None:
    """A file may have been put in another's place."""
    if (found.model.key, found.digest) != (wanted.model.key, wanted.digest):
        raise UserError(
            f"{path}: holds results of another model or task ({found.model.name}, {found.task}); move it away and evaluate again"
        )


def _line(value: Mapping[str, Any]) -> bytes:
    whole = {**value, CHECKSUM: fingerprint(value)[:_SUM]}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def _as_json(entry: ItemResult | LeftOut) -> dict[str, Any]:
    if isinstance(entry, ItemResult):
        return entry.to_json()
    return {"id": entry.id, "left_out": entry.reason, "detail": entry.detail}


class _LeftOutLine(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    left_out: str
    detail: str


class _BaselinesLine(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    first: int = Field(ge=0)
    baselines: dict[str, float]


class _HeaderLine(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: dict[str, str]
    task: str
    language: str
    kind: Kind
    chance: float | None = Field(ge=0, le=1)
    digest: str
    size: int = Field(ge=0)
    shots: int = Field(ge=0)
    left_out: dict[str, int]
    format: int
    baselines: dict[str, float] = Field(default_factory=dict)
    """Of the whole set, where an earlier version began the file."""


def _read(path: Path) -> tuple[Kept | None, int]:
    """What a file holds, and where its last whole line ends; nothing where not even the header is whole."""
    try:
        with open_file(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    if not lines:
        return None, 0
    header, of_all = _header(path, lines[0])
    items: dict[str, tuple[int, ItemResult | LeftOut]] = {}
    baselines: dict[int, Mapping[str, float]] = {header.size: of_all} if of_all else {}
    for number, line in enumerate(lines[1:], start=2):
        place, entry = _entry(path, number, line, header)
        if isinstance(entry, ItemResult | LeftOut):
            if _is_final(items.get(entry.id)):
                raise UserError(f"{path}:{number}: has item {entry.id} a second time; {_REMEDY}")
            items[entry.id] = (place, entry)
        else:
            baselines[place] = entry
    return Kept(header, items, baselines), end


def _header(path: Path, line: bytes) -> tuple[Header, Mapping[str, float]]:
    """The header, and the baselines of the whole set that an earlier version wrote into it."""
    value = _checked(path, 1, line)
    if value.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: its results are of another version of keural; move the file away and evaluate again")
    try:
        content = _HeaderLine.model_validate(value).model_dump()
        of_all = content.pop("baselines")
        return Header(**content | {"model": ModelIdentity(**content["model"])}), of_all
    except (ValidationError, TypeError) as error:
        raise UserError(f"{path}:1: is no header of results; {_REMEDY}") from error


def _is_final(known: tuple[int, ItemResult | LeftOut] | None) -> bool:
    """Whether an item was asked as it is: one that was cut or left out may be asked again, in the other way."""
    return known is not None and isinstance(known[1], ItemResult) and not known[1].details.get("cut")


def _entry(path: Path, number: int, line: bytes, header: Header) -> tuple[int, ItemResult | LeftOut | Mapping[str, float]]:
    """A line's place in the set and its item; or how many of the set's first items its baselines are of, and these."""
    value = _checked(path, number, line)
    place = value.pop("number", None)
    try:
        if "baselines" in value:
            found = _BaselinesLine.model_validate(value)
            return found.first, found.baselines
        if type(place) is not int or not 0 <= place < header.size:
            raise TypeError("an item has a place in the set")
        if "left_out" in value:
            left_out = _LeftOutLine.model_validate(value)
            return place, LeftOut(left_out.id, left_out.left_out, left_out.detail)
        result = ItemResult.from_json(value)
        if header.kind != "rolling" and not 0 <= result.score <= 1:
            raise TypeError("a score is a share, but for bits")
        return place, result
    except (ValidationError, TypeError) as error:
        raise UserError(f"{path}:{number}: is no result of an item; {_REMEDY}") from error


def _checked(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except Malformed as error:
        raise UserError(f"{path}:{number}: damaged (not JSON); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: damaged (not an object); {_REMEDY}")
    stated = value.pop(CHECKSUM, None)
    if stated != fingerprint(value)[:_SUM]:
        raise UserError(f"{path}:{number}: damaged (its checksum differs); {_REMEDY}")
    return value
