"""Items that are made and not read: sets that need no file.

In: the name of a maker, a number and a seed. Out: records as an adapter would give them, and what determines them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keural.data.records import EvaluationItem
from keural.evaluate.tasks.spec import MadeSpec
from keural.evaluate.verifiers import korean, korean_items, korean_text
from keural.files import FileHashes, sha256_file


class MadeItems:
    """A set that is made, where others are opened (`keural.data.sources.Source`)."""

    kind = "evaluation"

    def __init__(self, spec: MadeSpec) -> None:
        self._spec = spec
        self._maker, self._files = MAKERS[spec.by]

    def read_any(self, seed: int) -> Iterator[EvaluationItem]:
        """The items; their seed is the task's own."""
        return self._maker(self._spec.number, self._spec.seed)

    def content(self, hashes: FileHashes) -> list[list[Any]]:
        """What determines the items."""
        return [[self._spec.by, self._spec.number, self._spec.seed, *(sha256_file(file) for file in self._files)]]


def _korean(number: int, seed: int) -> Iterator[EvaluationItem]:
    for place, item in enumerate(korean_items.korean_items(number, seed)):
        kinds = json.dumps([instruction.kind for instruction in item.instructions])
        arguments = json.dumps([dict(instruction.arguments) for instruction in item.instructions], ensure_ascii=False)
        yield EvaluationItem(item.prompt, f"item {place + 1}", fields=(("instructions", kinds), ("arguments", arguments)))


MAKERS: dict[str, tuple[Callable[[int, int], Iterator[EvaluationItem]], Sequence[Path]]] = {
    "ko_instructions": (
        _korean,
        [korean_items.PHRASINGS, *(Path(str(module.__file__)) for module in (korean_items, korean, korean_text))],
    )
}
"""By name: what makes the items, and the files that determine them."""
