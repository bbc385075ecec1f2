"""Published shards as training data, without converting them: any sequence at any time, and a survey of what they hold.

In: a directory of shards (`published_format.py` has their format). Out: single sequences with the places of their documents, the
lost first token of a shard back as BOS. Opening checks the three files of each shard against each other and looks into some of
them; what is wrong inside another one is refused when it is read.
"""

import mmap
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keural.data.tokens.published_format import BODY, TOKEN, Counts, PublishedShard, find_shards, layout, open_shard
from keural.errors import UserError
from keural.files import fingerprint
from keural.tokenizer.model_file import BOS_ID

FULL_SURVEY_SEQUENCES = 10_000
"""Sets up to this size are surveyed whole; of larger ones so many sequences, evenly spread."""
SAMPLED = 8
"""So many sequences of each shard are part of the fingerprint."""


@dataclass(frozen=True)
class Survey:
    """What the looked-at sequences hold, and how many there are in all."""

    counts: Counts
    looked_at: int
    sequences: int

    @property
    def complete(self) -> bool:
        """Whether every sequence was looked at."""
        return self.looked_at == self.sequences

    def line(self) -> str:
        """What of the positions is documents, padding, cut and lost, in one line."""
        found, basis = self.counts, "" if self.complete else f" (from {self.looked_at:,} sequences, evenly spread)"
        cut = (found.cut_long + found.cut_last) / found.sequences
        return (
            f"{found.shards} published shards, {self.sequences:,} sequences{basis}: {found.tokens / found.positions:.2%} of the "
            f"positions are documents, {found.padding / found.positions:.2%} padding and {found.stray / found.positions:.3%} stray "
            f"marks, not trained; {cut:.1%} of the sequences end in a document that was cut; {found.lost} lost first tokens are "
            "given back as BOS"
        )


class PublishedShards:
    """All shards of a directory, memory-mapped; sequences are numbered through. `vocab_size` is that of the tokenizer in use."""

    kind = "documents"

    def __init__(self, source: Path, vocab_size: int) -> None:
        self.directory, self.vocab_size = source, vocab_size
        self._shards = [open_shard(path) for path in find_shards(source)]
        self.length = self._shards[0].tokens.shape[1]
        for shard in self._shards:
            if shard.tokens.shape[1] != self.length:
                raise UserError(
                    f"{shard.path}: has sequences of {shard.tokens.shape[1]} tokens, {self._shards[0].path.name} of "
                    f"{self.length}; put them into different directories"
                )
            _mapping(shard).madvise(mmap.MADV_RANDOM)
        self._firsts = np.cumsum([0, *(len(shard.tokens) for shard in self._shards)])
        self.num_sequences = int(self._firsts[-1])

    def read(self, number: int, counts: Counts | None = None) -> tuple[NDArray[np.uint32], NDArray[np.bool_], NDArray[np.bool_]]:
        """A sequence, where its documents are, and where each starts, all ``[length]``; adds to `counts`.

        Raises `UserError` as `layout` does.
        """
        index = int(np.searchsorted(self._firsts, number, side="right")) - 1
        shard, local = self._shards[index], number - int(self._firsts[index])
        begin = (BODY + local * self.length * TOKEN.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        _mapping(shard).madvise(mmap.MADV_WILLNEED, begin, self.length * TOKEN.itemsize)  # its pages in one request
        row = np.array(shard.tokens[local : local + 1])
        if local == 0 and shard.first_lost:
            row[0, 0] = BOS_ID
        non_padding, starts = layout(row, f"{shard.path}: sequence", local, self.vocab_size, counts or Counts())
        return row[0], non_padding[0], starts[0]

    def survey(self) -> Survey:
        """Look into the shards: whole if they are small, else into sequences that are evenly spread."""
        looked_at = min(self.num_sequences, FULL_SURVEY_SEQUENCES)
        counts = Counts(shards=len(self._shards), lost=sum(shard.first_lost for shard in self._shards))
        counts.restored = counts.lost
        for number in range(looked_at):
            self.read(number * self.num_sequences // looked_at, counts)
        self.forget_pages()
        return Survey(counts, looked_at, self.num_sequences)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes and some sequences of every shard: what 258 GB can be told apart by without reading them."""
        found: list[Any] = [self.length]
        for shard in self._shards:
            size = len(shard.tokens)
            picked = np.unique(np.arange(SAMPLED) * (size - 1) // (SAMPLED - 1))
            content = blake2b(shard.tokens[picked].tobytes(), digest_size=16).hexdigest()
            found.append([shard.path.name, size, shard.first_lost, content])
        self.forget_pages()
        return fingerprint(found)

    def forget_pages(self) -> None:
        """Take the pages that were read out of this process's memory."""
        for shard in self._shards:
            _mapping(shard).madvise(mmap.MADV_DONTNEED)


def _mapping(shard: PublishedShard) -> mmap.mmap:
    found: mmap.mmap = shard.tokens._mmap  # type: ignore[attr-defined]
    return found
