"""datatrove blocks around the filters: reading a recipe's sources, and keeping account of what was dropped.

A unit is one file of one source (or a source that makes its own rows); each task reads units that follow each other, so that the
order of tasks is that of the recipe. Every drop, an adapter's or a filter's, is counted by source and reason, with a few shortened
examples per reason.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

from keural.data.adapters.base import WRONG_SCHEMA
from keural.data.cleaning.measures import normalise
from keural.data.records import Document as Text
from keural.data.records import Drop
from keural.data.sources import Part, read_source, schema_error
from keural.recipe import SourceSpec

EXAMPLE_LENGTH = 200


class Unit(NamedTuple):
    """What a task reads: a part of a source, the source's place in the recipe, and the kind of its text."""

    source: SourceSpec
    place: int
    kind: str
    part: Part


class Account:
    """Counts drops by source and reason, and keeps the first few as examples; a context that writes its file when it ends.

    Filters take it for a writer of what they exclude. The file is the same whenever a task is run again.
    """

    def __init__(self, directory: Path, step: str, examples: int, reason: str = "") -> None:
        self._directory, self._step, self._examples, self._reason = directory, step, examples, reason
        self._clear()

    def _clear(self) -> None:
        self._drops: Counter[tuple[int, str]] = Counter()
        self._first: dict[tuple[int, str], str] = {}
        self._shown: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._rank = 0

    def __enter__(self) -> Self:
        self._clear()
        return self

    def write(self, document: Document, rank: int) -> None:
        """Count a document that a filter drops."""
        reason = document.metadata.get("filter_reason", self._reason)
        self.add(document.metadata["place"], reason, document.metadata["where"], document.text, rank)

    def add(self, place: int, reason: str, where: str, text: str, rank: int) -> None:
        """Count a drop."""
        self._rank = rank
        self._drops[place, reason] += 1
        self._first.setdefault((place, reason), where)
        if text and len(self._shown[reason]) < self._examples:
            self._shown[reason].append({"source": place, "where": where, "text": text[:EXAMPLE_LENGTH]})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._drops:
            rows = [[place, reason, count, self._first[place, reason]] for (place, reason), count in sorted(self._drops.items())]
            path = self._directory / f"{self._step}-{self._rank:05d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"drops": rows, "examples": self._shown}, ensure_ascii=False), encoding="utf-8")


class SourceReader(PipelineStep):
    """Reads this task's units through the recipe's adapters; texts are normalised, drops of adapters counted."""

    type = "READER"
    name = "sources"

    def __init__(self, units: Sequence[Unit], data_dir: Path | None, seed: int, account: Account) -> None:
        super().__init__()
        self._units, self._data_dir, self._seed, self._account = units, data_dir, seed, account

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See `PipelineStep.run`."""
        with self._account as account:
            first, stop = (place * len(self._units) // world_size for place in (rank, rank + 1))
            for unit in self._units[first:stop]:
                begun = False
                for record in read_source(unit.source, self._data_dir, self._seed, unit.part):
                    if isinstance(record, Drop):
                        if record.reason == WRONG_SCHEMA and not begun:
                            raise schema_error(unit.source, record)
                        account.add(unit.place, record.reason, record.where, "", rank)
                    else:
                        assert isinstance(record, Text)
                        begun = True
                        yield self._document(record, unit)

    @staticmethod
    def _document(record: Text, unit: Unit) -> Document:
        metadata = {"place": unit.place, "kind": unit.kind, "where": record.where, "language": record.language}
        return Document(text=normalise(record.text), id=record.where, metadata=metadata)


class _ReadBack(JsonlReader):
    """datatrove's reader, which takes it for an error when there is nothing: here every document may have been dropped."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See `PipelineStep.run`."""
        if self.data_folder.list_files(glob_pattern=self.glob_pattern):
            yield from super().run(data, rank, world_size)


def read_back(folder: Path) -> JsonlReader:
    """Reads what an earlier step wrote into a folder, each task the same files in every step."""
    return _ReadBack(str(folder), glob_pattern="*.jsonl.zst", add_file_path=False)
