"""The loss of every held-out conversation, as a stage found it and as it left it.

In: what an evaluation found of a store's conversations. Out: `heldout-before.json`, measured once before the first step, and
`heldout-after.json`, measured after the last one: from both is told what the stage changed, source by source, on the same
conversations.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from keural.data.loading.stream import Stream
from keural.files import CheckedFile
from keural.files import fingerprint as fingerprint_of
from keural.train.stage.heldout import sources_of
from keural.train.stage.job import StageJob

BEFORE, AFTER = "heldout-before.json", "heldout-after.json"


class ItemLosses(CheckedFile):
    """The losses of a store's conversations, in its order."""

    fingerprint: str
    """Of the stage and the store."""
    losses: list[float]
    """Sum over the labels of each, in nats."""
    labels: list[int]
    sources: dict[str, list[int]]
    """Of each source the first of its conversations, and the one behind its last; empty where there are not several."""
    languages: dict[str, str]
    """Of those sources whose language is known."""

    @classmethod
    def of(cls, items: NDArray[np.float64], job: StageJob, stream: Stream) -> Self:
        """Of what `evaluate` found of the conversations of `stream`."""
        losses, labels = items
        sources = sources_of(stream)
        names, stops, languages = (sources.names, sources.stops.tolist(), sources.languages) if sources else ((), [], ())
        return cls(
            fingerprint=_fingerprint(job, stream),
            losses=losses.tolist(),
            labels=labels.astype(int).tolist(),
            sources={name: [first, stop] for name, first, stop in zip(names, [0, *stops], stops, strict=False)},
            languages={name: language for name, language in zip(names, languages, strict=True) if language},
        )

    @classmethod
    def are_known(cls, path: Path, job: StageJob, stream: Stream) -> bool:
        """Whether `path` has them of this stage and store. Raises `UserError` when the file is damaged."""
        known = cls.find(path)
        return known is not None and known.fingerprint == _fingerprint(job, stream)

    def groups(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Which conversations are all, those of each source (`source/NAME`) and those of each language (`language/ko`)."""
        yield "all", np.ones(len(self.losses), dtype=bool)
        of_source = {name: np.zeros(len(self.losses), dtype=bool) for name in self.sources}
        for name, (first, stop) in self.sources.items():
            of_source[name][first:stop] = True
            yield f"source/{name}", of_source[name]
        for language in sorted(set(self.languages.values())):
            named = [of_source[name] for name, found in self.languages.items() if found == language]
            yield f"language/{language}", np.logical_or.reduce(named)


def _fingerprint(job: StageJob, stream: Stream) -> str:
    return fingerprint_of([job.fingerprint, stream.fingerprint])
