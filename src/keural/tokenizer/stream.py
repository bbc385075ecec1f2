"""Decoding: ids to text, whole or one id at a time.

In: ids. Out: text. Whole decoding is streaming to the end, so the two agree on every sequence, valid or not. What a model generates
may stop inside a character or hold bytes that are no UTF-8: each maximal invalid part becomes U+FFFD, and in a stream only
once it is certain that no later id completes it.
"""

import codecs
from collections.abc import Sequence

from keural.errors import UserError


class StreamDecoder:
    """Turns ids into text as they arrive; half-finished characters are held back.

    `table` gives the bytes of each id. With `strip_leading_space` (the published kind) the space that a piece (an id from
    `first_normal_id` on) starts with is dropped while there is no text yet, as SentencePiece does for models that remove extra
    spaces.
    """

    def __init__(self, table: Sequence[bytes], first_normal_id: int, strip_leading_space: bool) -> None:
        self._table = table
        self._first_normal_id = first_normal_id
        self._at_start = strip_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly empty. Raises `UserError` for an id outside the vocabulary."""
        if not 0 <= token_id < len(self._table):
            raise UserError(
                f"token id {token_id} is outside the vocabulary of {len(self._table)}; were the ids made by another tokenizer?"
            )
        data = self._table[token_id]
        if self._at_start and data:
            if token_id >= self._first_normal_id:
                data = data.removeprefix(b" ")
            self._at_start = not data
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD when a character was left half-finished, else nothing. The decoder then starts anew."""
        return self._decoder.decode(b"", final=True)
