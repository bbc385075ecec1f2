"""Training a tokenizer: texts in, a directory with `tokenizer.model` and the files of `convert.py` out.

SentencePiece's Unigram trainer finds the pieces. For the lossless kind three things are done around it:

* It never sees layout. Texts are cut at newlines and tabs, and runs of spaces are reduced to one space before training
  (SentencePiece reads a newline as the end of a sentence and a tab as a boundary). Afterwards pieces for runs of 2 to 16 spaces, of
  newlines and of tabs are added as ordinary pieces, so that the model file by itself encodes layout and no special matching is
  needed anywhere.
* The pieces that a recipe asks for are cut out of the texts by the trainer, and added as ordinary pieces, too.
* Scores are rounded to multiples of 1/256, so that sums of them are exact and every implementation breaks ties alike
  (`segment.py`).

The result depends on the texts, the settings and the seed only: the trainer always uses the same number of threads, whatever the
machine has, because its float sums depend on that number.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from keural.errors import UserError
from keural.files import atomic_directory
from keural.recipe import TokenizerSpec
from keural.tokenizer.load import KeuralTokenizer
from keural.tokenizer.model_file import (
    BOS_ID,
    CONTROL_PIECES,
    EOS_ID,
    IM_END,
    IM_START,
    NORMAL,
    PAD_ID,
    SPACE_MARK,
    UNK_ID,
    USER_DEFINED,
)
from keural.tokenizer.segment import SEGMENT_CHARACTERS, segments

TRAINER_THREADS = 16
"""Fixed, see above; more threads than cores cost nothing noticeable."""
SEED_PIECES = 25
"""Candidates the trainer starts from, per piece wanted (SentencePiece's own default is a million, which the full size reaches)."""
SCORE_STEPS = 256
"""Scores of a lossless model are multiples of 1 / SCORE_STEPS."""
LAYOUT_PIECES = (
    *(SPACE_MARK * count for count in range(2, 17)),
    *("\n" * count for count in range(1, 5)),
    *("\t" * count for count in range(1, 5)),
)
"""Pieces added to a lossless model after training."""

_REQUIRED_CHARACTERS = SPACE_MARK + "".join(sorted(set("<0x0123456789ABCDEF>" + "".join(CONTROL_PIECES) + IM_START + IM_END)))
"""Always pieces: the space, without which nothing is lossless, and the characters of the names of control and byte pieces."""
_LINE = re.compile("[^\n\r\t\0\u2581\ud800-\udfff]+")
"""What lies between newlines, tabs and what SentencePiece cannot take in: NUL, a space mark of the text's own, lone surrogates."""
_SPACES = re.compile(" +")
_HIGHEST_SIZE = re.compile(r"value <= (\d+)")
_LOWEST_SIZE = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def train_tokenizer(texts: Iterable[str], spec: TokenizerSpec, out_dir: str | Path, seed: int) -> KeuralTokenizer:
    """Train a tokenizer of `spec.kind` with `spec.vocab_size` pieces on `texts` and save it in `out_dir`.

    At most `spec.max_bytes` bytes of the texts are used, an even sample drawn with `seed`. Raises `UserError` when there is no
    text, too little text for the vocabulary, or too small a vocabulary for the characters of the text.
    """
    sentences = _sample((line for text in texts for line in _lines(text)), spec.max_bytes, seed)
    if not sentences:
        raise UserError("no text to train the tokenizer on: all texts are empty; check tokenizer.sources")
    layout = LAYOUT_PIECES if spec.kind == "lossless" else ()
    model = _train_unigram(sentences, spec, spec.vocab_size - len(layout))
    if spec.kind == "lossless":
        model = _with_added(model)
    tokenizer = KeuralTokenizer(model, "trained tokenizer")
    with atomic_directory(Path(out_dir)) as directory:
        tokenizer.save(directory)
    return tokenizer


def _lines(text: str) -> Iterator[str]:
    """The parts of `text` that the trainer may see: lines without layout, long ones cut where they are cut for encoding too."""
    for match in _LINE.finditer(text):
        for segment in segments(_SPACES.sub(" ", match[0])):
            if not segment.isspace():
                yield segment


def _sample(lines: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """An even sample of `lines` in their order, of at most `max_bytes` bytes: those with the smallest pseudo-random keys."""
    kept: list[tuple[int, int, str]] = []
    total = 0
    for index, line in enumerate(lines):
        key = int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest())
        heapq.heappush(kept, (-key, index, line))
        total += len(line.encode("utf-8", "replace"))
        while total > max_bytes:
            total -= len(heapq.heappop(kept)[2].encode("utf-8", "replace"))
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _train_unigram(sentences: list[str], spec: TokenizerSpec, pieces: int) -> bytes:
    """Run SentencePiece's trainer for `pieces` pieces; its complaints become `UserError`s that say what to change."""
    lossless = spec.kind == "lossless"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=pieces,
            character_coverage=spec.character_coverage,
            required_chars=_REQUIRED_CHARACTERS if lossless else "",
            byte_fallback=True,
            split_digits=spec.split_digits,
            seed_sentencepiece_size=min(1_000_000, SEED_PIECES * pieces),
            normalization_rule_name="identity" if lossless else "nfkc",
            remove_extra_whitespaces=not lossless,
            add_dummy_prefix=False,
            max_sentence_length=4 * SEGMENT_CHARACTERS,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            pad_piece=CONTROL_PIECES[PAD_ID],
            bos_piece=CONTROL_PIECES[BOS_ID],
            eos_piece=CONTROL_PIECES[EOS_ID],
            unk_piece=CONTROL_PIECES[UNK_ID],
            user_defined_symbols=list(spec.pieces),
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _explained(str(error), spec, pieces) from error
    return model.getvalue()


def _explained(complaint: str, spec: TokenizerSpec, pieces: int) -> UserError:
    """The user's reading of an error of SentencePiece's trainer."""
    added = spec.vocab_size - pieces
    if highest := _HIGHEST_SIZE.search(complaint):
        return UserError(
            f"too little text for tokenizer.vocab_size {spec.vocab_size}: it yields at most {int(highest[1]) + added} pieces; "
            "lower vocab_size or add sources"
        )
    if lowest := _LOWEST_SIZE.search(complaint):
        return UserError(
            f"tokenizer.vocab_size {spec.vocab_size} is too small: the characters of the text need at least "
            f"{int(lowest[1]) + added} pieces; raise vocab_size or lower character_coverage"
        )
    return UserError(f"SentencePiece cannot train the tokenizer: {complaint}")


def _with_added(model: bytes) -> bytes:
    """The trained model with rounded scores, and at its end the pieces that were asked for and those for layout."""
    proto: Any = sentencepiece_model.ModelProto()
    proto.ParseFromString(model)
    asked = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    kept = [piece for piece in proto.pieces if piece.type != USER_DEFINED]
    normal = [piece for piece in kept if piece.type == NORMAL]
    for piece in normal:
        piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    best = max(piece.score for piece in normal)
    kept = [type(piece).FromString(piece.SerializeToString()) for piece in kept]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    for text in (*asked, *LAYOUT_PIECES):
        # Longer is better, and a long with a short run better than two middling ones, so that runs always divide the same way. The
        # trainer cuts around what was asked for, so nothing else covers it but single characters.
        proto.pieces.add(piece=text, score=best - 1 + len(text) ** 2 / SCORE_STEPS, type=NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    del proto.trainer_spec.user_defined_symbols[:]
    found: bytes = proto.SerializeToString(deterministic=True)
    return found
