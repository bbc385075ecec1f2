"""Korean letters that stand alone, as people type them.

In: text decoded by the published tokenizer. Out: the same text with ㅋㅋㅋ and ㅠㅠ where decoding gives ᄏᄏᄏ and ᅲᅲ.

The published tokenizer normalises text by NFKC, which turns the letters of a Korean keyboard (compatibility jamo, U+3131 to U+318E)
into conjoining jamo (U+1100 to U+11FF). These are meant to be joined into syllables; alone they look wrong, in another width or
another place. NFKC maps the two sets one to one, so its inverse restores what was typed.

Each letter is restored by itself, whatever stands next to it. A leading letter before a vowel (ᄏ, ᅲ) is canonically the syllable
큐, and one could compose it instead. But the tokenizer composes such pairs before it cuts text, so no text it was trained on has
them left: a model that writes the two letters as separate tokens means ㅋㅠ. What was typed as ㅋㅋㅠㅠ, the tokenizer reads as
ᄏ큐ᅲ; it comes back as ㅋ큐ㅠ, for nothing tells that 큐 from one that was typed.

Restored text has the ids of the text as decoded, because NFKC is the first thing that happens to both. And since one character
becomes one character, a stream of pieces gives the same text as the whole.
"""

import unicodedata
from typing import Literal

Jamo = Literal["compatibility", "as-decoded"]
"""How letters that stand alone are written: as typed (ㅋㅋㅋ), or as decoded (ᄏᄏᄏ)."""

FIRST, LAST = 0x3131, 0x318E
"""Compatibility jamo, ㄱ to ㆎ."""
RESTORED = {ord(unicodedata.normalize("NFKC", chr(typed))): typed for typed in range(FIRST, LAST + 1)}
"""The compatibility jamo of each conjoining one that NFKC makes of one."""


def compatibility_jamo(text: str) -> str:
    """`text` with the conjoining jamo that NFKC makes of compatibility jamo turned back into these."""
    return text.translate(RESTORED)
