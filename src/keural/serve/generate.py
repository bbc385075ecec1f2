"""One prompt, one answer: `keural generate DIR --prompt …`.

In: a prompt. Out: the answer on standard output as it is generated; remarks on standard error, so that the output can be piped.
"""

import contextlib
from pathlib import Path

from keural.pretrained.network_code import other_code_line
from keural.serve.engines.registry import chat_defaults, open_engine
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.jamo import Jamo
from keural.serve.text import stream_answer
from keural.terminal import note, show_answer
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

EXIT_INTERRUPTED = 130
"""What a shell reports of a program that Ctrl-C ended."""


def run_generate(
    path: Path,
    prompt: str,
    sampling: SamplingParams,
    system: str | None = None,
    raw: bool = False,
    jamo: Jamo = "compatibility",
    engine_name: str | None = None,
    threads: int | None = None,
) -> int:
    """Write the model's answer to one prompt; returns the exit code.

    Args:
        path: of the model, see `open_engine`.
        prompt: the user's message, or with `raw` the text to continue.
        sampling: how tokens are chosen.
        system: system message; None takes the one the model was saved with, an empty one is none.
        raw: continue `<s>` + prompt as running text, without chat markers.
        jamo: see `stream_answer`.
        engine_name: see `open_engine`.
        threads: see `open_engine`.

    Raises:
        UserError: when the model cannot be loaded or the prompt does not fit.
    """
    engine = open_engine(path, engine_name, threads)
    if engine.unverified:
        note(f"({engine.unverified})")
    if (remark := other_code_line(path)) is not None:
        note(f"({remark})")
    if not raw and system is None:
        system = chat_defaults(path, engine_name)[1]
    prompt_ids = _prompt_ids(engine.tokenizer, prompt, system, raw)
    with contextlib.suppress(BrokenPipeError):  # as in `… | head -1`
        answer = stream_answer(engine, prompt_ids, sampling, show_answer, jamo)
        show_answer("\n")
        if answer.finish == "length":
            note(f"(cut after {sampling.max_new_tokens} tokens)")
        elif answer.finish == "context":
            note(f"(the context of {engine.context_length} tokens is full)")
        elif answer.finish == "cancelled":
            return EXIT_INTERRUPTED
    return 0


def _prompt_ids(tokenizer: KeuralTokenizer, prompt: str, system: str | None, raw: bool) -> list[int]:
    if raw:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    head = [Message("system", system)] if system else []
    return render_prompt(tokenizer, [*head, Message("user", prompt)])
