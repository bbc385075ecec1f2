"""Token ids of text batches, kept on disk while a store is made: encoding that was killed goes on where it was.

In: a batch of texts and a way to encode it. Out: its ids, read back when they are there. A file is named by the digest of the texts
and ends with the digest of its own bytes, so it is either the right one or made again.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keural.files import write_atomic

Ids = NDArray[np.int32]
DIGEST_BYTES = 16


class EncodingCache:
    """Files in `directory`, one for each batch, made with the tokenizer of this SHA-256."""

    def __init__(self, directory: Path, tokenizer_sha: str) -> None:
        self._directory, self._tokenizer_sha = directory, tokenizer_sha

    def encode(self, texts: Sequence[str], encode: Callable[[Sequence[str]], list[Ids]]) -> list[Ids]:
        """The ids of each text: what `encode` gives, now or when these texts came before."""
        path = self._directory / f"{self._digest_of(texts)}.ids"
        ids = _read(path)
        if ids is None:
            ids = encode(texts)
            _write(path, ids)
        return ids

    def _digest_of(self, texts: Sequence[str]) -> str:
        digest = blake2b(self._tokenizer_sha.encode(), digest_size=DIGEST_BYTES)
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()


def _write(path: Path, ids: list[Ids]) -> None:
    """Number of texts, their lengths, all ids (each 4 bytes), and the digest of these."""
    lengths = np.array([len(ids), *map(len, ids)], dtype="<u4")
    content = b"".join([lengths.tobytes(), *(each.astype("<i4").tobytes() for each in ids)])
    write_atomic(path, content + blake2b(content, digest_size=DIGEST_BYTES).digest())


def _read(path: Path) -> list[Ids] | None:
    """The ids in a file; None when it is not there or damaged."""
    try:
        file = path.read_bytes()
    except OSError:
        return None
    content = file[:-DIGEST_BYTES]
    if len(content) < 4 or blake2b(content, digest_size=DIGEST_BYTES).digest() != file[-DIGEST_BYTES:]:
        return None
    numbers = np.frombuffer(content, dtype="<i4")
    count = int(numbers[0])
    return np.split(numbers[1 + count :], np.cumsum(numbers[1 : 1 + count])[:-1]) if count else []
