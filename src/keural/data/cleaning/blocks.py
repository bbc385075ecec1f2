"""datatrove blocks around the filters: reading a recipe's sources, and keeping account of what was dropped.

Each task reads files (or sources that are not read from files) that follow each other, so that the order of tasks is that of the
recipe. Every drop, an adapter's or a filter's, is counted by source and reason, with a few shortened
examples per reason.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

from keural.data.adapters.base import WRONG_SCHEMA
from keural.data.cleaning.measures import normalize
from keural.data.cleaning.summary import TaskDrop, TaskDrops
from keural.data.records import Document as Text
from keural.data.records import Drop
from keural.data.sources import Source, SourceFile, schema_error

EXAMPLE_LENGTH = 200


class SourcePart(NamedTuple):
    """What a task reads at least: a file of a source, or a source that is read whole; `place` is the source's in the recipe, `kind`
    that of its text.
    """

    source: Source
    place: int
    kind: str
    file: SourceFile | None


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
            drops = [
                TaskDrop(place=place, reason=reason, count=count, first=self._first[place, reason])
                for (place, reason), count in sorted(self._drops.items())
            ]
            TaskDrops(drops=drops, examples=dict(self._shown)).write(self._directory / f"{self._step}-{self._rank:05d}.json")


class SourceReader(PipelineStep):
    """Reads this task's parts through the recipe's adapters; texts are normalised, drops of adapters counted."""

    type = "READER"
    name = "sources"

    def __init__(self, parts: Sequence[SourcePart], seed: int, account: Account) -> None:
        super().__init__()
        self._parts, self._seed, self._account = parts, seed, account

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See `PipelineStep.run`."""
        with self._account as account:
            first, stop = (place * len(self._parts) // world_size for place in (rank, rank + 1))
            for part in self._parts[first:stop]:
                begun = False
                for record in part.source.read(self._seed, part.file):
                    if isinstance(record, Drop):
                        if record.reason == WRONG_SCHEMA and not begun:
                            raise schema_error(part.source.spec, record)
                        account.add(part.place, record.reason, record.where, "", rank)
                    else:
                        assert isinstance(record, Text)
                        begun = True
                        yield self._document(record, part)

    @staticmethod
    def _document(record: Text, part: SourcePart) -> Document:
        metadata = {"place": part.place, "kind": part.kind, "where": record.where, "language": record.language}
        return Document(text=normalize(record.text), id=record.where, metadata=metadata)


class _ReadBack(JsonlReader):
    """datatrove's reader, which takes it for an error when there is nothing: here every document may have been dropped."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See `PipelineStep.run`."""
        if self.data_folder.list_files(glob_pattern=self.glob_pattern):
            yield from super().run(data, rank, world_size)


def read_back(folder: Path) -> JsonlReader:
    """Reads what an earlier step wrote into a folder, each task the same files in every step."""
    return _ReadBack(str(folder), glob_pattern="*.jsonl.zst", add_file_path=False)
