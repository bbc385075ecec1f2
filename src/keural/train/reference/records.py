"""Reference values on disk: one record for each preference pair, appended to one file, each with its own checksum.

In: what the values are computed from (`ReferenceIdentity`), the digest of a pair, its two values. Out: the records that are whole.
A record is 32 bytes: the digest of the pair's ids and masks, both values, a checksum of these and of the identity. A process that
is killed leaves at most a part of a record at the end, which is cut off; a record that was damaged, moved from another model's file
or written by half does not match its checksum and is as good as not there. So what is read is always what was computed.

Nothing of a recipe but what changes a value is in the identity or in a pair's digest. Template, length and truncation show in the
ids; learning rate, beta, loss, number of steps, order and number of ranks show nowhere, so values are found again when those
change.
"""

import contextlib
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keural.data.permutation import mixed
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import CheckedFile, cannot_write, flush, lock, write_atomic
from keural.files import fingerprint as fingerprint_of

MANIFEST, RECORDS = "manifest.json", "pairs.bin"
RECORD = np.dtype([("pair", "<u8", (2,)), ("values", "<f4", (2,)), ("checksum", "<u8")])
"""`values` are those of the chosen and of the rejected side."""

Array = NDArray[np.int64]


class ReferenceIdentity(CheckedFile):
    """`manifest.json` of a directory of reference values: what they were computed from, and how."""

    remedy: ClassVar[str] = "delete the directory that it is in and run the same command again"

    weights: str
    """Fingerprint of the weights' files."""
    network: str
    """Fingerprint of the settings that make another network of the same weights."""
    tokenizer: str
    """SHA-256 of `tokenizer.model`."""
    precision: str
    """What the network computes in, and what its weights are stored in."""
    scored: str
    """How tokens add up to an answer's value (`dpo.ld_alpha`)."""

    @property
    def key(self) -> str:
        """By which the values are found: the name of their directory."""
        return fingerprint_of(self.model_dump())[:32]

    def differences(self, other: "ReferenceIdentity") -> str:
        """What differs from the values' identity `other`, in words."""
        names = [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]
        plain = ("precision", "scored")
        said = [f"{getattr(other, name)}, not {getattr(self, name)}" if name in plain else f"other {name}" for name in names]
        return " and ".join(said)


class Records(NamedTuple):
    """What a file holds: the digests ``[n, 2]`` uint64 of pairs, their values ``[n, 2]`` float32, how many records are damaged."""

    pairs: NDArray[np.uint64]
    values: NDArray[np.float32]
    damaged: int


def pair_digests(store: TokenStore) -> NDArray[np.uint64]:
    """For each pair of a store the digest ``[pairs, 2]`` uint64 of its ids and masks; equal pairs have the same."""
    found = np.empty((store.num_records, 2), dtype="<u8")
    for pair in range(store.num_records):
        digest = blake2b(digest_size=16)
        for side in (2 * pair, 2 * pair + 1):
            tokens = store.sequence(side)
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(tokens.astype("<u4", copy=False).tobytes())
            digest.update(store.loss_mask(side).tobytes())
        found[pair] = np.frombuffer(digest.digest(), dtype="<u8")
        if pair % 10_000 == 0:
            store.forget_pages()
    store.forget_pages()
    return found


class RecordFile:
    """The records of one identity in `directory`."""

    def __init__(self, directory: Path, identity: ReferenceIdentity) -> None:
        self.directory, self.identity = directory, identity
        self.path = directory / RECORDS
        self._descriptor: int | None = None

    def read(self) -> Records:
        """All whole records. Raises `UserError` when the directory is another identity's, or cannot be read."""
        known = ReferenceIdentity.find(self.directory / MANIFEST)
        if known is not None and known != self.identity:
            raise UserError(
                f"{self.directory}: holds reference values of another model ({self.identity.differences(known)}); name the "
                "directory of this stage's, or leave reference_path out"
            )
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        records = np.frombuffer(content, dtype=RECORD, count=len(content) // RECORD.itemsize)
        right = records["checksum"] == self._checksums(records)
        return Records(records["pair"][right], records["values"][right], int((~right).sum()))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Allow `append` inside the block; what of the file is no whole record is taken out first.

        Raises `UserError` when another process writes there, or the disk refuses.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # A lock on a file that is never replaced: the records' own may be written anew.
            guard = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(self.directory, error) from error
        try:
            if not lock(guard):
                raise UserError(
                    f"{self.directory}: another process is computing reference values there; wait for it, then run the same "
                    "command again"
                )
            try:
                self._clean()
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            yield
            with contextlib.suppress(OSError):  # the records are written; what a power cut takes is computed again
                flush(self.path)
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            os.close(guard)

    def append(self, pairs: NDArray[np.uint64], values: NDArray[np.float32]) -> None:
        """Add a record for each pair. Raises `UserError` when the disk refuses."""
        assert self._descriptor is not None, "inside of `writing`"
        records = np.zeros(len(pairs), dtype=RECORD)
        records["pair"], records["values"] = pairs, values
        records["checksum"] = self._checksums(records)
        left = memoryview(records.tobytes())
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _clean(self) -> None:
        """Leave nothing in the file but whole records, and a manifest beside it."""
        found = self.read()
        if ReferenceIdentity.find(self.directory / MANIFEST) is None:
            self.identity.write(self.directory / MANIFEST)
        size = self.path.stat().st_size if self.path.exists() else 0
        if found.damaged:
            records = np.zeros(len(found.pairs), dtype=RECORD)
            records["pair"], records["values"] = found.pairs, found.values
            records["checksum"] = self._checksums(records)
            write_atomic(self.path, records.tobytes())
        elif size % RECORD.itemsize:
            os.truncate(self.path, size - size % RECORD.itemsize)

    def _checksums(self, records: NDArray[np.void]) -> NDArray[np.uint64]:
        """Of each record, and of what its values are computed from."""
        words = np.ascontiguousarray(records).view("<u8").reshape(-1, RECORD.itemsize // 8)
        found = np.full(len(records), int(self.identity.key[:16], 16), dtype=np.uint64)
        for column in range(RECORD.itemsize // 8 - 1):
            found = mixed(found ^ words[:, column])
        return found
