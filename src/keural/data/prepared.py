"""What was prepared: the stores of a stage, the table of its sources, and the fingerprint by which it is found again."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from keural.data.licenses import left_out
from keural.data.loading.corpus import Corpus
from keural.data.loading.mixture import Mixture, mix
from keural.data.source_counts import SourceCounter, SourceRow, check_drops, rows_from_json, warning_of
from keural.data.stage_sources import StageSources, open_stage_sources
from keural.data.tokens.store import TEXTS, TokenStore
from keural.errors import UserError, quoted
from keural.files import CheckedFile, FileHashes, fingerprint, sha256_file, write_atomic
from keural.recipe import OBJECTIVES, DataSpec, Objective
from keural.recipe import VERSION as RECIPE_VERSION
from keural.terminal import say
from keural.tokenizer.load import KeuralTokenizer

HASHES = "file-hashes.json"
"""Checksums of the sources' files, in the root of prepared data."""
PREPARED = "prepared.json"
"""What a directory of prepared data was made from and holds, written last."""
DROPPED = "dropped.jsonl"
"""The first rows that were dropped of each source and reason, to be looked at."""
VERSION = 4
"""Raised when the same sources give other bytes than before."""


class PreparedFile(CheckedFile):
    """`prepared.json`."""

    remedy: ClassVar[str] = "delete the directory that it is in and run the same command again"

    fingerprint: str
    heldout: bool
    table: list[dict[str, Any]]
    """The rows of `Prepared.table`."""
    cleaned: str | None
    """Name of the directory with the cleaned documents, beside this one."""
    contamination: dict[str, dict[str, Any]] | None
    dropped: str | None = None
    """SHA-256 of `dropped.jsonl`; None in what an earlier version has prepared."""
    settings: str | None = None
    """Fingerprint of the settings alone, by which the data is found where its sources are not at hand; None as before."""


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
    made: bool = field(default=False, compare=False)
    """Whether it was not there before."""
    unseen: bool = field(default=False, compare=False)
    """Whether it is taken as it was prepared, without a look at its sources."""

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
    made = PreparedFile.read(directory / PREPARED)
    train, heldout = directory / "train", directory / "heldout" if made.heldout else None
    contamination = made.contamination
    store = TokenStore.open(train, verify="size")
    if heldout is not None:
        TokenStore.open(heldout, verify="size")
    expected = {(source.name, "train"): source for source in spec.sources}
    expected |= {(source.name, "heldout"): source for source in spec.heldout_sources}
    rows = rows_from_json(made.table, directory / PREPARED)
    if unknown := [row.source for row in rows if (row.source, row.split) not in expected]:
        raise UserError(f"{directory}: damaged (the recipe has no source {unknown[0]!r}); delete it and prepare the data again")
    for row in rows:
        check_drops(expected[row.source, row.split], row)  # it may allow less than when the data was prepared
    table = [replace(row, warning=warning_of(expected[row.source, row.split], row)) for row in rows]
    if spec.mixing is None:
        return Prepared(train, heldout, table, data_fingerprint, contamination=contamination)
    weights = {source.name: source.weight or 0.0 for source in spec.sources if not left_out(spec, source)}
    mixture = mix(store, weights, spec.mixing)
    table = [replace(row, mixture=mixture.shares.get(row.source)) if row.split == "train" else row for row in table]
    return Prepared(
        train, heldout, table, fingerprint([data_fingerprint, mixture.fingerprint]), mixture, contamination=contamination
    )


def find_by_settings(
    spec: DataSpec, objective: Objective, tokenizer: KeuralTokenizer, out_root: Path, seed: int
) -> Prepared | None:
    """What was prepared last with these settings, from whatever its sources held then.

    For a command that is not told where the sources are; it must say that it did not look at them.
    """
    wanted = settings_fingerprint(spec, objective, tokenizer, seed)
    found = {path.parent: made for path in out_root.glob(f"*/{PREPARED}") if (made := PreparedFile.read(path)).settings == wanted}
    if not found:
        return None
    directory = max(found, key=lambda path: (path / PREPARED).stat().st_mtime_ns)
    wanted = found[directory].fingerprint
    return replace(open_prepared(directory, spec, wanted), unseen=True) if is_prepared(directory, wanted) else None


def write_dropped(path: Path, counters: Iterable[SourceCounter]) -> str:
    """Write the dropped rows that are kept of each source. Returns the file's SHA-256."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for counter in counters for row in counter.shown()]
    write_atomic(path, "".join(lines).encode("utf-8", "backslashreplace"))
    return sha256_file(path)


def read_dropped(prepared: Prepared) -> list[dict[str, Any]]:
    """The dropped rows that can be looked at: source, split, reason, where, detail, and the beginning of the row.

    Raises `UserError` when the file is gone or not what was written, and for data that an earlier version has prepared.
    """
    directory = prepared.train.parent
    made, path = PreparedFile.read(directory / PREPARED), directory / DROPPED
    if made.dropped is None:
        raise UserError(f"{directory}: an earlier version has prepared it and kept no dropped rows; delete it and prepare it again")
    if not path.is_file() or sha256_file(path) != made.dropped:
        raise UserError(f"{path}: damaged (its checksum differs) or gone; {PreparedFile.remedy}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_heldout_texts(prepared: Prepared, language: str | None = None, sources: Collection[str] = ()) -> list[str]:
    """The held-out documents' texts, shuffled; with `language` only those of that language, with `sources` only of these.

    Raises `UserError` when there are none, or when they are not those that were written.
    """
    texts = []
    if prepared.heldout is not None and TEXTS in (store := TokenStore.open(prepared.heldout, verify="size")).files:
        rows = map(json.loads, store.read_checked(TEXTS).decode("utf-8").rstrip("\n").split("\n"))
        texts = [row["text"] for row in rows if language in (None, row["language"]) and (not sources or row["source"] in sources)]
    if not texts:
        what = f"document in language {language!r}" if language else "document"
        what += f" of {' or '.join(map(quoted, sources))}" if sources else ""
        raise UserError(f"{prepared.train.parent}: no {what} is held out; raise data.heldout_per_mille or add heldout_sources")
    return texts


def data_fingerprint(sources: StageSources, objective: Objective, tokenizer: KeuralTokenizer, out_root: Path, seed: int) -> str:
    """Of settings, contents and tokenizer. Documents are cut only by the stream, so their stores do not depend on the length."""
    spec, hashes, cleaning = sources.spec, FileHashes(out_root / HASHES), None
    if spec.cleaning is not None:
        from keural.data.cleaning.run import cleaning_fingerprint

        cleaning = cleaning_fingerprint(spec.cleaning, sources.heldout_first, sources.data_dir, seed, hashes)
    contents = [source.content(hashes) for source in (*sources.used, *sources.evaluation)]
    hashes.save()
    return fingerprint({**_settings(spec, objective, tokenizer, seed), "cleaning": cleaning, "contents": contents})


def settings_fingerprint(spec: DataSpec, objective: Objective, tokenizer: KeuralTokenizer, seed: int) -> str:
    """Of everything that determines prepared data but the contents of its sources."""
    cleaning = None if spec.cleaning is None else spec.cleaning.model_dump()
    return fingerprint({**_settings(spec, objective, tokenizer, seed), "cleaning": cleaning})


def _settings(spec: DataSpec, objective: Objective, tokenizer: KeuralTokenizer, seed: int) -> dict[str, Any]:
    return {
        "version": [VERSION, RECIPE_VERSION],
        "objective": objective,
        "spec": spec.determining("data"),
        "sections": spec.mixing is not None,
        "sequence_length": None if OBJECTIVES[objective].store == "documents" else spec.sequence_length,
        "tokenizer": tokenizer.sha256,
        "seed": seed,
    }


def is_prepared(directory: Path, wanted: str) -> bool:
    """Whether `directory` holds data of exactly this fingerprint, with all its stores.

    Raises `UserError` when there is something else: only what this package has made is ever replaced.
    """
    if not directory.exists():
        return False
    marker = directory / PREPARED
    made = PreparedFile.find(marker)
    if made is None or made.fingerprint != wanted:
        raise UserError(f"{directory}: is in the way: it holds no data of these settings ({PREPARED}); delete it or move it away")
    stores = ("train", "heldout") if made.heldout else ("train",)
    if missing := [store for store in stores if not (directory / store / "manifest.json").is_file()]:
        say(f"{directory / missing[0]}: is gone or has no manifest.json; the data is prepared again")
        return False
    return True
