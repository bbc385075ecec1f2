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
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keural.data.corpus import Corpus
from keural.data.decontaminate import REASON, Contaminated, Decontaminator, check_evaluation
from keural.data.encode import Encoded, Encoder
from keural.data.gates import Gatekeeper
from keural.data.mixture import Mixture, mix
from keural.data.parts import Parts
from keural.data.records import Drop, Record
from keural.data.sources import (
    FileHashes,
    adapter_of,
    check_sources,
    content_of,
    left_out,
    read_source,
)
from keural.data.split import Side, Splitter
from keural.data.spool import Spool
from keural.data.store import TokenStore
from keural.data.stream import STORE_KIND
from keural.data.tally import Tally, warning_of
from keural.data.texts import iter_texts
from keural.errors import UserError
from keural.files import atomic_directory, fingerprint, read_json, read_object, write_json
from keural.recipe import DataSpec, Objective, SourceSpec
from keural.tokenizer.load import KeuralTokenizer

if TYPE_CHECKING:
    from keural.data.cleaning.run import Cleaned

__all__ = ["Prepared", "check_sources", "iter_texts", "prepare", "read_heldout_texts"]

HASHES = "file-hashes.json"
VERSION = 2
"""Raised when the same sources give other bytes than before."""


@dataclass(frozen=True)
class Prepared:
    """A stage's data on disk: the stores, the fingerprint of what they were made from, and one table row per source.

    A row has `source, adapter, language, license, flags` (`benchmark`, `non-commercial`), `left_out` (None, or why the recipe does
    not use the source), `split, rows, kept, heldout` (of the kept ones), `tokens` (in the stores, repeats included), `repeat`,
    `shortened` (conversations that lost trailing turns), `drops` (count by reason), `first_drop` (place by reason), `noted` (kept
    records that a gate only counts, by reason), `length_ratio` (of pairs: characters of chosen answers against rejected ones, else
    None) and `warning` (None, or what differs from the expected count). Where sources are mixed by weight `tokens` counts each
    record once, and `mixture` has the source's `Share` of an epoch.
    """

    train: Path
    heldout: Path | None
    table: list[dict[str, Any]]
    fingerprint: str
    mixture: Mixture | None = None
    ready: Corpus | None = None
    """Where the data is that was tokenised before; None: in `train`."""
    contamination: dict[str, dict[str, Any]] | None = None
    """By evaluation set (`Decontaminator.report`); the records that were found are listed in `contamination.jsonl`."""

    @property
    def corpus(self) -> Corpus:
        """What the stage trains on."""
        return self.ready or Corpus((self.train,), mixture=self.mixture)


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
    wanted = _fingerprint(spec, objective, data_dir, tokenizer, out_root, seed)
    directory = out_root / wanted[:16]
    if not _is_there(directory, wanted):
        cleaned = _clean(spec, data_dir, out_root, seed)
        with atomic_directory(directory) as temporary:
            with _parts(out_root / f".{wanted[:16]}.parts", tokenizer) as parts:
                checker = Decontaminator(spec.decontaminate, data_dir) if spec.decontaminate else None
                reading = _Reading(data_dir, seed, cleaned, checker)
                table, heldout = _make(spec, objective, tokenizer, parts, temporary, reading)
            made = {"fingerprint": wanted, "heldout": heldout, "table": table, "cleaned": cleaned and cleaned.directory.name}
            if checker is not None:
                checker.write(temporary)
                made["contamination"] = checker.report()
            write_json(temporary / "prepared.json", made)
    return _prepared(directory, spec, wanted)


def find_prepared(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> Prepared | None:
    """What `prepare` would give, if it is there already. Raises `UserError` for sources that cannot be read."""
    check_sources(used_sources(spec), data_dir)
    wanted = _fingerprint(spec, objective, data_dir, tokenizer, out_root, seed)
    directory = out_root / wanted[:16]
    return _prepared(directory, spec, wanted) if _is_there(directory, wanted) else None


def _prepared(directory: Path, spec: DataSpec, data_fingerprint: str) -> Prepared:
    """What is in a finished directory; the mixture is worked out anew, for it takes no time and other weights need no other
    store.
    """
    made = read_object(directory / "prepared.json")
    train, heldout = directory / "train", directory / "heldout" if made["heldout"] else None
    contamination = made.get("contamination")
    store = TokenStore.open(train, verify="size")
    if heldout is not None:
        TokenStore.open(heldout, verify="size")
    expected = {(source.name, "train"): source for source in spec.sources}
    expected |= {(source.name, "heldout"): source for source in spec.heldout_sources}
    made["table"] = [row | {"warning": warning_of(expected[row["source"], row["split"]], row)} for row in made["table"]]
    if spec.mixing is None:
        return Prepared(train, heldout, made["table"], data_fingerprint, contamination=contamination)
    weights = {source.name: source.weight or 0.0 for source in spec.sources if not left_out(spec, source)}
    mixture = mix(store, weights, spec.mixing)
    shares = mixture.rows()
    table = [row | {"mixture": shares.get(row["source"]) if row["split"] == "train" else None} for row in made["table"]]
    return Prepared(
        train, heldout, table, fingerprint([data_fingerprint, mixture.fingerprint]), mixture, contamination=contamination
    )


def used_sources(spec: DataSpec) -> list[SourceSpec]:
    """The sources that the recipe does not leave out. Raises `UserError` when none is left to train on."""
    if spec.sources and all(left_out(spec, source) for source in spec.sources):
        reasons = ", ".join(f"{source.name} ({left_out(spec, source)})" for source in spec.sources)
        raise UserError(f"no source is left to train on: data.licenses and data.benchmarks leave out {reasons}")
    return [source for source in (*spec.sources, *spec.heldout_sources) if not left_out(spec, source)]


def read_heldout_texts(prepared: Prepared, language: str | None = None) -> list[str]:
    """The held-out documents' texts, shuffled; with `language` only those of that language.

    Raises `UserError` when there are none.
    """
    path = prepared.train.with_name("heldout") / "texts.jsonl"
    texts = []
    if prepared.heldout is not None and path.is_file():
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = [row["text"] for row in rows if language in (None, row["language"])]
    if not texts:
        what = f"document in language {language!r}" if language else "document"
        raise UserError(f"{prepared.train.parent}: no {what} is held out; raise data.heldout_per_mille or add heldout_sources")
    return texts


def _check_kinds(spec: DataSpec, objective: Objective) -> None:
    for source in used_sources(spec):
        kind = adapter_of(source).kind_of(source)
        if kind != STORE_KIND[objective]:
            raise UserError(
                f"source {source.name!r}: adapter {source.adapter} gives {kind}; "
                f"objective {objective} needs {STORE_KIND[objective]}"
            )


def _fingerprint(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> str:
    """Of settings, contents and tokenizer. Documents are cut only by the stream, so their stores do not depend on the length."""
    hashes = _hashes(out_root)
    settings = spec.model_dump(exclude={"store", "stores", "shards", "mixing", "cleaning"})
    if spec.cleaning is not None:
        from keural.data.cleaning.run import cleaning_fingerprint

        settings["cleaning"] = cleaning_fingerprint(spec.cleaning, _to_clean(spec), data_dir, seed, hashes)
    for source in settings["sources"] + settings["heldout_sources"]:
        del source["weight"]  # weights choose what is read from a store, not what is in it
        del source["expect"]  # a warning
    evaluation = spec.decontaminate.sources if spec.decontaminate else []
    if not evaluation:
        del settings["decontaminate"]
    if spec.mixing is not None:
        settings["sections"] = True
    if objective == "next_token":
        del settings["sequence_length"]
    contents = [content_of(source, data_dir, hashes) for source in (*used_sources(spec), *evaluation)]
    if hashes.changed:
        write_json(out_root / HASHES, hashes.known)
    return fingerprint(
        {
            "version": VERSION,
            "objective": objective,
            "spec": settings,
            "contents": contents,
            "tokenizer": tokenizer.sha256,
            "seed": seed,
        }
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

    return clean(spec.cleaning, _to_clean(spec), data_dir, out_root, seed, _hashes(out_root))


def _to_clean(spec: DataSpec) -> list[SourceSpec]:
    """The used sources, those that are held out first, so that it is they that keep their documents."""
    held = [source for source in spec.heldout_sources if not left_out(spec, source)]
    return [*held, *(source for source in used_sources(spec) if source not in held)]


def _hashes(out_root: Path) -> FileHashes:
    """Of files that were hashed before."""
    cache = out_root / HASHES
    return FileHashes(read_json(cache) if cache.is_file() else None)


def _is_there(directory: Path, wanted: str) -> bool:
    marker = directory / "prepared.json"
    if not marker.is_file():
        return False
    made = read_object(marker)
    stores = ("train", "heldout") if made.get("heldout") else ("train",)
    return made.get("fingerprint") == wanted and all((directory / store / "manifest.json").is_file() for store in stores)


@contextlib.contextmanager
def _parts(directory: Path, tokenizer: KeuralTokenizer) -> Iterator[Parts]:
    """A place for batches of ids that outlives an interruption, but neither success nor an error."""
    try:
        yield Parts(directory, tokenizer.sha256)
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

    def records(self, tally: Tally) -> Iterable[Record | Drop]:
        """The records of a tally's source, cleaned where they are; what cleaning dropped is counted in the tally."""
        source = tally.source
        if self.cleaned is None:
            return read_source(source, self.data_dir, self.seed)
        tally.clean(self.cleaned.count(source.name))
        return self.cleaned.documents(source.name)


def _make(
    spec: DataSpec, objective: Objective, tokenizer: KeuralTokenizer, parts: Parts, directory: Path, reading: _Reading
) -> tuple[list[dict[str, Any]], bool]:
    """Read all sources and write the stores into `directory`. Returns the table, and whether anything is held out."""
    kind = STORE_KIND[objective]
    encoder = Encoder(tokenizer, spec, threads=len(os.sched_getaffinity(0)), parts=parts)
    sections = spec.mixing is not None
    held = Spool(directory / ".heldout", kind, keep_texts=True)
    with Spool(directory / ".train", kind, sections=sections) as train, held as heldout:
        table = _read_all(spec, encoder, {"train": train, "heldout": heldout}, reading)
        _check_sides(spec, train.units, heldout.units)
        for spool, name in ((train, "train"), (heldout, "heldout")):
            if spool.units:
                spool.write_store(directory / name, tokenizer.sha256, tokenizer.vocab_size, {"sources": table}, reading.seed)
        return table, heldout.units > 0


def _read_all(spec: DataSpec, encoder: Encoder, spools: dict[Side, Spool], reading: _Reading) -> list[dict[str, Any]]:
    """Put every used record into its side's spool. Returns the table, in the order of the recipe."""
    splitter = Splitter(spec.heldout_per_mille)
    # sources that are held out whole come first, so that no other one can train on what they ask
    tallies = [Tally(source, "heldout", left_out(spec, source)) for source in spec.heldout_sources]
    tallies += [Tally(source, "train", left_out(spec, source)) for source in spec.sources]
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


def _kept(tally: Tally, encoder: Encoder, splitter: Splitter, reading: _Reading) -> Iterator[tuple[Side, Encoded]]:
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
