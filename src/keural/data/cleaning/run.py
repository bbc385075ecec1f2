"""Cleaning of a stage's documents: the order of the steps, the directories, the account at the end.

In: sources, the data directory, a `CleaningSpec`. Out: `Cleaned`: `out_root/cleaned-<fingerprint>/` with the documents of each
source (`documents/000/00000.jsonl.zst`, in datatrove's form) and `cleaning.json`, written last. The order is FineWeb-2's: language,
then near-duplicates across all sources, then quality, so that what is boilerplate everywhere is seen while it is still there.

    read ──► language ──► signatures ──► buckets ──► clusters ──► one of each ──► quality ──► formatters ──► documents
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keural.data.cleaning.blocks import Account, SourcePart, SourceReader, read_back
from keural.data.cleaning.duplicates import CONFIG, Signatures, clusters
from keural.data.cleaning.executors import Step, check_executor, run_steps
from keural.data.cleaning.filters import FILTER_SETS, QualityFilter
from keural.data.cleaning.formatters import Formatter
from keural.data.cleaning.language import FastTextFilter, ScriptFilter
from keural.data.cleaning.summary import SUMMARY, CleanedSource, CleaningFile, TaskDrops, TaskKept
from keural.data.cleaning.words import EOJEOL
from keural.data.licenses import language_of
from keural.data.readers.formats import DataFile, open_text
from keural.data.records import Document, SourceCount
from keural.data.sources import Source
from keural.errors import UserError, nearest
from keural.files import FileHashes, fingerprint, sha256_file
from keural.recipe import VERSION as RECIPE_VERSION
from keural.recipe import CleaningSpec, SourceSpec

VERSION = 2
"""Raised when the same sources give other documents than before."""


class Cleaned:
    """A finished cleaning: its documents and counts, by the names of the sources."""

    def __init__(self, directory: Path, sources: Sequence[Source]) -> None:
        self.directory = directory
        self.summary = CleaningFile.read(directory / SUMMARY)
        self._places = {source.name: place for place, source in enumerate(sources)}

    def documents(self, name: str) -> Iterator[Document]:
        """The cleaned documents of a source, in the order of its tasks."""
        for file in sorted((self.directory / "documents" / f"{self._places[name]:03d}").glob("*.jsonl.zst")):
            if sha256_file(file) != self.summary.files.get(file.relative_to(self.directory).as_posix()):
                raise UserError(f"{file}: does not match its checksum; delete {self.directory} and clean again")
            for row in _rows(file):
                yield Document(row["text"], row["metadata"]["where"], row["metadata"].get("language"))

    def count(self, name: str) -> SourceCount:
        """The account of a source."""
        row = self.summary.sources[name]
        return SourceCount(row.rows, Counter(row.drops), Counter(row.unreadable), row.first)


def check_cleaning(spec: CleaningSpec, sources: Sequence[Source], data_dir: Path | None) -> None:
    """Raise `UserError` for a source whose kind of text nobody says, a missing model, an executor that is not there."""
    names = [source.name for source in sources]
    for source in sources:
        _kind(source.spec)
        if names.count(source.name) > 1:
            raise UserError(f"data.cleaning: two sources are called {source.name!r}; give each a name of its own")
    if spec.language_id == "fasttext":
        _model(spec, data_dir)
    check_executor(spec.executor)


def clean(
    spec: CleaningSpec, sources: Sequence[Source], data_dir: Path | None, out_root: Path, seed: int, hashes: FileHashes
) -> Cleaned:
    """Clean the documents of `sources`, or find them cleaned; an interrupted cleaning goes on with the tasks that are missing.

    Raises `UserError` as `check_cleaning` does, and `Submitted` where a cluster does the work.
    """
    check_cleaning(spec, sources, data_dir)
    directory = out_root / f"cleaned-{cleaning_fingerprint(spec, sources, data_dir, seed, hashes)[:16]}"
    if CleaningFile.find(directory / SUMMARY) is None:
        directory.mkdir(parents=True, exist_ok=True)
        parts = [
            SourcePart(source, place, _kind(source.spec), file) for place, source in enumerate(sources) for file in source.parts()
        ]
        model = _model(spec, data_dir) if spec.language_id == "fasttext" else None
        run_steps(_steps(spec, parts, model, directory.absolute(), seed), spec.executor)
        _summary(directory, sources, spec.examples).write(directory / SUMMARY)
        shutil.rmtree(directory / "work")
    return Cleaned(directory, sources)


def _kind(source: SourceSpec) -> str:
    kind = source.text_kind or language_of(source)
    if kind in (*FILTER_SETS, "any"):
        return str(kind)
    raise UserError(
        f"source {source.name!r}: cleaning needs to know what its text is; give text_kind: {', '.join(FILTER_SETS)} or any"
        f"{nearest(kind, FILTER_SETS) if kind else ''}"
    )


def _model(spec: CleaningSpec, data_dir: Path | None) -> Path:
    path = (data_dir or Path()) / str(spec.model)
    if not path.is_file():
        raise UserError(
            f"data.cleaning.model: {path}: no such file; fetch GlotLID (hf download cis-lmu/glotlid model.bin) or lid.176.bin and "
            "give its path relative to the data directory, or set language_id: script"
        )
    return path.absolute()


def cleaning_fingerprint(
    spec: CleaningSpec, sources: Sequence[Source], data_dir: Path | None, seed: int, hashes: FileHashes
) -> str:
    """Of everything that determines the documents; who computes them does not."""
    return fingerprint(
        {
            "version": [VERSION, RECIPE_VERSION, version("datatrove"), version("ftfy")],
            "spec": spec.determining("cleaning"),
            "sources": [source.spec.determining("cleaning") for source in sources],
            "contents": [source.content(hashes) for source in sources],
            "model": hashes.of(_model(spec, data_dir)) if spec.language_id == "fasttext" else None,
            "seed": seed if any(source.needs_seed for source in sources) else None,
        }
    )


def _steps(spec: CleaningSpec, parts: Sequence[SourcePart], model: Path | None, directory: Path, seed: int) -> list[Step]:
    """The passes over the data in their order."""
    from datatrove.pipeline.writers import JsonlWriter

    work = directory / "work"

    def account(step: str, reason: str = "") -> Account:
        return Account(work / "drops", step, spec.examples, reason)

    def read() -> list[Any]:
        dropped = account("language")
        chosen = ScriptFilter(dropped) if model is None else FastTextFilter(model, dropped)
        writer = JsonlWriter(str(work / "read"), "${rank}.jsonl", compression="zstd")
        return [SourceReader(parts, seed, account("read")), chosen, writer]

    def keep() -> list[Any]:
        documents = read_back(work / "read")
        unique = [_unique(work, account("duplicates", "near_duplicate"))] if spec.deduplicate else []
        quality = [QualityFilter(account("quality"))] if spec.filters else []
        writer = JsonlWriter(str(directory / "documents"), "${folder}/${rank}.jsonl", compression="zstd")
        return [documents, *unique, *quality, Formatter(spec.personal_data, account("formatters")), _Foldered(writer)]

    tasks = min(spec.tasks, len(parts))
    middle = _deduplication(work, tasks) if spec.deduplicate else []
    return [Step("read", read, tasks, work / "logs" / "read"), *middle, Step("keep", keep, tasks, work / "logs" / "keep")]


def _deduplication(work: Path, tasks: int) -> list[Step]:
    """Signatures of every document, equal ones bucket by bucket, clusters."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets

    signatures, pairs = str(work / "signatures"), str(work / "pairs")

    def sign() -> list[Any]:
        return [read_back(work / "read"), Signatures(signatures, config=CONFIG, language=EOJEOL)]

    passes: list[tuple[str, Callable[[], list[Any]], int]] = [
        ("signatures", sign, tasks),
        ("buckets", lambda: [MinhashDedupBuckets(signatures, pairs, config=CONFIG)], CONFIG.num_buckets),
        ("clusters", lambda: clusters(work / "pairs", work / "remove"), 1),
    ]
    return [Step(name, blocks, count, work / "logs" / name) for name, blocks, count in passes]


def _unique(work: Path, account: Account) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

    return MinhashDedupFilter(str(work / "remove"), exclusion_writer=account)


class _Foldered:
    """Writes each document into its source's folder, and counts it."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, data: Iterator[Any], rank: int, world_size: int) -> Iterator[Any]:
        kept: Counter[int] = Counter()

        def placed() -> Iterator[Any]:
            for document in data:
                place = document.metadata["place"]
                kept[place] += 1
                document.metadata = {key: document.metadata[key] for key in ("where", "language")} | {"folder": f"{place:03d}"}
                yield document

        yield from self._writer(placed(), rank, world_size)
        path = Path(self._writer.output_folder.path).with_name("work") / "kept" / f"{rank:05d}.json"
        TaskKept(kept={str(place): count for place, count in kept.items()}).write(path)


def _summary(directory: Path, sources: Sequence[Source], limit: int) -> CleaningFile:
    """The account: rows, kept and dropped by source, and by reason the first `limit` examples."""
    rows: list[dict[str, Any]] = [{"kept": 0, "drops": Counter(), "unreadable": Counter(), "first": {}} for _ in sources]
    examples: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((directory / "work" / "kept").glob("*.json")):
        for place, count in TaskKept.read(file).kept.items():
            rows[int(place)]["kept"] += count
    for file in sorted((directory / "work" / "drops").glob("*.json")):
        made = TaskDrops.read(file)
        for drop in made.drops:
            row = rows[drop.place]
            row["drops"][drop.reason] += drop.count
            if file.name.startswith("read-"):
                row["unreadable"][drop.reason] += drop.count
            row["first"].setdefault(drop.reason, drop.first)
        for reason, shown in made.examples.items():
            named = [example | {"source": sources[example["source"]].name} for example in shown]
            examples[reason] = (examples.get(reason, []) + named)[:limit]
    for row in rows:
        row["rows"] = row["kept"] + row["drops"].total()
        row["drops"] = dict(row["drops"].most_common())
    return CleaningFile(
        sources={source.name: CleanedSource(**row) for source, row in zip(sources, rows, strict=True)},
        examples=dict(sorted(examples.items())),
        files={
            file.relative_to(directory).as_posix(): sha256_file(file) for file in sorted((directory / "documents").rglob("*.zst"))
        },
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with open_text(DataFile(file, file.name)) as lines:
        yield from map(json.loads, lines)
