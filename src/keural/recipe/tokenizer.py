"""Which tokenizer: trained or loaded."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from keural.limits import LARGEST_SIZE
from keural.recipe.base import Spec
from keural.recipe.data import GATE_SETTINGS, SourceSpec

RESERVED = re.compile("[0-9\u2581<>|\ud800-\udfff]")
"""Digits are cut one by one, the rest are space mark, marks of control pieces, and no characters."""


class TokenizerSpec(Spec):
    """Which tokenizer: one to train from `sources`, or one to load from `path`."""

    kind: Literal["lossless", "published"] = "lossless"
    """`lossless` gives back every text exactly; `published` normalises as the published tokenizer does (NFKC, spaces)."""
    path: str | None = None
    """A SentencePiece model file or tokenizer directory to load instead of training; relative to the data directory."""
    vocab_size: int = Field(131_072, gt=260, le=10_000_000)
    """SentencePiece pieces; the two ChatML markers come after them."""
    character_coverage: float = Field(0.9995, gt=0, le=1)
    """Share of the characters of the texts that get a piece of their own; the others are spelt in bytes."""
    split_digits: bool = True
    """Cut numbers into single digits."""
    pieces: list[Annotated[str, Field(pattern=r"^\S{1,16}$")]] = Field(default_factory=list, max_length=1_000)
    """Texts that are pieces of their own wherever they stand, and parts of no other piece: number words, say, that are cut alike
    in every surrounding. Only of a `lossless` tokenizer that is trained.
    """
    max_bytes: int = Field(100_000_000, gt=0, le=LARGEST_SIZE)
    """Train on at most this many bytes of text, spread evenly over the sources' documents."""
    sources: list[SourceSpec] = Field(default_factory=list)
    """Texts to train on."""

    @model_validator(mode="after")
    def _trained_or_loaded(self) -> Self:
        if bool(self.path) == bool(self.sources):
            raise ValueError("give either path (load a tokenizer) or sources (train one)")
        if self.pieces and (self.path or self.kind != "lossless"):
            raise ValueError("pieces: only a lossless tokenizer that is trained takes them")
        if len(set(self.pieces)) < len(self.pieces):
            raise ValueError("pieces: one is given twice")
        if odd := [piece for piece in self.pieces if RESERVED.search(piece)]:
            raise ValueError(f"pieces: {odd[0]!r} has a character that the tokenizer keeps for itself (digits, ▁, <, >, |)")
        if any(source.weight for source in self.sources):
            raise ValueError("sources: weight is for a stage's sources; a tokenizer's have repeat and limit")
        if any(source.text_kind for source in self.sources):
            raise ValueError("sources: text_kind is for data.cleaning; a tokenizer's sources are read as they are")
        for source in self.sources:
            if given := [name for name in GATE_SETTINGS if name in source.model_fields_set]:
                raise ValueError(
                    f"sources: {given[0]} of {source.name!r} is for a stage's sources; a tokenizer's are read as they are"
                )
        return self
