"""Keys that open the server: a file of them in, a yes or no out.

Only digests are kept, and every one of them is compared in a time that does not depend on the key that is offered.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from keural.errors import UserError
from keural.files import read_text


class Keys:
    """The keys that are let in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def admits(self, offered: bytes) -> bool:
        """Whether this is one of the keys."""
        digest = _digest(offered)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_keys(file: Path) -> Keys:
    """The keys in a file, one a line; empty lines and those that begin with # are none.

    Raises `UserError` when it cannot be read, holds none, or one that cannot stand in a header.
    """
    keys = [line.strip() for line in read_text(file).splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise UserError(f"{file}: holds no key; write one a line, e.g. what `openssl rand -hex 24` prints")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"{file}: a key has blanks or characters that cannot stand in a header; use letters and digits")
    return Keys(keys)


def offered_key(headers: dict[bytes, bytes]) -> bytes | None:
    """The key of a request: `Authorization: Bearer KEY`, or `X-Api-Key: KEY`."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer" and key.strip():
        return key.strip()
    return headers.get(b"x-api-key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
