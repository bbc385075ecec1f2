"""What was prepared: the stores of a stage, the table of its sources, and the fingerprint by which it is found again."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keural.data.licenses import left_out
from keural.data.loading.corpus import Corpus
from keural.data.loading.mixture import Mixture, mix
from keural.data.source_counts import SourceRow, rows_from_json, warning_of
from keural.data.sources import FileHashes
from keural.data.stage_sources import StageSources, open_stage_sources
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint, read_json, read_object, write_json
from keural.recipe import OBJECTIVES, DataSpec, Objective
from keural.recipe import VERSION as RECIPE_VERSION
from keural.tokenizer.load import KeuralTokenizer

HASHES = "file-hashes.json"
VERSION = 3
"""Raised when the same sources give other bytes than before."""


@dataclass(frozen=True)
class Prepared:
    """A stage's data on disk: the stores, the fingerprint of what they were made from, and one table row per source."""

    train: Path
    heldout: Path | None
    table: list[SourceRow]
    fingerprint: str
    mixture: Mixture | None = None
    pretokenized: Corpus | None = None
    """Where the data is that was tokenised before; None: in `train`."""
    contamination: dict[str, dict[str, Any]] | None = None
    """By evaluation set (`Decontaminator.report`); the records that were found are listed in `contamination.jsonl`."""

    @property
    def corpus(self) -> Corpus:
        """What the stage trains on."""
        return self.pretokenized or Corpus((self.train,), mixture=self.mixture)


def find_prepared(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> Prepared | None:
    """What `prepare` would give, if it is there already. Raises `UserError` for sources that cannot be read."""
    wanted = data_fingerprint(open_stage_sources(spec, data_dir), objective, tokenizer, out_root, seed)
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
    rows = rows_from_json(made.get("table"), directory / "prepared.json")
    if unknown := [row.source for row in rows if (row.source, row.split) not in expected]:
        raise UserError(f"{directory}: damaged (the recipe has no source {unknown[0]!r}); delete it and prepare the data again")
    table = [replace(row, warning=warning_of(expected[row.source, row.split], row)) for row in rows]
    if spec.mixing is None:
        return Prepared(train, heldout, table, data_fingerprint, contamination=contamination)
    weights = {source.name: source.weight or 0.0 for source in spec.sources if not left_out(spec, source)}
    mixture = mix(store, weights, spec.mixing)
    table = [replace(row, mixture=mixture.shares.get(row.source)) if row.split == "train" else row for row in table]
    return Prepared(
        train, heldout, table, fingerprint([data_fingerprint, mixture.fingerprint]), mixture, contamination=contamination
    )


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


def data_fingerprint(sources: StageSources, objective: Objective, tokenizer: KeuralTokenizer, out_root: Path, seed: int) -> str:
    """Of settings, contents and tokenizer. Documents are cut only by the stream, so their stores do not depend on the length."""
    spec, hashes, cleaning = sources.spec, file_hashes(out_root), None
    if spec.cleaning is not None:
        from keural.data.cleaning.run import cleaning_fingerprint

        cleaning = cleaning_fingerprint(spec.cleaning, sources.heldout_first, sources.data_dir, seed, hashes)
    contents = [source.content(hashes) for source in (*sources.used, *sources.evaluation)]
    if hashes.changed:
        write_json(out_root / HASHES, hashes.known)
    return fingerprint(
        {
            "version": [VERSION, RECIPE_VERSION],
            "objective": objective,
            "spec": spec.determining("data"),
            "cleaning": cleaning,
            "sections": spec.mixing is not None,
            "sequence_length": None if OBJECTIVES[objective].store == "documents" else spec.sequence_length,
            "contents": contents,
            "tokenizer": tokenizer.sha256,
            "seed": seed,
        }
    )


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
