"""Builds a token store: records wait on disk in the order of reading, then are written shuffled.

In: encoded records, one by one, source by source. Out: a token store. Memory holds where each record ends and the order of the
records, some 30 bytes each; tokens, masks and texts wait in files, so a corpus may be larger than memory.

For mixing by weight the store keeps its sources apart, as sections that the manifest names; within one the records stand in the
order of a hash of their tokens and the seed, so that its beginning is a random choice that depends on nothing else.

A labelled answer is written together with its prompt and the answer to another one (`mismatched`).
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
from keural.data.records import Conversation, Document, PreferencePair
from keural.data.tokens.encode import Encoded
from keural.data.tokens.mismatched import Prompts, joined
from keural.data.tokens.store import LABELS, PAIR_WEIGHTS, TEXTS, TOKEN, WEIGHT, StoreWriter
from keural.recipe import STORES, StoreKind

BLOCK_RECORDS = 1024
"""So many records are written at a time."""


class StoreBuilder:
    """Collects records in files `stem.*`, which vanish when the block ends; with `keep_texts` the store gets documents' texts,
    too, with `sections` its sources stay apart, and with `named` the manifest says which records of conversations and pairs are of
    which source. `longest` is the length that a prompt with the answer to another one is cut to.
    """

    def __init__(
        self,
        stem: Path,
        kind: StoreKind,
        keep_texts: bool = False,
        sections: bool = False,
        named: bool = False,
        longest: int | None = None,
    ) -> None:
        self._stem, self._kind, self._keep_texts, self._longest = stem, kind, keep_texts, longest
        self._prompts = Prompts() if kind == "answers" else None
        self._per_record = 1 if self._prompts is not None else STORES[kind].sequences_per_record  # as they wait
        self._files: dict[str, BinaryIO] = {}
        self._ends = array("Q", [0])
        self._text_ends = array("Q", [0])
        self._order = array("Q")
        self._sections: dict[str, int] | None = {} if sections else None  # where each source begins
        self._named: list[tuple[str, int]] | None = [] if named and kind != "documents" else None
        self._digests = array("Q")
        self._weights = array("f")
        self._labels = array("B")

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
        if self._prompts is not None:
            assert isinstance(encoded.record, Conversation)
            assert encoded.record.good is not None
            self._labels.append(encoded.record.good)
            self._prompts.add(*encoded.sequences[0])
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
                spans = self._spans(records)
                lengths = [sum(span.stop - span.start for span in parts) for parts in spans]
                flat = [span for parts in spans for span in parts]
                mask = None if loss is None else np.concatenate([loss[span] for span in flat])
                writer.add_many(np.concatenate([tokens[span] for span in flat]), lengths, mask)
            extra = [*self._write_texts(directory / TEXTS, order), *self._write_weights(directory / PAIR_WEIGHTS, order)]
            writer.close(extra=[*extra, *self._write_labels(directory / LABELS, order)])

    def _spans(self, records: NDArray[np.int64]) -> list[list[slice]]:
        """The sequences of some records, each as the parts of what waits that stand one after another in it."""
        of_record = range(self._per_record)
        sequences = [self._per_record * record + side for record in records.tolist() for side in of_record]
        whole = [[slice(self._ends[sequence], self._ends[sequence + 1])] for sequence in sequences]
        if self._prompts is None:
            return whole
        return [
            found
            for record, own in zip(records.tolist(), whole, strict=True)
            for found in (own, joined(self._prompts, self._ends, record, self._longest))
        ]

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
                "sequences": STORES[self._kind].sequences_per_record * (stop - first),
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

    def _write_labels(self, path: Path, order: NDArray[np.int64]) -> list[str]:
        """Write the labels of answers, in the order of the store; the name of the file, if there are any."""
        if self._kind != "answers":
            return []
        path.write_bytes(np.array(self._labels, dtype=np.uint8)[order].tobytes())
        return [path.name]


def _digest(encoded: Encoded) -> int:
    """Eight bytes of a record's content, as a number."""
    digest = blake2b(digest_size=8, person=b"keural-mix")
    for ids, _ in encoded.sequences:
        digest.update(np.asarray(ids, dtype=TOKEN).tobytes())
    return int.from_bytes(digest.digest(), "little")
