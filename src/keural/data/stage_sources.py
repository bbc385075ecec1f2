"""The sources of a stage, opened: those it trains on, those that are held out whole, and the evaluation sets to look for.

In: a `DataSpec` and the data directory. Out: `StageSources`, made once and handed to everything that reads, counts or hashes them.
A source that the recipe leaves out (`data.licenses`, `data.benchmarks`) is not even looked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keural.data.adapters import adapter_of
from keural.data.filtering.decontamination import open_evaluation
from keural.data.filtering.gates import check_gates
from keural.data.licenses import left_out
from keural.data.sources import Source, open_sources
from keural.errors import UserError, for_all
from keural.recipe import DataSpec, SourceSpec


@dataclass(frozen=True)
class StageSources:
    """What a stage reads; each tuple is in the order of the recipe."""

    spec: DataSpec
    train: tuple[Source, ...]
    heldout: tuple[Source, ...]
    evaluation: tuple[Source, ...]
    data_dir: Path | None

    @property
    def used(self) -> tuple[Source, ...]:
        """All whose records the stores hold."""
        return (*self.train, *self.heldout)

    @property
    def heldout_first(self) -> tuple[Source, ...]:
        """The same in the order of reading: what is held out comes first, so that no other source can train on it."""
        return (*self.heldout, *self.train)


def open_stage_sources(spec: DataSpec, data_dir: Path | None) -> StageSources:
    """The sources that the recipe does not leave out.

    Raises `UserError` when none is left to train on, and for a source that cannot be read or has settings without effect.
    """
    for_all([*spec.sources, *spec.heldout_sources], adapter_of)
    train, heldout = _used(spec, spec.sources), _used(spec, spec.heldout_sources)
    if spec.sources and not train:
        reasons = ", ".join(f"{source.name} ({left_out(spec, source)})" for source in spec.sources)
        raise UserError(f"no source is left to train on: data.licenses and data.benchmarks leave out {reasons}")
    parts: list[Callable[[], list[Source]]] = [
        lambda: open_sources(train, data_dir),
        lambda: open_sources(heldout, data_dir),
        lambda: open_evaluation(spec.decontaminate, data_dir),
    ]
    opened = for_all(parts, lambda part: tuple(part()))
    for_all((*opened[0], *opened[1]), check_gates)
    return StageSources(spec, opened[0], opened[1], opened[2], data_dir)


def _used(spec: DataSpec, sources: list[SourceSpec]) -> list[SourceSpec]:
    return [source for source in sources if left_out(spec, source) is None]
