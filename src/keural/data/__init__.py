"""The data room: rows of files become records, records become token stores, token stores become the batch of any training step.

The way of a row, one room after another. Imports go down this list only: a room knows those above it.

| room | entry | in | out |
|---|---|---|---|
| `readers/` | `formats.read_rows`, `archives.members`, `hub.hub_rows` | a file, an archive, a data set of a hub | `Row`s |
| `adapters/` | `Adapter`, called on a row | a row's value | a record (`records.py`), or a `Drop` with its reason |
| `filtering/` | `Gatekeeper.reasons`, `Decontaminator.hit_in`, `Splitter.assign` | a record | whether it is used, and its split |
| (`cleaning/`) | `run.clean` | documents of all sources, where a recipe says so | cleaned documents |
| `tokens/` | `Encoder.encode`, `StoreBuilder.write_store` | records that are used | a `TokenStore` on disk |
| `loading/` | `Stream.batch(step)` | a store, a seed, a step | the `Batch` of that step |

The files beside the rooms lead a recipe along that way. Before `filtering/`: `records.py`, `licenses.py` (what is left out) and
`sources.py`, where `open_source` makes a `Source` of settings and a directory: it finds the files and reads the records. After it:

1. `stage_sources.py`: `open_stage_sources` opens all sources of a stage.
2. `prepare.py`: `prepare` takes every record through the rooms and writes the stores; `source_counts.py` counts what became of the
   rows, one `SourceRow` for each source.
3. `prepared.py`: `find_prepared` finds them again, by a fingerprint of all that determines them. `pretokenized.py` opens data that
   has tokens already.
4. `preview/mixture_report.py` tells shares by source and language; `tokenizer_texts.py` gives the texts that a tokenizer is
   trained on.

`permutation.py` is a shuffle without memory, for all who need one.
"""
