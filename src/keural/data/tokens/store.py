"""The token store: tokenised sequences on disk, memory-mapped, checked when opened.

The layout is datatrove's, so that other trainers can read it. Per shard: `00000.ds` (tokens, little-endian uint32, one after
the other), `00000.ds.index` (for each sequence where it ends, in tokens, uint64), `00000.ds.loss` (one byte per token, 1 =
trained; conversations and pairs only) and `00000.ds.metadata` (tokenizer and count, three lines of text). Our `manifest.json`
is written last and holds counts, size and SHA-256 of every file, the tokenizer's SHA-256 and the table of sources: a store
without it is unfinished and is refused.

In a store of kind "pairs" sequence 2k is the chosen and 2k+1 the rejected side of pair k. Where pairs count differently in the loss
`pair_weights.f4` holds a little-endian float32 for each; the manifest's version then says so, for a reader that does not know them
would train something else.

In a store of kind "answers" sequence 2k is labelled answer k with its prompt and 2k+1 its prompt with the answer to another one,
and `labels.u1` has a byte for each answer: 1 is a good one, 0 a bad one.
"""

import contextlib
import copy
import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keural.errors import UserError
from keural.files import CHECKSUM, fingerprint, read_object, sha256_file, write_json
from keural.recipe import STORES, StoreKind

Verify = Literal["auto", "size", "full"]
FORMAT = "keural-token-store"
VERSION = 2
"""2: the manifest states its own checksum."""
WEIGHTED_VERSION = 3
"""Of stores of pairs that have weights; all others are of `VERSION`."""
PAIR_WEIGHTS = "pair_weights.f4"
WEIGHT = np.dtype("<f4")
LABELS = "labels.u1"
TEXTS = "texts.jsonl"
"""The documents' texts, in a store that holds them out."""
SHARD_TOKENS = 1 << 28
"""A shard is closed when it holds at least so many tokens (1 GiB)."""
FULL_CHECK_BYTES = 1_000_000_000
"""Stores up to this size are checked byte by byte whenever they are opened."""
TOKEN = np.dtype("<u4")
END = np.dtype("<u8")


Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]*$")]
"""Of a file beside the manifest."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: Count
    sha256: str


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name
    tokens: Count
    sequences: Count
    trained: Count
    longest: Count


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    source: str
    sequences: Count
    tokens: Count = 0


class _Manifest(BaseModel):
    """What is read of a `manifest.json`; other keys are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    kind: StoreKind
    num_sequences: Count
    num_tokens: Count
    longest: Count
    vocab_size: Count
    tokenizer_sha256: str
    fingerprint: str
    shards: list[_Shard]
    files: dict[Name, _Entry]
    sections: list[_Section] = []
    sources: list[dict[str, Any]] = []


class _File:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


class StoreWriter:
    """Writes a token store into an empty directory, sequence by sequence; a context manager that closes when the block ends well.

    `meta` is put into the manifest as it is (sources, licences, settings). Use it inside `keural.files.atomic_directory`.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer_sha: str,
        vocab_size: int,
        kind: StoreKind,
        meta: dict[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.kind, self.vocab_size = directory, kind, vocab_size
        self.tokenizer_sha, self.meta, self.shard_tokens = tokenizer_sha, meta or {}, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._files: dict[str, dict[str, Any]] = {}
        self._open: dict[str, _File] = {}
        self._tokens = self._sequences = self._trained = self._longest = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and not self._closed:
            self.close()
        for file in self._open.values():
            with contextlib.suppress(OSError):  # the error that ended the block is the one to report
                file.close()

    def add(
        self, tokens: Sequence[int] | NDArray[np.integer], loss_mask: Sequence[int] | NDArray[np.integer] | None = None
    ) -> None:
        """Append one sequence of at least one token; `loss_mask` (0 or 1 per token) exactly where the kind has one."""
        self.add_many(tokens, [len(tokens)], loss_mask)

    def add_many(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        lengths: Sequence[int] | NDArray[np.integer],
        loss_mask: Sequence[int] | NDArray[np.integer] | None = None,
    ) -> None:
        """Append the sequences of `lengths` that stand one after another in `tokens`; the same bytes as one `add` for each."""
        ids, ends = np.asarray(tokens, dtype=TOKEN), np.cumsum(np.asarray(lengths, dtype=np.int64))
        assert ids.ndim == 1
        assert ends.size == 0 or min(lengths) > 0, "a sequence needs at least one token"
        assert ids.size == (int(ends[-1]) if ends.size else 0), "the lengths are those of the tokens"
        assert ids.size == 0 or int(ids.max()) < self.vocab_size, "a token id is outside the vocabulary"
        assert (loss_mask is None) == (self.kind == "documents"), "conversations and pairs have a loss mask, documents have none"
        mask = None if loss_mask is None else np.asarray(loss_mask, dtype=np.uint8)
        assert mask is None or mask.shape == ids.shape
        assert mask is None or mask.size == 0 or mask.max() <= 1, "the loss mask has one 0 or 1 per token"
        first, start = 0, 0
        while first < ends.size:  # one turn per shard that is written to
            room = self.shard_tokens - self._tokens
            last = min(int(np.searchsorted(ends, start + room, side="left")) + 1, ends.size)
            stop = int(ends[last - 1])
            self._write(ids[start:stop], ends[first:last] - start, None if mask is None else mask[start:stop])
            first, start = last, stop

    def _write(self, ids: NDArray[np.uint32], ends: NDArray[np.int64], mask: NDArray[np.uint8] | None) -> None:
        """Append sequences that end at `ends` within `ids` to the open shard."""
        if not self._open:
            self._start_shard()
        self._open["ds"].write(ids.tobytes())
        self._open["ds.index"].write((self._tokens + ends).astype(END).tobytes())
        if mask is not None:
            self._trained += int(mask.sum())
            self._open["ds.loss"].write(mask.tobytes())
        self._longest = max(self._longest, int(np.diff(ends, prepend=0).max()))
        self._sequences += ends.size
        self._tokens += ids.size
        if self._tokens >= self.shard_tokens:
            self._end_shard()

    def _start_shard(self) -> None:
        name = f"{len(self._shards):05d}"
        suffixes = ["ds", "ds.index"] if self.kind == "documents" else ["ds", "ds.index", "ds.loss"]
        self._open = {suffix: _File(self.directory / f"{name}.{suffix}") for suffix in suffixes}

    def _end_shard(self) -> None:
        name = f"{len(self._shards):05d}"
        for file in self._open.values():
            self._files[file.path.name] = file.close()
        metadata = _File(self.directory / f"{name}.ds.metadata")
        metadata.write(f"{self.tokenizer_sha}|{TOKEN.itemsize}\n{self._tokens}\n{self._tokens / 1e6:.2f} M tokens".encode())
        self._files[metadata.path.name] = metadata.close()
        self._shards.append(
            {"name": name, "tokens": self._tokens, "sequences": self._sequences, "trained": self._trained, "longest": self._longest}
        )
        self._open = {}
        self._tokens = self._sequences = self._trained = self._longest = 0

    def close(self, extra: Sequence[str] = ()) -> None:
        """Finish the store: the manifest is written last. `extra` names further files in the directory that belong to it."""
        if self._open:
            self._end_shard()
        assert self._shards, "a store needs at least one sequence"
        for name in extra:
            path = self.directory / name
            self._files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {
            "format": FORMAT,
            "version": WEIGHTED_VERSION if PAIR_WEIGHTS in extra else VERSION,
            "kind": self.kind,
            "num_sequences": sum(shard["sequences"] for shard in self._shards),
            "num_tokens": sum(shard["tokens"] for shard in self._shards),
            "num_trained": sum(shard["trained"] for shard in self._shards) if self.kind != "documents" else None,
            "longest": max(shard["longest"] for shard in self._shards),
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": self.tokenizer_sha,
            "shards": self._shards,
            "files": self._files,
            **self.meta,
        }
        manifest["fingerprint"] = content_fingerprint(manifest)
        manifest[CHECKSUM] = fingerprint(manifest)
        write_json(self.directory / "manifest.json", manifest)
        self._closed = True


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """The fingerprint of what the store holds, whatever its sources were called."""
    sums = {name: file["sha256"] for name, file in manifest["files"].items()}
    return fingerprint([manifest["kind"], manifest["vocab_size"], manifest["tokenizer_sha256"], sums])


class TokenStore:
    """A finished store, memory-mapped. Token positions and sequence numbers run on over its shards."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.kind: StoreKind = manifest["kind"]
        self.num_sequences: int = manifest["num_sequences"]
        self.num_tokens: int = manifest["num_tokens"]
        self.longest: int = manifest["longest"]
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_sha: str = manifest["tokenizer_sha256"]
        self.fingerprint: str = manifest["fingerprint"]
        names = [shard["name"] for shard in manifest["shards"]]
        self._tokens = [np.memmap(directory / f"{name}.ds", dtype=TOKEN, mode="r") for name in names]
        self._ends = [np.memmap(directory / f"{name}.ds.index", dtype=END, mode="r") for name in names]
        self._loss = [
            np.memmap(directory / f"{name}.ds.loss", dtype=np.uint8, mode="r") for name in names if self.kind != "documents"
        ]
        self.pair_weights = _read_weights(directory, manifest)
        """What each pair counts in the loss ``[num_records]``, float32; None where all count the same, and for other kinds."""
        self.labels = _read_labels(directory, manifest)
        """Whether each labelled answer is a good one ``[num_records]``, bool; None for other kinds."""
        self._count()

    @classmethod
    def open(cls, directory: Path, tokenizer_sha: str | None = None, verify: Verify = "auto") -> "TokenStore":
        """Open a store and check it: sizes always, checksums and ids with "full" ("auto": below 1 GB).

        Raises `UserError` when it is unfinished, truncated, changed, or made with a tokenizer other than `tokenizer_sha`.
        """
        manifest = _read_manifest(directory)
        if tokenizer_sha is not None and manifest["tokenizer_sha256"] != tokenizer_sha:
            raise UserError(
                f"{directory}: made with another tokenizer (sha256 {manifest['tokenizer_sha256'][:12]}, "
                f"this one is {tokenizer_sha[:12]}); prepare the data again with this tokenizer"
            )
        _check_sizes(directory, manifest)
        size = sum(file["bytes"] for file in manifest["files"].values())
        full = verify == "full" or (verify == "auto" and size <= FULL_CHECK_BYTES)
        if full:
            _check_sums(directory, manifest)
        store = cls._of(directory, manifest)
        if full:
            store._check_ids()
        store._advise(mmap.MADV_RANDOM)  # a window is 16 kB; the system would read eight times as much ahead of every page
        return store

    @classmethod
    def join(cls, stores: "dict[str, TokenStore]") -> "TokenStore":
        """Stores of one kind and tokenizer as one, without touching their files: each is a section with the name it is given."""
        parts = list(stores.values())
        joined = copy.copy(parts[0])
        assert all((part.kind, part.tokenizer_sha) == (joined.kind, joined.tokenizer_sha) for part in parts)
        joined.num_sequences, joined.num_tokens = sum(p.num_sequences for p in parts), sum(p.num_tokens for p in parts)
        joined.longest, joined.vocab_size = max(p.longest for p in parts), max(p.vocab_size for p in parts)
        joined.fingerprint = fingerprint([part.fingerprint for part in parts])
        joined.manifest = {"sections": [{"source": name, "sequences": part.num_sequences} for name, part in stores.items()]}
        joined._tokens, joined._ends, joined._loss = (
            [array for part in parts for array in getattr(part, name)] for name in ("_tokens", "_ends", "_loss")
        )
        if any(part.pair_weights is not None for part in parts):
            weights = [np.ones(p.num_records, dtype=WEIGHT) if p.pair_weights is None else p.pair_weights for p in parts]
            joined.pair_weights = np.concatenate(weights)
        if joined.labels is not None:
            joined.labels = np.concatenate([part.labels for part in parts if part.labels is not None])
        joined._count()
        joined.__dict__.pop("text_bytes", None)
        return joined

    def _count(self) -> None:
        self._first_token = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        self._first_sequence = np.cumsum([0, *(len(ends) for ends in self._ends)])

    @classmethod
    def _of(cls, directory: Path, manifest: dict[str, Any]) -> "TokenStore":
        """The store, if the manifest's counts are those of its files."""
        path = directory / "manifest.json"
        try:
            store = cls(directory, manifest)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); prepare the data again") from error
        tokens, sequences = sum(len(part) for part in store._tokens), sum(len(part) for part in store._ends)
        if (tokens, sequences) != (store.num_tokens, store.num_sequences):
            raise UserError(
                f"{path}: says {store.num_sequences} sequences of {store.num_tokens} tokens, the files hold "
                f"{sequences} of {tokens}; prepare the data again"
            )
        return store

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size (`bytes`) and `sha256` of every file of the store, by name."""
        return dict(self.manifest["files"])

    def read_checked(self, name: str) -> bytes:
        """The content of one file of the store. Raises `UserError` when it is not what was written."""
        path, expected = self.directory / name, self.files[name]["sha256"]
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise _differs(path, self.directory)
        return content

    @cached_property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the documents' texts; None where the store has none. Raises `UserError` as `read_checked` does."""
        if TEXTS not in self.manifest.get("files", {}):
            return None
        rows = map(json.loads, self.read_checked(TEXTS).rstrip(b"\n").split(b"\n"))
        return sum(len(row["text"].encode("utf-8", "surrogatepass")) for row in rows)

    def _check_ids(self) -> None:
        for shard, tokens in zip(self.manifest["shards"], self._tokens, strict=True):
            if int(tokens.max()) >= self.vocab_size:
                raise UserError(
                    f"{self.directory / shard['name']}.ds: token id {int(tokens.max())} is outside the vocabulary of "
                    f"{self.vocab_size}; prepare the data again"
                )

    def sequence(self, index: int) -> NDArray[np.uint32]:
        """The tokens of sequence `index`."""
        shard, start, stop = self._place(index)
        return self._tokens[shard][start:stop]

    def loss_mask(self, index: int) -> NDArray[np.uint8]:
        """Per token of sequence `index`, 1 where it is trained; all ones for documents."""
        shard, start, stop = self._place(index)
        return self._loss[shard][start:stop] if self._loss else np.ones(stop - start, dtype=np.uint8)

    @property
    def sections(self) -> dict[str, tuple[int, int]]:
        """The sequences ``first..stop-1`` of each source, where the store keeps sources apart (`StoreBuilder`); of joined stores,
        of each store.
        """
        counts = {section["source"]: section["sequences"] for section in self.manifest.get("sections", ())}
        stops = np.cumsum(list(counts.values()), dtype=np.int64).tolist()
        return {name: (stop - count, stop) for (name, count), stop in zip(counts.items(), stops, strict=True) if count}

    def extent(self, index: int) -> tuple[int, int]:
        """Flat positions at which sequence `index` starts and ends."""
        shard, start, stop = self._place(index)
        base = int(self._first_token[shard])
        return base + start, base + stop

    def sequence_at(self, position: int) -> int:
        """The sequence that the token at a flat position belongs to."""
        return self.spans(position, position + 1)[0]

    @property
    def sequences_per_record(self) -> int:
        """Sequences that belong together: of pairs the two sides, of labelled answers that and another one to the same prompt."""
        return STORES[self.kind].sequences_per_record

    @property
    def num_records(self) -> int:
        """Documents, conversations, pairs or labelled answers."""
        return self.num_sequences // self.sequences_per_record

    def _place(self, index: int) -> tuple[int, int, int]:
        """Shard of a sequence, and its start and end there."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} is outside a store of {self.num_sequences}")
        shard = int(np.searchsorted(self._first_sequence, index, side="right")) - 1
        local = index - int(self._first_sequence[shard])
        ends = self._ends[shard]
        return shard, int(ends[local - 1]) if local else 0, int(ends[local])

    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of every sequence ``[num_sequences]``."""
        return np.concatenate(list(self.iter_lengths()))

    def iter_lengths(self) -> Iterator[NDArray[np.int64]]:
        """The same, shard by shard."""
        for ends in self._ends:
            yield np.diff(ends.astype(np.int64), prepend=0)

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """The tokens at flat positions ``start..stop-1``, cut at the end of the store."""
        ranges = self._shard_ranges(start, stop)
        for shard, low, high in ranges:  # these pages, in one request
            begin = low * TOKEN.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            _mapping(self._tokens[shard]).madvise(mmap.MADV_WILLNEED, begin, high * TOKEN.itemsize - begin)
        parts = [self._tokens[shard][low:high] for shard, low, high in ranges]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)

    def forget_pages(self) -> None:
        """Take the pages that were read out of this process's memory (they stay in the system's cache), so that a store of any size
        costs what one batch touches.
        """
        self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        for parts in (self._tokens, self._ends, self._loss):
            for part in parts:
                _mapping(part).madvise(advice)

    def spans(self, start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        """The sequences that overlap flat positions ``start..stop-1``: the first one's number, and where each ends (flat,
        exclusive).
        """
        first, ends = -1, []
        for shard, low, high in self._shard_ranges(start, stop):
            index = self._ends[shard]
            # the key has the index's type, or numpy would convert the whole index
            begin = int(np.searchsorted(index, END.type(low), side="right"))
            end = int(np.searchsorted(index, END.type(high), side="left")) + 1
            ends.append(index[begin:end].astype(np.int64) + self._first_token[shard])
            first = begin + int(self._first_sequence[shard]) if first < 0 else first
        return first, np.concatenate(ends)

    def _shard_ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Flat positions as ranges within shards."""
        stop = min(stop, self.num_tokens)
        if start >= stop:
            return []
        first, last = (int(np.searchsorted(self._first_token, position, side="right")) - 1 for position in (start, stop - 1))
        bases = [(shard, int(self._first_token[shard]), len(self._tokens[shard])) for shard in range(first, last + 1)]
        return [(shard, max(start - base, 0), min(stop - base, size)) for shard, base, size in bases]


def _mapping(array: np.memmap[Any, Any]) -> mmap.mmap:
    found: mmap.mmap = array._mmap  # type: ignore[attr-defined]
    return found


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not path.is_file():
        raise UserError(f"{directory}: no finished token store (manifest.json is missing); prepare the data again")
    manifest = read_object(path)
    if CHECKSUM not in manifest and (manifest.get("format"), manifest.get("version")) == (FORMAT, 1):
        raise UserError(
            f"{path}: of an earlier version of keural, whose manifests have no checksum; prepare or import the data again"
        )
    if manifest.get(CHECKSUM) != fingerprint({name: value for name, value in manifest.items() if name != CHECKSUM}):
        raise UserError(f"{path}: damaged (its checksum differs); delete {directory} and prepare the data again")
    if manifest.get("format") != FORMAT or manifest.get("version") not in (VERSION, WEIGHTED_VERSION):
        raise UserError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r} is not known; prepare the data again"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged (key {key!r}: {first['msg']}); delete {directory} and prepare the data again") from error
    if manifest["fingerprint"] != content_fingerprint(manifest):
        raise UserError(f"{path}: damaged (its fingerprint does not match); delete {directory} and prepare the data again")
    return manifest


def _read_weights(directory: Path, manifest: dict[str, Any]) -> NDArray[np.float32] | None:
    if PAIR_WEIGHTS not in manifest["files"]:
        return None
    weights = np.fromfile(directory / PAIR_WEIGHTS, dtype=WEIGHT)
    if 2 * len(weights) != manifest["num_sequences"] or not (np.isfinite(weights) & (weights > 0)).all():
        raise UserError(f"{directory / PAIR_WEIGHTS}: damaged (it is no weight above 0 for each pair); prepare the data again")
    return weights


def _read_labels(directory: Path, manifest: dict[str, Any]) -> NDArray[np.bool_] | None:
    if manifest["kind"] != "answers":
        return None
    path = directory / LABELS
    labels = np.fromfile(path, dtype=np.uint8) if LABELS in manifest["files"] else np.zeros(0, dtype=np.uint8)
    if 2 * len(labels) != manifest["num_sequences"] or (labels > 1).any():
        raise UserError(f"{path}: damaged (it is no 0 or 1 for each answer); prepare the data again")
    return labels.astype(bool)


def _check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes instead of {expected['bytes']} (truncated or changed)"
            raise UserError(f"{path}: {found}; delete {directory} and prepare the data again")


def _check_sums(directory: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        if sha256_file(directory / name) != expected["sha256"]:
            raise _differs(directory / name, directory)


def _differs(path: Path, store: Path) -> UserError:
    return UserError(f"{path}: checksum differs, the file is damaged; delete {store} and prepare the data again")
