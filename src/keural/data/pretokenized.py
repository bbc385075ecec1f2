"""Data that is tokenised already, as a stage trains on it: a token store, several with weights, or published shards.

In: a `DataSpec` without sources, the data directory and the tokenizer. Out: `Prepared`, everything checked, nothing written.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keural.data.loading.corpus import Corpus
from keural.data.loading.mixture import Mixture, mix
from keural.data.loading.stream import check_store
from keural.data.prepared import Prepared
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint
from keural.recipe import DataSpec, Objective
from keural.tokenizer.load import KeuralTokenizer


def check_ready(spec: DataSpec, data_dir: Path | None) -> None:
    """Refuse paths that hold no finished store or no shards, before a tokenizer is there. Raises `UserError`."""
    for key, path in _named(spec, data_dir):
        if not path.is_dir():
            raise UserError(f"{key}: no such directory: {path}; check data=DIR and the path")
        if key != "data.shards" and not (path / "manifest.json").is_file():
            raise UserError(
                f"{key}: {path} is no finished token store (it has no manifest.json); give the directory that "
                "keural data prepare or keural data import has written"
            )


def ready(spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, plans: Path) -> Prepared:
    """The data as it is; plans of packed rows go to `plans`.

    Raises `UserError` when it is damaged, made with another tokenizer or vocabulary, of a kind that the objective does not train
    on, holds sequences that do not fit, or cannot be mixed by the weights.
    """
    check_ready(spec, data_dir)
    paths = tuple(path for _, path in _named(spec, data_dir))
    names = tuple(store.name for store in spec.stores)
    opened = Corpus(paths, names, bool(spec.shards)).open(tokenizer.sha256, tokenizer.vocab_size, "size")
    check_store(opened, objective, spec.sequence_length)
    mixture = _mixture(spec, opened)
    corpus = Corpus(paths, names, bool(spec.shards), mixture, plans)
    heldout = paths[0].with_name("heldout")
    has_heldout = spec.store is not None and _within(spec, data_dir) and (heldout / "manifest.json").is_file()
    data_fingerprint = fingerprint([opened.fingerprint, mixture.fingerprint if mixture else None])
    table = _table(spec, opened, paths, mixture)
    return Prepared(paths[0], heldout if has_heldout else None, table, data_fingerprint, mixture, corpus)


def _named(spec: DataSpec, data_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """Each directory with the key that names it; of a prepared directory its `train`."""
    base = data_dir or Path()
    if spec.shards:
        yield "data.shards", base / Path(spec.shards).expanduser()
    if spec.store:
        path = base / Path(spec.store).expanduser()
        yield "data.store", path / "train" if _within(spec, data_dir) else path
    for store in spec.stores:
        yield f"data.stores: {store.name!r}", base / Path(store.path).expanduser()


def _within(spec: DataSpec, data_dir: Path | None) -> bool:
    """Whether `data.store` is a prepared directory, with the store inside."""
    return ((data_dir or Path()) / Path(str(spec.store)).expanduser() / "train" / "manifest.json").is_file()


def _mixture(spec: DataSpec, opened: TokenStore | PublishedShards) -> Mixture | None:
    if spec.mixing is None or isinstance(opened, PublishedShards):
        return None
    return mix(opened, {store.name: store.weight or 0.0 for store in spec.stores}, spec.mixing)


def _table(
    spec: DataSpec, opened: TokenStore | PublishedShards, paths: tuple[Path, ...], mixture: Mixture | None
) -> list[dict[str, Any]]:
    """One row for each of several stores, the rows of the sources of a single one where it keeps them, or one of the shards."""
    if isinstance(opened, PublishedShards):
        survey = opened.survey()
        tokens = round(survey.counts.tokens / survey.looked_at * survey.sequences)
        return [_row(paths[0].name, "published", survey.sequences, tokens) | {"survey": survey.line()}]
    shares = mixture.rows() if mixture else {}
    if not spec.stores:
        return _sources(opened, paths[0])
    rows = []
    for given, (first, stop) in zip(spec.stores, opened.sections.values(), strict=True):
        tokens = opened.extent(stop - 1)[1] - opened.extent(first)[0]
        row = _row(given.name, "store", (stop - first) // opened.sequences_per_record, tokens) | {"language": given.language}
        rows.append(row | ({"mixture": shares[given.name]} if mixture else {}))
    return rows


def _sources(store: TokenStore, path: Path) -> list[dict[str, Any]]:
    """The table that a store of ours was made with; of an imported one a row of what it holds."""
    rows = store.manifest.get("sources") or [{}]
    if all("kept" in row for row in rows):
        return [dict(row) for row in rows]
    row = _row(rows[0].get("source", path.name), "store", store.num_records, store.num_tokens)
    return [row | {"license": rows[0].get("license")}]


def _row(name: str, adapter: str, records: int, tokens: int) -> dict[str, Any]:
    """A row of the table (see `Prepared`) of data that nothing was dropped from."""
    return {
        "source": name,
        "adapter": adapter,
        "language": None,
        "license": None,
        "flags": [],
        "left_out": None,
        "split": "train",
        "rows": records,
        "kept": records,
        "heldout": 0,
        "tokens": tokens,
        "repeat": 1,
        "shortened": 0,
        "drops": {},
        "first_drop": {},
        "noted": {},
        "length_ratio": None,
        "warning": None,
    }
