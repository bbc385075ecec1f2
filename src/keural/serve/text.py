"""From the engine's ids to text.

In: prompt ids. Out: pieces of text, passed to a function as they arrive. Together they are exactly the text that decoding all ids
at once gives, whatever the engine and the tokenizer: a character is held back until it is complete, and one that never is becomes
U+FFFD at the end. What a terminal must not get is escaped where text is written to one (`keural.terminal`).
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from keural.serve.engines.base import Engine, Finish
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.jamo import Jamo, compatibility_jamo
from keural.tokenizer import KeuralTokenizer


class Answer(NamedTuple):
    """What was written, and why it ended (`cancelled`: by Ctrl-C)."""

    text: str
    finish: Finish | Literal["cancelled"]


def stream_answer(
    engine: Engine, prompt_ids: Sequence[int], sampling: SamplingParams, write: Callable[[str], None], jamo: Jamo = "compatibility"
) -> Answer:
    """Generate until `<|im_end|>` or `</s>`, handing every piece of text to `write`; Ctrl-C ends the answer, not the program.

    `jamo` concerns the published tokenizer only (see `keural.serve.jamo`); a lossless one gives back what was meant. Raises
    `UserError` when the prompt does not fit.
    """
    tokenizer = engine.tokenizer
    decoder, spell = tokenizer.stream_decoder(), speller(tokenizer, jamo)
    parts: list[str] = []

    def pass_on(text: str) -> None:
        if text:
            parts.append(spell(text))
            write(parts[-1])

    stream = engine.stream(prompt_ids, sampling, {tokenizer.im_end_id, tokenizer.eos_id})
    finish: Finish | Literal["cancelled"]
    try:
        while True:
            pass_on(decoder.push(next(stream)))
    except StopIteration as end:
        finish = end.value
    except KeyboardInterrupt:
        finish = "cancelled"
    finally:
        stream.close()
    pass_on(decoder.flush())
    return Answer("".join(parts), finish)


def speller(tokenizer: KeuralTokenizer, jamo: Jamo) -> Callable[[str], str]:
    """What is done to decoded text, piece by piece or as a whole."""
    return compatibility_jamo if tokenizer.kind == "published" and jamo == "compatibility" else str
