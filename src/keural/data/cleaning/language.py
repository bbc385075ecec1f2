"""Language identification: by script, or by a fastText model that the user has.

In: documents whose source says which language it is. Out: those that are in it. Hangul is written by one language only, so for
Korean the script decides as well as any model; Latin letters say little, and there a model is better.
"""

import re
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from keural.data.cleaning.measures import HANGUL, LATIN, script_share, without_markup

SCRIPTS: dict[str, tuple[re.Pattern[str], float]] = {"ko": (HANGUL, 0.5), "en": (LATIN, 0.8)}
"""By language: its letters, and the least share of them among all letters outside code and markup."""
LABELS = {"ko": ("kor_Hang", "ko"), "en": ("eng_Latn", "en")}
"""What GlotLID and lid.176 call a language."""
THRESHOLDS = {"ko": 0.842, "en": 0.65}
"""Least probability of the language: of FineWeb-2 for Korean, of FineWeb for English."""


class ScriptFilter(BaseFilter):
    """Keeps documents written in the letters of their source's language."""

    name = "language"

    def __init__(self, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """See `BaseFilter.filter`."""
        script, least = SCRIPTS.get(doc.metadata["kind"], (None, 0.0))
        if script is None or script_share(without_markup(doc.text), script) >= least:
            return True
        return False, "language"


class FastTextFilter(BaseFilter):
    """Keeps documents whose language a fastText model (GlotLID, lid.176) finds with enough probability."""

    name = "language"

    def __init__(self, model: Path, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self._path = model
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}  # each process loads its own

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """See `BaseFilter.filter`."""
        kind = doc.metadata["kind"]
        if kind not in LABELS or self.probability(doc.text, kind) >= THRESHOLDS[kind]:
            return True
        return False, "language"

    def probability(self, text: str, language: str) -> float:
        """How probable the model finds `language`."""
        if self._model is None:
            import fasttext  # type: ignore[import-untyped]

            self._model = fasttext.load_model(str(self._path))
        labels, values = self._model.predict(text.replace("\n", " "), k=5)
        names = [f"__label__{name}" for name in LABELS[language]]
        return sum(float(value) for label, value in zip(labels, values, strict=True) if label in names)
