"""The tokenizer as the rest of the package uses it: text to ids and back.

In: a SentencePiece `.model` file, or a directory that holds `tokenizer.model`. Out: ids (never control ids) from text, text from
ids, and with `save` the files that transformers reads. The ids are pad 0, bos 1, eos 2, unk 3, bytes 4 to 259, pieces from 260, and
the two ChatML markers last. The markers are not part of the `.model`, for both kinds alike: `vocab_size` is its number of pieces
plus 2. A model that did not have them yet gets two rows that start at the mean of its other rows (`convert`).

SentencePiece writes a space as U+2581 and restores every U+2581 as a space. A lossless tokenizer must keep a U+2581 of the text
itself, so it is cut out before SentencePiece sees it and encoded as its three bytes. `tokenizer.json` has plain spaces in its
pieces and no piece for U+2581, which gives the same three bytes there.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from keural.errors import UserError
from keural.files import write_atomic
from keural.tokenizer.convert import write_tokenizer_files
from keural.tokenizer.model_file import (
    BOS_ID,
    EOS_ID,
    FIRST_BYTE_ID,
    FIRST_NORMAL_ID,
    IM_END,
    IM_START,
    PAD_ID,
    SPACE_MARK,
    UNK_ID,
    Kind,
    parse_model,
    piece_bytes,
)
from keural.tokenizer.segment import segments
from keural.tokenizer.stream import StreamDecoder

_SPACE_MARK_IDS = np.array([FIRST_BYTE_ID + byte for byte in SPACE_MARK.encode("utf-8")], dtype=np.int32)


class KeuralTokenizer:
    """A published or lossless tokenizer with the two ChatML markers after its pieces."""

    pad_id = PAD_ID
    bos_id = BOS_ID
    eos_id = EOS_ID
    unk_id = UNK_ID

    def __init__(self, model: bytes, where: str = "tokenizer model") -> None:
        """`model` are the bytes of a `.model` file; `where` names it in errors. Raises `UserError` when it cannot be used.

        `proto` is the parsed model, for those who write it in another format, `model_bytes` what was given.
        """
        self.model_bytes = model
        self.proto, kind = parse_model(model, where)
        self.kind: Kind = kind
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{where}: damaged ({error}); copy the file again") from error
        self.vocab_size: int = len(self.proto.pieces) + 2
        self.im_start_id: int = self.vocab_size - 2
        self.im_end_id: int = self.vocab_size - 1
        self.sha256: str = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "KeuralTokenizer":
        """Load a `.model` file, or `tokenizer.model` of a tokenizer or model directory.

        Raises `UserError` when there is none, or when the file is damaged or of neither kind.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.model"
        try:
            model = file.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{file}: no such file; give a .model file or a directory with tokenizer.model") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        return cls(model, str(file))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.model, tokenizer.json, tokenizer_config.json and chat_template.jinja, as AutoTokenizer reads them."""
        target = Path(directory)
        write_atomic(target / "tokenizer.model", self.model_bytes)
        write_tokenizer_files(self.proto, self.kind, target)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a control id. Raises `UserError` for a string with lone surrogates, which no file can hold."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text; SentencePiece works on `threads` threads."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """The same as arrays, for much text: no Python object is made per id, and other Python threads run meanwhile."""
        if self.kind == "published":
            return self._pieces(texts, threads)
        cut = [[part.split(SPACE_MARK) for part in segments(text)] for text in texts]
        encoded = iter(self._pieces([part for text in cut for parts in text for part in parts], threads))
        return [_joined(encoded, [len(parts) for parts in text]) for text in cut]

    def _pieces(self, texts: Sequence[str], threads: int) -> list[NDArray[np.int32]]:
        """What SentencePiece makes of each text by itself."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                raise UserError(f"text with a lone surrogate (U+{code:04X}) cannot be encoded; repair the text") from error
        found: list[NDArray[np.int32]] = self._processor.encode(list(texts), return_type="numpy", num_threads=threads)
        return found

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Control ids give nothing, or their names (`<|im_end|>`) without `skip_special_tokens`.

        Bytes that are no UTF-8 become U+FFFD. Raises `UserError` for an id outside the vocabulary.
        """
        decoder = self.stream_decoder(skip_special_tokens)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one."""
        table = self._table if skip_special_tokens else self._table_with_names
        return StreamDecoder(table, FIRST_NORMAL_ID, strip_leading_space=self.kind == "published")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes an id stands for, perhaps only part of a character; none for control ids."""
        return self._table[token_id]

    @cached_property
    def _table(self) -> list[bytes]:
        return [*piece_bytes(self.proto), b"", b""]

    @cached_property
    def _table_with_names(self) -> list[bytes]:
        names = [piece.piece.encode("utf-8") for piece in self.proto.pieces[:FIRST_BYTE_ID]]
        return [*names, *self._table[FIRST_BYTE_ID:-2], IM_START.encode(), IM_END.encode()]


def _joined(encoded: Iterator[NDArray[np.int32]], counts: Sequence[int]) -> NDArray[np.int32]:
    """The ids of one text: for each segment the next `count` arrays of `encoded`, with the bytes of U+2581 between them."""
    parts: list[NDArray[np.int32]] = []
    for count in counts:
        for position, part in enumerate(islice(encoded, count)):
            if position:
                parts.append(_SPACE_MARK_IDS)
            parts.append(part)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
