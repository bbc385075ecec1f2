"""Makes the token stores of a stage from its sources: read, gate, decontaminate, encode, split, count, shuffle, write.

In: a `DataSpec`, the data directory and a tokenizer. Out: `out_root/<fingerprint>/` with the stores `train/` and, where
something is held out, `heldout/`, and `prepared.json` with the table of sources. The fingerprint is of everything that
determines the bytes: settings, contents of the files, tokenizer, seed. What is already there is not made again; what is being
made becomes visible only when it is whole.

While a store is made its tokens wait in a file beside it, so memory stays at about 150 bytes per record whatever the size of the
data. The ids of every batch are kept until the store is there: a run that was killed reads its sources again, which takes a
fraction of the time, but tokenises only what it had not.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from keural.data.field_use import FieldUse
from keural.data.filtering.decontamination import REASON, Contaminated, Decontaminator, check_evaluation
from keural.data.filtering.gates import Gatekeeper
from keural.data.filtering.holdout import Split, Splitter
from keural.data.licenses import left_out
from keural.data.prepared import (
    DROPPED,
    HASHES,
    PREPARED,
    Prepared,
    PreparedFile,
    data_fingerprint,
    is_prepared,
    open_prepared,
    settings_fingerprint,
    write_dropped,
)
from keural.data.records import Drop, Record, plain_record
from keural.data.source_counts import NOT_DEFECTS, SourceCounter, SourceRow
from keural.data.sources import Source
from keural.data.stage_sources import StageSources, open_stage_sources
from keural.data.tokens.encode import Encoded, Encoder
from keural.data.tokens.encoding_cache import EncodingCache
from keural.data.tokens.store_builder import StoreBuilder
from keural.errors import UserError, UserErrors
from keural.files import FileHashes, atomic_directory
from keural.recipe import OBJECTIVES, DataSpec, Objective
from keural.terminal import work_progress
from keural.tokenizer.load import KeuralTokenizer

if TYPE_CHECKING:
    from keural.data.cleaning.run import Cleaned

T = TypeVar("T")
DropT = TypeVar("DropT", bound=Drop)
ROWS_BETWEEN_SIGNS = 256
"""So often progress is shown."""


def prepare(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> Prepared:
    """Prepare a stage's data under `out_root`, or find it there.

    Raises `UserError` for anything wrong with a source: what `open_stage_sources` finds, records of a kind the objective does not
    train on, a larger share of bad rows than `max_drop`, nothing left to train on or to hold out.
    """
    sources = open_stage_sources(spec, data_dir)
    check_evaluation(sources.evaluation)
    _check_kinds(sources, objective)
    wanted = data_fingerprint(sources, objective, tokenizer, out_root, seed)
    directory = out_root / wanted[:16]
    made = not is_prepared(directory, wanted)
    if made:
        cleaned = _clean(sources, out_root, seed)
        with atomic_directory(directory) as temporary:
            with _encoding_cache(out_root / f".{wanted[:16]}.parts", tokenizer) as cache:
                decontaminator = Decontaminator(spec.decontaminate, sources.evaluation) if spec.decontaminate else None
                reading = _Reading(sources, seed, cleaned, decontaminator)
                counters, heldout = _make(reading, objective, tokenizer, cache, temporary)
            if decontaminator is not None:
                decontaminator.write(temporary)
            shown = write_dropped(temporary / DROPPED, counters)
            PreparedFile(
                fingerprint=wanted,
                heldout=heldout,
                table=[counter.row().to_json() for counter in counters],
                cleaned=cleaned.directory.name if cleaned else None,
                contamination=decontaminator.report() if decontaminator else None,
                dropped=shown,
                settings=settings_fingerprint(spec, objective, tokenizer, seed),
            ).write(temporary / PREPARED)
    return replace(open_prepared(directory, spec, wanted), made=made)


def _check_kinds(sources: StageSources, objective: Objective) -> None:
    for source in sources.used:
        if source.kind != OBJECTIVES[objective].store:
            raise UserError(
                f"source {source.name!r}: adapter {source.spec.adapter} gives {source.kind}; "
                f"objective {objective} needs {OBJECTIVES[objective].store}"
            )


def check_cleaning(sources: StageSources) -> None:
    """Refuse cleaning that cannot work. Raises `UserError`."""
    if sources.spec.cleaning is None:
        return
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("data.cleaning needs datatrove: pip install 'keural[data]'")
    from keural.data.cleaning import run

    run.check_cleaning(sources.spec.cleaning, sources.used, sources.data_dir)


def _clean(sources: StageSources, out_root: Path, seed: int) -> "Cleaned | None":
    """The cleaned documents of all sources, where the recipe wants them cleaned."""
    if sources.spec.cleaning is None:
        return None
    from keural.data.cleaning.run import clean

    hashes = FileHashes(out_root / HASHES)
    return clean(sources.spec.cleaning, sources.heldout_first, sources.data_dir, out_root, seed, hashes)


@contextlib.contextmanager
def _encoding_cache(directory: Path, tokenizer: KeuralTokenizer) -> Iterator[EncodingCache]:
    """A place for batches of ids that outlives an interruption, but neither success nor an error."""
    try:
        yield EncodingCache(directory, tokenizer.sha256)
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def clear_parts(out_root: Path) -> None:
    """Remove the batches of ids that killed processes left for data of other settings; what all stages train on is there."""
    for directory in out_root.glob(".*.parts"):
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class _Reading:
    """Where records come from, and what is looked for in them."""

    sources: StageSources
    seed: int
    cleaned: "Cleaned | None"
    decontaminator: Decontaminator | None

    def records(self, source: Source, counter: SourceCounter) -> Iterable[Record | Drop]:
        """The records of a source, cleaned where the recipe says so; what cleaning dropped is counted."""
        if self.cleaned is None:
            counter.fields = FieldUse(source.adapter, source.spec)
            return source.read(self.seed, fields=counter.fields, notes=counter.notes)
        for file, _ in source.files:
            counter.notes.file(file.name, file.shape)
        counter.clean(self.cleaned.count(source.name))
        return self.cleaned.documents(source.name)


def _make(
    reading: _Reading, objective: Objective, tokenizer: KeuralTokenizer, cache: EncodingCache, directory: Path
) -> tuple[list[SourceCounter], bool]:
    """Read all sources and write the stores into `directory`. Returns what was counted, and whether anything is held out."""
    spec, kind = reading.sources.spec, OBJECTIVES[objective].store
    encoder = Encoder(tokenizer, spec, threads=len(os.sched_getaffinity(0)), cache=cache)
    sections = spec.mixing is not None
    length = spec.sequence_length
    held = StoreBuilder(directory / ".heldout", kind, keep_texts=True, named=True, longest=length)
    with StoreBuilder(directory / ".train", kind, sections=sections, longest=length) as train, held as heldout:
        with work_progress() as tell:
            counters = _read_all(reading, encoder, {"train": train, "heldout": heldout}, tell)
        _check_splits(spec, train.num_records, heldout.num_records)
        meta = {"sources": [counter.row().to_json() for counter in counters]}
        for builder, name in ((train, "train"), (heldout, "heldout")):
            if builder.num_records:
                builder.write_store(directory / name, tokenizer.sha256, tokenizer.vocab_size, meta, reading.seed)
        return counters, heldout.num_records > 0


def _read_all(
    reading: _Reading, encoder: Encoder, stores: dict[Split, StoreBuilder], tell: Callable[[str], None]
) -> list[SourceCounter]:
    """Put every used record into the store of its split. Returns what was counted, in the order of the recipe.

    A source that cannot be used does not end it: the others are still read, though no longer tokenised. Raises `UnusableSources`
    when all were.
    """
    sources, spec = reading.sources, reading.sources.spec
    splitter = Splitter(spec.heldout_per_mille)
    train = [SourceCounter(source, "train", left_out(spec, source)) for source in spec.sources]
    heldout = [SourceCounter(source, "heldout", left_out(spec, source)) for source in spec.heldout_sources]
    used = [counter for counter in (*heldout, *train) if counter.left_out is None]
    refused: list[UserError] = []
    for number, (source, counter) in enumerate(zip(sources.heldout_first, used, strict=True), start=1):
        show = partial(_tell, tell, f"source {number} of {len(used)}, {source.name}")
        encode = encoder.encode if not refused else _unencoded
        for split, encoded in _until_refused(_kept(source, counter, encode, splitter, reading, show), counter, refused):
            if not refused:
                stores[split].add(encoded, repeat=source.spec.repeat if split == "train" else 1, source=source.name)
    counters = [*train, *heldout]
    if refused:
        raise UnusableSources(refused, [counter.row() for counter in counters])
    return counters


class UnusableSources(UserErrors):
    """Sources that cannot be used, each with its reason; `table` is what was counted of all of them."""

    def __init__(self, errors: Iterable[UserError], table: list[SourceRow]) -> None:
        super().__init__(errors)
        self.table = table


def _until_refused(records: Iterator[T], counter: SourceCounter, refused: list[UserError]) -> Iterator[T]:
    """The records until their source is refused, which is remembered with the fields that its rows have."""
    try:
        yield from records
    except UserError as error:
        keys = list(counter.fields.keys) if counter.fields else []
        said = "its keys: " in str(error) or not counter.drops.keys() - NOT_DEFECTS
        named = "" if said or not keys else f" (fields of its rows: {', '.join(keys[:12])})"
        refused.append(UserError(f"{error}{named}"))


def _tell(tell: Callable[[str], None], what: str, counter: SourceCounter) -> None:
    tell(f"{what}: {counter.rows:,} rows, {counter.kept:,} kept, {counter.tokens:,} tokens")


def _unencoded(records: Iterable[Record | Drop]) -> Iterator[Encoded | Drop]:
    """Records as they are, where there will be no store."""
    return (record if isinstance(record, Drop) else Encoded(record, ()) for record in records)


def _check_splits(spec: DataSpec, train: int, heldout: int) -> None:
    if not train:
        raise UserError(f"nothing is left to train on: all records of {', '.join(s.name for s in spec.sources)} are held out")
    if spec.heldout_per_mille and not heldout:
        raise UserError(
            f"data.heldout_per_mille {spec.heldout_per_mille:g} holds out none of {train} records; raise it, or set it to 0"
        )


def _kept(
    source: Source,
    counter: SourceCounter,
    encode: Callable[[Iterable[Record | Drop]], Iterator[Encoded | Drop]],
    splitter: Splitter,
    reading: _Reading,
    show: Callable[[SourceCounter], None],
) -> Iterator[tuple[Split, Encoded]]:
    """The records of one source that are used, each with its split; everything else is counted."""
    spec = source.spec
    keeper = Gatekeeper(spec, source.adapter.gates)
    prompts = keeper.actions["duplicate_prompts"]
    # what is held out may be an evaluation set itself
    decontaminator = reading.decontaminator if counter.split == "train" else None
    for encoded in encode(_gated(reading.records(source, counter), keeper, decontaminator, counter)):
        if counter.rows % ROWS_BETWEEN_SIGNS == 0:
            show(counter)
        split = (
            encoded
            if isinstance(encoded, Drop)
            else splitter.assign(encoded.record, counter.split == "heldout", spec.id_space or spec.name, prompts)
        )
        if isinstance(split, Drop):
            counter.drop(split)
            counter.show(split, plain_record(encoded.record) if isinstance(encoded, Encoded) else None)
            if decontaminator and isinstance(split, Contaminated) and split.hit:
                decontaminator.count(spec.name, split.where, split.hit)
            continue
        assert isinstance(encoded, Encoded)
        counter.keep(split, encoded)
        counter.noted.update(keeper.reasons(encoded.record, "count"))
        counter.noted.update(getattr(encoded.record, "notes", ()))
        if decontaminator and keeper.actions[REASON] == "count" and (hit := decontaminator.hit_in(encoded.record)):
            decontaminator.count(spec.name, encoded.record.where, hit)
            counter.noted[REASON] += 1
        yield split, encoded
        if counter.kept == spec.limit:
            counter.stop()
            break
    counter.check()


def _gated(
    records: Iterable[Record | Drop], keeper: Gatekeeper, decontaminator: Decontaminator | None, counter: SourceCounter
) -> Iterator[Record | Drop]:
    dropped = decontaminator if keeper.actions[REASON] == "drop" else None
    for record in records:
        if isinstance(record, Drop):
            yield record
        elif drop := keeper.drop_of(record):
            yield _shown(drop, record, counter)
        elif dropped and (hit := dropped.hit_in(record)):
            # counted when it is used: reading runs ahead
            yield _shown(Contaminated(REASON, record.where, hit=hit), record, counter)
        else:
            yield record


def _shown(drop: DropT, record: Record, counter: SourceCounter) -> DropT:
    """The drop, once the record can be looked at afterwards."""
    counter.show(drop, plain_record(record))
    return drop
