"""What was prepared: the stores of a stage, the table of its sources, and the fingerprint by which it is found again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keural.data.licenses import left_out
from keural.data.loading.corpus import Corpus
from keural.data.loading.mixture import Mixture, mix
from keural.data.source_counts import warning_of
from keural.data.sources import FileHashes, check_sources, content_of
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint, read_json, read_object, write_json
from keural.recipe import OBJECTIVES, DataSpec, Objective, SourceSpec
from keural.tokenizer.load import KeuralTokenizer

if TYPE_CHECKING:
    pass


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


def find_prepared(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> Prepared | None:
    """What `prepare` would give, if it is there already. Raises `UserError` for sources that cannot be read."""
    check_sources(used_sources(spec), data_dir)
    wanted = data_fingerprint(spec, objective, data_dir, tokenizer, out_root, seed)
    directory = out_root / wanted[:16]
    return open_prepared(directory, spec, wanted) if is_prepared(directory, wanted) else None


def open_prepared(directory: Path, spec: DataSpec, data_fingerprint: str) -> Prepared:
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


def data_fingerprint(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> str:
    """Of settings, contents and tokenizer. Documents are cut only by the stream, so their stores do not depend on the length."""
    hashes = file_hashes(out_root)
    settings = spec.model_dump(exclude={"store", "stores", "shards", "mixing", "cleaning"})
    if spec.cleaning is not None:
        from keural.data.cleaning.run import cleaning_fingerprint

        settings["cleaning"] = cleaning_fingerprint(spec.cleaning, sources_to_clean(spec), data_dir, seed, hashes)
    for source in settings["sources"] + settings["heldout_sources"]:
        del source["weight"]  # weights choose what is read from a store, not what is in it
        del source["expect"]  # a warning
    evaluation = spec.decontaminate.sources if spec.decontaminate else []
    if not evaluation:
        del settings["decontaminate"]
    if spec.mixing is not None:
        settings["sections"] = True
    if OBJECTIVES[objective].store == "documents":
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


def sources_to_clean(spec: DataSpec) -> list[SourceSpec]:
    """The used sources, those that are held out first, so that it is they that keep their documents."""
    held = [source for source in spec.heldout_sources if not left_out(spec, source)]
    return [*held, *(source for source in used_sources(spec) if source not in held)]


def file_hashes(out_root: Path) -> FileHashes:
    """Of files that were hashed before."""
    cache = out_root / HASHES
    return FileHashes(read_json(cache) if cache.is_file() else None)


def is_prepared(directory: Path, wanted: str) -> bool:
    """Whether `directory` holds data of exactly this fingerprint, with all its stores."""
    marker = directory / "prepared.json"
    if not marker.is_file():
        return False
    made = read_object(marker)
    stores = ("train", "heldout") if made.get("heldout") else ("train",)
    return made.get("fingerprint") == wanted and all((directory / store / "manifest.json").is_file() for store in stores)
