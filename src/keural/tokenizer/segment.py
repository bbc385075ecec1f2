"""Cutting text for the lossless kind, the same way for SentencePiece and for `tokenizer.json`.

SentencePiece adds up float32 scores over the whole string it is given, so on long texts near ties go either way. Both paths of the
lossless tokenizer therefore cut text into segments of at most 512 characters first. A segment ends before a space or newline
wherever it can; as no piece contains a space or newline after another character, such a cut changes nothing. Within
a segment all sums are exact, because scores are multiples of 1/256 (see `train.py`), so both paths resolve even exact ties alike.
"""

import re

SEGMENT_CHARACTERS = 512
SEGMENT_PATTERN = rf"[\s\S]{{0,{SEGMENT_CHARACTERS - 1}}}[^ \n](?=[ \n]|\z)|[\s\S]{{1,{SEGMENT_CHARACTERS}}}"
"""In the syntax of `tokenizers` (Oniguruma), where the end of the text is `\\z`."""
_SEGMENT = re.compile(SEGMENT_PATTERN.replace(r"\z", r"\Z"))


def segments(text: str) -> list[str]:
    """The segments of `text`, in order; joined they give `text` again."""
    return _SEGMENT.findall(text)
