"""Which side of the held-out line a record is on, and whether it was seen before: both decided by its content alone.

Two digests per record. The exact one finds duplicates. The other, of the normalised text of what is asked (a document's text, a
conversation without its last answer, a pair's prompt), decides about holding out: records that ask the same are on the same
side, in every stage and whatever the seed.
"""

import json
from hashlib import blake2b
from typing import Literal

from keural.data.adapters.base import normalised
from keural.data.records import Conversation, Document, Drop, PreferencePair, Record

Side = Literal["train", "heldout"]


class Splitter:
    """Assigns records to train and held-out; remembers what it has seen (16 bytes per record)."""

    def __init__(self, heldout_per_mille: float) -> None:
        self._threshold = int(heldout_per_mille / 1000 * 2**64)
        self._seen: set[bytes] = set()
        self._heldout: set[bytes] = set()

    def side(self, record: Record, heldout_source: bool = False) -> Side | Drop:
        """The side of a record; a drop when it is a duplicate, or asks what a held-out source asks."""
        exact = _digest_of_parts(_exact(record))
        if exact in self._seen:
            return Drop("duplicate", record.where)
        if not (self._threshold or self._heldout or heldout_source):  # nothing is held out, so what is asked decides nothing
            self._seen.add(exact)
            return "train"
        asked = _digest(_asked(record))
        if heldout_source:
            self._heldout.add(asked)
        elif asked in self._heldout:
            return Drop("held_out", record.where)
        self._seen.add(exact)
        return "heldout" if heldout_source or int.from_bytes(asked[:8], "big") < self._threshold else "train"


def _digest_of_parts(parts: list[str]) -> bytes:
    """Of the parts as they are, each after its length; several times faster than their JSON."""
    digest = blake2b(digest_size=16, person=b"keural-seen")
    for part in parts:
        content = part.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _digest(content: list[str]) -> bytes:
    return blake2b(json.dumps(content, ensure_ascii=False).encode("utf-8"), digest_size=16, person=b"keural-data").digest()


def _exact(record: Record) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Conversation):
        return [part for message in record.messages for part in message]
    return [part for message in record.prompt for part in message] + [record.chosen, record.rejected]


def _asked(record: Record) -> list[str]:
    if isinstance(record, Document):
        return [normalised(record.text)]
    prompt = record.prompt if isinstance(record, PreferencePair) else record.messages[:-1]
    return [normalised(part) for message in prompt for part in message]
