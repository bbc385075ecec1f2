"""From a stage's sources to its token stores: read, count drops, split, tokenise, shuffle, write.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keural.data.filtering.decontamination import REASON, Contaminated, Decontaminator, check_evaluation
from keural.data.filtering.gates import Gatekeeper
from keural.data.filtering.holdout import Side, Splitter
from keural.data.licenses import left_out
from keural.data.loading.stream import STORE_KIND
from keural.data.prepared import (
    HASHES,
    PREPARED,
    Prepared,
    PreparedFile,
    data_fingerprint,
    is_prepared,
    open_prepared,
    read_heldout_texts,
    sources_to_clean,
    used_sources,
)
from keural.data.records import Drop, Record
from keural.data.source_counts import SourceCounter
from keural.data.sources import adapter_of, check_sources, read_source
from keural.data.tokenizer_texts import iter_texts
from keural.data.tokens.encode import Encoded, Encoder
from keural.data.tokens.encoding_cache import EncodingCache
from keural.data.tokens.store_builder import StoreBuilder
from keural.errors import UserError
from keural.files import FileHashes, atomic_directory
from keural.recipe import DataSpec, Objective
from keural.tokenizer.load import KeuralTokenizer

if TYPE_CHECKING:
    from keural.data.cleaning.run import Cleaned

__all__ = ["Prepared", "check_sources", "iter_texts", "prepare", "read_heldout_texts"]


def prepare(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> Prepared:
    """Prepare a stage's data under `out_root`, or find it there.

    Raises `UserError` for anything wrong with a source: what `check_sources` finds, records of a kind the objective does not
    train on, a larger share of bad rows than `max_drop`, nothing left to train on or to hold out.
    """
    check_sources(used_sources(spec), data_dir)
    check_evaluation(spec.decontaminate, data_dir)
    _check_kinds(spec, objective)
    wanted = data_fingerprint(spec, objective, data_dir, tokenizer, out_root, seed)
    directory = out_root / wanted[:16]
    if not is_prepared(directory, wanted):
        cleaned = _clean(spec, data_dir, out_root, seed)
        with atomic_directory(directory) as temporary:
            with _parts(out_root / f".{wanted[:16]}.parts", tokenizer) as parts:
                checker = Decontaminator(spec.decontaminate, data_dir) if spec.decontaminate else None
                reading = _Reading(data_dir, seed, cleaned, checker)
                table, heldout = _make(spec, objective, tokenizer, parts, temporary, reading)
            if checker is not None:
                checker.write(temporary)
            PreparedFile(
                fingerprint=wanted,
                heldout=heldout,
                table=table,
                cleaned=cleaned.directory.name if cleaned else None,
                contamination=checker.report() if checker else None,
            ).write(temporary / PREPARED)
    return open_prepared(directory, spec, wanted)


def _check_kinds(spec: DataSpec, objective: Objective) -> None:
    for source in used_sources(spec):
        kind = adapter_of(source).kind_of(source)
        if kind != STORE_KIND[objective]:
            raise UserError(
                f"source {source.name!r}: adapter {source.adapter} gives {kind}; "
                f"objective {objective} needs {STORE_KIND[objective]}"
            )


def check_cleaning(spec: DataSpec, data_dir: Path | None) -> None:
    """Refuse cleaning that cannot work. Raises `UserError`."""
    if spec.cleaning is None:
        return
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("data.cleaning needs datatrove: pip install 'keural[data]'")
    from keural.data.cleaning import run

    run.check_cleaning(spec.cleaning, used_sources(spec), data_dir)


def _clean(spec: DataSpec, data_dir: Path | None, out_root: Path, seed: int) -> "Cleaned | None":
    """The cleaned documents of all sources, where the recipe wants them cleaned."""
    if spec.cleaning is None:
        return None
    from keural.data.cleaning.run import clean

    return clean(spec.cleaning, sources_to_clean(spec), data_dir, out_root, seed, FileHashes(out_root / HASHES))


@contextlib.contextmanager
def _parts(directory: Path, tokenizer: KeuralTokenizer) -> Iterator[EncodingCache]:
    """A place for batches of ids that outlives an interruption, but neither success nor an error."""
    try:
        yield EncodingCache(directory, tokenizer.sha256)
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class _Reading:
    """Where records come from, and what is looked for in them."""

    data_dir: Path | None
    seed: int
    cleaned: "Cleaned | None"
    checker: Decontaminator | None

    def records(self, tally: SourceCounter) -> Iterable[Record | Drop]:
        """The records of a tally's source, cleaned where they are; what cleaning dropped is counted in the tally."""
        source = tally.source
        if self.cleaned is None:
            return read_source(source, self.data_dir, self.seed)
        tally.clean(self.cleaned.count(source.name))
        return self.cleaned.documents(source.name)


def _make(
    spec: DataSpec, objective: Objective, tokenizer: KeuralTokenizer, parts: EncodingCache, directory: Path, reading: _Reading
) -> tuple[list[dict[str, Any]], bool]:
    """Read all sources and write the stores into `directory`. Returns the table, and whether anything is held out."""
    kind = STORE_KIND[objective]
    encoder = Encoder(tokenizer, spec, threads=len(os.sched_getaffinity(0)), parts=parts)
    sections = spec.mixing is not None
    held = StoreBuilder(directory / ".heldout", kind, keep_texts=True)
    with StoreBuilder(directory / ".train", kind, sections=sections) as train, held as heldout:
        table = _read_all(spec, encoder, {"train": train, "heldout": heldout}, reading)
        _check_sides(spec, train.units, heldout.units)
        for spool, name in ((train, "train"), (heldout, "heldout")):
            if spool.units:
                spool.write_store(directory / name, tokenizer.sha256, tokenizer.vocab_size, {"sources": table}, reading.seed)
        return table, heldout.units > 0


def _read_all(spec: DataSpec, encoder: Encoder, spools: dict[Side, StoreBuilder], reading: _Reading) -> list[dict[str, Any]]:
    """Put every used record into its side's spool. Returns the table, in the order of the recipe."""
    splitter = Splitter(spec.heldout_per_mille)
    # sources that are held out whole come first, so that no other one can train on what they ask
    tallies = [SourceCounter(source, "heldout", left_out(spec, source)) for source in spec.heldout_sources]
    tallies += [SourceCounter(source, "train", left_out(spec, source)) for source in spec.sources]
    for tally in tallies:
        if tally.left_out is not None:
            continue
        for side, encoded in _kept(tally, encoder, splitter, reading):
            spools[side].add(encoded, repeat=tally.source.repeat if side == "train" else 1, source=tally.source.name)
    return [tally.row() for tally in sorted(tallies, key=lambda tally: tally.split != "train")]


def _check_sides(spec: DataSpec, train: int, heldout: int) -> None:
    if not train:
        raise UserError(f"nothing is left to train on: all records of {', '.join(s.name for s in spec.sources)} are held out")
    if spec.heldout_per_mille and not heldout:
        raise UserError(
            f"data.heldout_per_mille {spec.heldout_per_mille:g} holds out none of {train} records; raise it, or set it to 0"
        )


def _kept(tally: SourceCounter, encoder: Encoder, splitter: Splitter, reading: _Reading) -> Iterator[tuple[Side, Encoded]]:
    """The records of one source that are used, each with its side; everything else is counted in the tally."""
    source = tally.source
    keeper = Gatekeeper(source, adapter_of(source).gates)
    prompts = keeper.actions["duplicate_prompts"]
    checker = reading.checker if tally.split == "train" else None  # what is held out may be an evaluation set itself
    for encoded in encoder.encode(_gated(reading.records(tally), keeper, checker)):
        side = (
            encoded
            if isinstance(encoded, Drop)
            else splitter.side(encoded.record, tally.split == "heldout", source.id_space or source.name, prompts)
        )
        if isinstance(side, Drop):
            tally.drop(side)
            if checker and isinstance(side, Contaminated) and side.hit:
                checker.count(source.name, side.where, side.hit)
            continue
        assert isinstance(encoded, Encoded)
        tally.keep(side, encoded)
        tally.noted.update(keeper.reasons(encoded.record, "count"))
        if checker and keeper.actions[REASON] == "count" and (hit := checker.hit_in(encoded.record)):
            checker.count(source.name, encoded.record.where, hit)
            tally.noted[REASON] += 1
        yield side, encoded
        if tally.kept == source.limit:
            tally.stop()
            break
    tally.check()


def _gated(records: Iterable[Record | Drop], keeper: Gatekeeper, checker: Decontaminator | None) -> Iterator[Record | Drop]:
    dropped = checker if keeper.actions[REASON] == "drop" else None
    for record in records:
        if isinstance(record, Drop):
            yield record
        elif reason := next(keeper.reasons(record, "drop"), None):
            yield Drop(reason, record.where)
        elif dropped and (hit := dropped.hit_in(record)):
            yield Contaminated(REASON, record.where, hit=hit)  # counted when it is used: reading runs ahead
        else:
            yield record
