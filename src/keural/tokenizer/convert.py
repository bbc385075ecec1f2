"""A SentencePiece model as the files transformers reads: tokenizer.json, tokenizer_config.json, chat_template.jinja.

In: the parsed model and its kind. Out: a `tokenizers.Tokenizer` with the same ids for the same text.
`AutoTokenizer.from_pretrained` loads the directory without remote code, puts no bos first, and ends a chat at `<|im_end|>`.

Three things are inherent to that format. A text that spells the name of a special token (`<bos>`, `<|im_end|>`) becomes that token
unless the caller says `split_special_tokens=True` (transformers) or sets `encode_special_tokens = True` (tokenizers). A run of byte
pieces that is no UTF-8 decodes to one U+FFFD per byte, where the package gives one per invalid part. And with the published kind, a
space that ids begin with is decoded, where SentencePiece and the package drop it; only text with a U+2581 of its own has such ids.
"""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from keural.files import write_atomic, write_json
from keural.tokenizer.model_file import FIRST_BYTE_ID, IM_END, IM_START, NORMAL, SPACE_MARK, UNK_ID, Kind
from keural.tokenizer.segment import SEGMENT_PATTERN

CHAT_TEMPLATE = files("keural.tokenizer").joinpath("chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")
"""ChatML with `{% generation %}` around what is trained; see `chatml.py` for where it differs from rendering by ids."""


def to_tokenizers(proto: Any, kind: Kind) -> Tokenizer:
    """The Hugging Face tokenizer that gives the same ids as SentencePiece does with `proto`.

    Sources: for the published kind the recipe that NFKC, space removal and the Metaspace split reproduce; for the lossless kind see
    `segment.py` and `load.py`.
    """
    tokenizer = _BUILDERS[kind](proto)
    specials = [piece.piece for piece in proto.pieces[:FIRST_BYTE_ID]] + [IM_START, IM_END]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer


def write_tokenizer_files(proto: Any, kind: Kind, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory`."""
    names = [piece.piece for piece in proto.pieces[:FIRST_BYTE_ID]]
    write_atomic(directory / "tokenizer.json", to_tokenizers(proto, kind).to_str())
    write_atomic(directory / "chat_template.jinja", CHAT_TEMPLATE + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": names[0],
        "bos_token": names[1],
        "eos_token": IM_END,
        "unk_token": names[UNK_ID],
        "additional_special_tokens": [names[2], IM_START],
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)


def _published(proto: Any) -> Tokenizer:
    tokenizer = Tokenizer(_unigram(proto, space=SPACE_MARK))
    # \A and \z, because ^ and $ are the ends of a line in this engine. SentencePiece strips a space mark of the text's own at the
    # end (there it has already written spaces as marks), but not at the start.
    strip = normalizers.Replace(Regex(rf"\A +|[ {SPACE_MARK}]+\z"), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), strip, normalizers.Replace(Regex(" +"), SPACE_MARK)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _lossless(proto: Any) -> Tokenizer:
    tokenizer = Tokenizer(_unigram(proto, space=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SEGMENT_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram(proto: Any, space: str) -> models.Unigram:
    """The Unigram model of `proto`, with `space` for SentencePiece's space mark.

    SentencePiece never matches the names of control and byte pieces in text, `tokenizers` does. Their scores are therefore set so
    low that spelling them out of single characters (at most 6) always wins.
    """
    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    unreachable = 8 * (lowest - 1)
    vocabulary = [
        (piece.piece.replace(SPACE_MARK, space), piece.score) if piece.type == NORMAL else (piece.piece, unreachable)
        for piece in proto.pieces
    ]
    return models.Unigram(vocabulary, unk_id=UNK_ID, byte_fallback=True)


_BUILDERS: dict[Kind, Callable[[Any], Tokenizer]] = {"published": _published, "lossless": _lossless}
