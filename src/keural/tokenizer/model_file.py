"""The SentencePiece model file: reading it, checking it, and what its pieces mean.

In: the bytes of a `.model` file. Out: the parsed proto, its kind, and the bytes that every id stands for. Two kinds exist:

* `published`: NFKC and removal of extra spaces, as the released model has it. It loses information by design.
* `lossless`: no normalisation at all; `decode(encode(text)) == text` for every string.

A file that is neither is refused, because every other part of the package relies on the ids and on one of these two behaviours.
"""

from typing import Any, Literal

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from keural.errors import UserError

Kind = Literal["lossless", "published"]

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
CONTROL_PIECES = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Names of ids 0 to 3 in models trained here (the published model uses the same)."""
FIRST_BYTE_ID = 4
"""Id of the piece for byte 0; the piece for byte b has id 4 + b."""
FIRST_NORMAL_ID = FIRST_BYTE_ID + 256
"""Id of the first piece of text; the ids before it mean the same in every tokenizer."""
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
"""ChatML markers. They are never pieces of the `.model`: their ids follow its last piece, so no text can yield them."""
SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space inside its pieces."""

_PIECE = sentencepiece_model.ModelProto.SentencePiece
NORMAL, UNKNOWN, CONTROL, BYTE, UNUSED = _PIECE.NORMAL, _PIECE.UNKNOWN, _PIECE.CONTROL, _PIECE.BYTE, _PIECE.UNUSED
USER_DEFINED = _PIECE.USER_DEFINED


def parse_model(data: bytes, where: str) -> tuple[Any, Kind]:
    """Parse and check the bytes of a SentencePiece model.

    Returns the ModelProto and its kind. Raises `UserError`, naming `where`, when the bytes are damaged or not such a model, when
    the control or byte ids are not 0 to 259, or when the normaliser's settings fit neither kind.
    """
    proto = sentencepiece_model.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise UserError(f"{where}: not a SentencePiece model, or cut off; copy the file again") from error
    if len(proto.pieces) <= FIRST_NORMAL_ID:
        raise UserError(f"{where}: not a SentencePiece model with byte fallback ({len(proto.pieces)} pieces); give another file")
    if proto.trainer_spec.vocab_size != len(proto.pieces):
        raise UserError(f"{where}: {len(proto.pieces)} pieces but vocab_size {proto.trainer_spec.vocab_size}; the file is damaged")
    _check_ids(proto, where)
    return proto, _kind(proto, where)


def _check_ids(proto: Any, where: str) -> None:
    """Raise `UserError` unless ids 0-3 are pad, bos, eos, unk, ids 4-259 the bytes, and all others ordinary Unigram pieces."""
    trainer = proto.trainer_spec
    if trainer.model_type != trainer.UNIGRAM or not trainer.byte_fallback:
        raise UserError(f"{where}: not a Unigram model with byte fallback; train one with `keural tokenizer train`")
    found = (trainer.pad_id, trainer.bos_id, trainer.eos_id, trainer.unk_id)
    if found != (PAD_ID, BOS_ID, EOS_ID, UNK_ID):
        raise UserError(f"{where}: pad, bos, eos, unk have ids {found} instead of (0, 1, 2, 3); the tokenizer cannot be used here")
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN] + [BYTE] * 256
    if [piece.type for piece in proto.pieces[: len(types)]] != types:
        raise UserError(f"{where}: ids 0 to 259 are not the control and byte pieces; the tokenizer cannot be used here")
    if any(piece.type not in (NORMAL, UNUSED) for piece in proto.pieces[len(types) :]):
        raise UserError(f"{where}: control or user-defined pieces after id 259; the tokenizer cannot be used here")


def _kind(proto: Any, where: str) -> Kind:
    """The kind that the normaliser's settings belong to; `UserError` when to neither."""
    normalizer = proto.normalizer_spec
    common = not normalizer.add_dummy_prefix and normalizer.escape_whitespaces and not proto.trainer_spec.treat_whitespace_as_suffix
    folded, collapsed = len(normalizer.precompiled_charsmap) > 0, normalizer.remove_extra_whitespaces
    if common and folded and collapsed and normalizer.name == "nfkc":
        return "published"
    if common and not folded and not collapsed:
        if all(piece.piece != SPACE_MARK for piece in proto.pieces):
            raise UserError(f"{where}: no piece for a single space, so text cannot be restored; train the tokenizer again")
        return "lossless"
    raise UserError(
        f"{where}: normaliser {normalizer.name!r} with add_dummy_prefix={normalizer.add_dummy_prefix}, "
        f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces} is neither the published nor the lossless kind"
    )


def piece_bytes(proto: Any) -> list[bytes]:
    """For every id of the model the UTF-8 bytes it stands for; control ids and unk stand for none."""
    table = []
    for index, piece in enumerate(proto.pieces):
        if piece.type == BYTE:
            table.append(bytes([index - FIRST_BYTE_ID]))
        elif piece.type in (NORMAL, UNUSED):
            table.append(piece.piece.replace(SPACE_MARK, " ").encode("utf-8"))
        else:
            table.append(b"")
    return table
