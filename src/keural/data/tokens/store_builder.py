"""Builds a token store: records wait on disk in the order of reading, then are written shuffled.

In: encoded records, one by one, source by source. Out: a token store. Memory holds where each record ends and the order of the
records, some 30 bytes each; tokens, masks and texts wait in files, so a corpus may be larger than memory.

For mixing by weight the store keeps its sources apart, as sections that the manifest names; within one the records stand in the
order of a hash of their tokens and the seed, so that its beginning is a random choice that depends on nothing else.
"""

import contextlib
import json
from array import array
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from keural.data.permutation import Permutation, mixed
from keural.data.records import Document, PreferencePair
from keural.data.tokens.encode import Encoded
from keural.data.tokens.store import PAIR_WEIGHTS, TOKEN, WEIGHT, StoreWriter
from keural.recipe import STORES, StoreKind

BLOCK_RECORDS = 1024
"""So many records are written at a time."""


class StoreBuilder:
    """Collects records in files `stem.*`, which vanish when the block ends; with `keep_texts` the store gets documents' texts,
    too, with `sections` its sources stay apart, and with `named` the manifest says which records of conversations and pairs are of
    which source.
    """

    def __init__(self, stem: Path, kind: StoreKind, keep_texts: bool = False, sections: bool = False, named: bool = False) -> None:
        self._stem, self._kind, self._keep_texts = stem, kind, keep_texts
        self._per_record = STORES[kind].sequences_per_record
        self._files: dict[str, BinaryIO] = {}
        self._ends = array("Q", [0])
        self._text_ends = array("Q", [0])
        self._order = array("Q")
        self._sections: dict[str, int] | None = {} if sections else None  # where each source begins
        self._named: list[tuple[str, int]] | None = [] if named and kind != "documents" else None
        self._digests = array("Q")
        self._weights = array("f")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, file in self._files.items():
            with contextlib.suppress(OSError):  # the error that ended the block is the one to report
                file.close()
            self._path(name).unlink(missing_ok=True)

    @property
    def num_records(self) -> int:
        """Records so far (a pair is one)."""
        return (len(self._ends) - 1) // self._per_record

    def add(self, encoded: Encoded, repeat: int, source: str) -> None:
        """Append a record, which the store will have `repeat` times."""
        self._order.extend([self.num_records] * repeat)
        if self._sections is not None:
            assert repeat == 1, "sections are repeated by the stream"
            self._sections.setdefault(source, self.num_records)
            self._digests.append(_digest(encoded))
        if self._named is not None and (not self._named or self._named[-1][0] != source):
            assert repeat == 1, "the order is that of reading"
            self._named.append((source, self.num_records))
        if isinstance(encoded.record, PreferencePair):
            self._weights.append(encoded.record.weight)
        for ids, mask in encoded.sequences:
            self._append("tokens", np.asarray(ids, dtype=TOKEN).tobytes())
            if mask is not None:
                self._append("loss", bytes(mask))
            self._ends.append(self._ends[-1] + len(ids))
        if self._keep_texts and isinstance(encoded.record, Document):
            row = {"text": encoded.record.text, "language": encoded.record.language, "source": source}
            line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
            self._append("texts", line)
            self._text_ends.append(self._text_ends[-1] + len(line))

    def _append(self, name: str, data: bytes) -> None:
        if name not in self._files:
            self._files[name] = self._path(name).open("wb")
        self._files[name].write(data)

    def _path(self, name: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{name}")

    def write_store(self, directory: Path, tokenizer_sha: str, vocab_size: int, meta: dict[str, Any], seed: int) -> None:
        """Write the collected records as a token store; documents are shuffled by `seed`, other kinds are shuffled by the
        stream.
        """
        for file in self._files.values():
            file.flush()
        order = np.array(self._order, dtype=np.int64)
        if self._sections is not None:
            order = self._by_section(seed)
            meta = meta | {"sections": self._section_table(self._sections)}
        elif self._named is not None and len(dict(self._named)) == len(self._named):
            meta = meta | {"sections": self._section_table(dict(self._named))}
        elif self._kind == "documents":
            order = order[Permutation(len(order), seed, len(order)).take(np.arange(len(order)))]
        tokens = np.memmap(self._path("tokens"), dtype=TOKEN, mode="r")
        loss = None if self._kind == "documents" else np.memmap(self._path("loss"), dtype=np.uint8, mode="r")
        with StoreWriter(directory, tokenizer_sha, vocab_size, self._kind, meta) as writer:
            for records in np.array_split(order, 1 + len(order) // BLOCK_RECORDS):
                sequences = [self._per_record * record + side for record in records.tolist() for side in range(self._per_record)]
                spans = [slice(self._ends[sequence], self._ends[sequence + 1]) for sequence in sequences]
                lengths = [span.stop - span.start for span in spans]
                mask = None if loss is None else np.concatenate([loss[span] for span in spans])
                writer.add_many(np.concatenate([tokens[span] for span in spans]), lengths, mask)
            extra = [*self._write_texts(directory / "texts.jsonl", order), *self._write_weights(directory / PAIR_WEIGHTS, order)]
            writer.close(extra=extra)

    def _bounds(self, begins: dict[str, int]) -> list[int]:
        """Where sections begin and end, in records."""
        return [*begins.values(), self.num_records]

    def _by_section(self, seed: int) -> NDArray[np.int64]:
        """The records, section by section, in the order of their digests turned by the seed."""
        bounds = self._bounds(self._sections or {})
        keys = mixed(np.array(self._digests, dtype=np.uint64) ^ np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
        return np.concatenate([first + np.argsort(keys[first:stop], kind="stable") for first, stop in pairwise(bounds)])

    def _section_table(self, begins: dict[str, int]) -> list[dict[str, Any]]:
        bounds = pairwise(self._bounds(begins))
        return [
            {
                "source": source,
                "sequences": self._per_record * (stop - first),
                "tokens": self._ends[self._per_record * stop] - self._ends[self._per_record * first],
            }
            for source, (first, stop) in zip(begins, bounds, strict=True)
        ]

    def _write_texts(self, path: Path, order: NDArray[np.int64]) -> list[str]:
        """Write the documents' texts in the order of the store; the name of the file, if there are any."""
        if "texts" not in self._files:
            return []
        with self._path("texts").open("rb") as texts, path.open("wb") as file:
            for record in order.tolist():
                texts.seek(self._text_ends[record])
                file.write(texts.read(self._text_ends[record + 1] - self._text_ends[record]))
        return [path.name]

    def _write_weights(self, path: Path, order: NDArray[np.int64]) -> list[str]:
        """Write what each pair counts, in the order of the store; the name of the file, if they do not all count the same."""
        weights = np.array(self._weights, dtype=WEIGHT)
        if (weights == 1).all():
            return []
        path.write_bytes(weights[order].tobytes())
        return [path.name]


def _digest(encoded: Encoded) -> int:
    """Eight bytes of a record's content, as a number."""
    digest = blake2b(digest_size=8, person=b"keural-mix")
    for ids, _ in encoded.sequences:
        digest.update(np.asarray(ids, dtype=TOKEN).tobytes())
    return int.from_bytes(digest.digest(), "little")
