"""Data that is tokenised already, as a stage trains on it: a token store, several with weights, or published shards.

In: a `DataSpec` without sources, the data directory and the tokenizer. Out: `Prepared`, everything checked, nothing written.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from keural.data.loading.corpus import Corpus
from keural.data.loading.mixture import Mixture, mix
from keural.data.loading.stream import check_store
from keural.data.prepared import Prepared
from keural.data.source_counts import SourceRow, rows_from_json
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint
from keural.recipe import DataSpec, Objective
from keural.tokenizer.load import KeuralTokenizer


class _Given(NamedTuple):
    """A directory that a recipe names, and the recipe's key; `prepared`: it is the `train` of a directory with held-out data."""

    key: str
    path: Path
    prepared: bool = False


def check_pretokenized(spec: DataSpec, data_dir: Path | None) -> None:
    """Refuse paths that hold no finished store or no shards, before a tokenizer is there. Raises `UserError`."""
    _given(spec, data_dir)


def open_pretokenized(
    spec: DataSpec, objective: Objective, data_dir: Path | None, tokenizer: KeuralTokenizer, plans: Path
) -> Prepared:
    """The data as it is; plans of packed rows go to `plans`.

    Raises `UserError` when it is damaged, made with another tokenizer or vocabulary, of a kind that the objective does not train
    on, holds sequences that do not fit, or cannot be mixed by the weights.
    """
    given = _given(spec, data_dir)
    paths, names = tuple(each.path for each in given), tuple(store.name for store in spec.stores)
    opened = Corpus(paths, names, bool(spec.shards)).open(tokenizer.sha256, tokenizer.vocab_size, "size")
    check_store(opened, objective, spec.sequence_length)
    mixture = _mixture(spec, opened)
    corpus = Corpus(paths, names, bool(spec.shards), mixture, plans)
    heldout = paths[0].with_name("heldout")
    has_heldout = given[0].prepared and (heldout / "manifest.json").is_file()
    data_fingerprint = fingerprint([opened.fingerprint, mixture.fingerprint if mixture else None])
    table = _table(spec, opened, paths, mixture)
    return Prepared(paths[0], heldout if has_heldout else None, table, data_fingerprint, mixture, corpus)


def _given(spec: DataSpec, data_dir: Path | None) -> list[_Given]:
    """The directories of a recipe. Raises `UserError` for one that is not there or holds no finished store."""
    given = list(_named(spec, data_dir or Path()))
    for key, path, _ in given:
        if not path.is_dir():
            raise UserError(f"{key}: no such directory: {path}; check data=DIR and the path")
        if key != "data.shards" and not (path / "manifest.json").is_file():
            raise UserError(
                f"{key}: {path} is no finished token store (it has no manifest.json); give the directory that "
                "keural data prepare or keural data import has written"
            )
    return given


def _named(spec: DataSpec, base: Path) -> Iterator[_Given]:
    if spec.shards:
        yield _Given("data.shards", base / Path(spec.shards).expanduser())
    if spec.store:
        path = base / Path(spec.store).expanduser()
        prepared = (path / "train" / "manifest.json").is_file()
        yield _Given("data.store", path / "train" if prepared else path, prepared)
    for store in spec.stores:
        yield _Given(f"data.stores: {store.name!r}", base / Path(store.path).expanduser())


def _mixture(spec: DataSpec, opened: TokenStore | PublishedShards) -> Mixture | None:
    if spec.mixing is None or isinstance(opened, PublishedShards):
        return None
    return mix(opened, {store.name: store.weight or 0.0 for store in spec.stores}, spec.mixing)


def _table(
    spec: DataSpec, opened: TokenStore | PublishedShards, paths: tuple[Path, ...], mixture: Mixture | None
) -> list[SourceRow]:
    """One row for each of several stores, the rows of the sources of a single one where it keeps them, or one of the shards."""
    if isinstance(opened, PublishedShards):
        survey = opened.survey()
        tokens = round(survey.counts.tokens / survey.looked_at * survey.sequences)
        return [replace(_row(paths[0].name, "published", survey.sequences, tokens), survey=survey.line())]
    if not spec.stores:
        return _sources(opened, paths[0])
    rows = []
    for given, (first, stop) in zip(spec.stores, opened.sections.values(), strict=True):
        tokens = opened.extent(stop - 1)[1] - opened.extent(first)[0]
        row = _row(given.name, "store", (stop - first) // opened.sequences_per_record, tokens)
        rows.append(replace(row, language=given.language, mixture=mixture.shares[given.name] if mixture else None))
    return rows


def _sources(store: TokenStore, path: Path) -> list[SourceRow]:
    """The table that a store of ours was made with; of an imported one a row of what it holds."""
    manifest = path / "manifest.json"
    if "imported" not in store.manifest and "sources" in store.manifest:
        return rows_from_json(store.manifest["sources"], manifest)
    row = _row(path.name, "store", store.num_records, store.num_tokens).to_json()
    match store.manifest.get("sources"):
        case [{"source": name, "license": license_id}]:
            row |= {"source": name, "license": license_id}
        case None:
            pass
        case _:
            raise UserError(f"{manifest}: damaged (it does not name what was imported); import the data again")
    return [SourceRow.from_json(row, manifest)]


def _row(name: str, adapter: str, records: int, tokens: int) -> SourceRow:
    """A row of data that nothing was dropped from."""
    return SourceRow(source=name, adapter=adapter, rows=records, kept=records, tokens=tokens)
