"""A chat in the terminal: `keural chat DIR`.

In: lines from the keyboard, or from a pipe. Out: the answers, as they are generated, on standard output; everything that is not the
model's goes to standard error where the output is not a terminal. What falls out of the context is announced.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from keural.errors import UserError
from keural.pretrained.network_code import other_code_line
from keural.serve.engines.base import Engine
from keural.serve.engines.registry import chat_defaults, open_engine, suggestions
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.jamo import Jamo
from keural.serve.text import Answer, stream_answer
from keural.terminal import is_terminal, note, say, show_answer, status
from keural.tokenizer import Message, render_prompt

HELP = """\
/system TEXT  set the system message and start anew; without TEXT, remove it
/reset        forget the conversation
/help         show this
/exit         leave (so does Ctrl-D)
Ctrl-C stops an answer."""

Notify = Callable[[str], None]


def run_chat(
    path: Path,
    sampling: SamplingParams,
    system: str | None = None,
    jamo: Jamo = "compatibility",
    engine_name: str | None = None,
    threads: int | None = None,
) -> int:
    """Talk to the model in `path` until the input ends; returns the exit code.

    `system` is the system message; None takes the one the model was saved with, an empty one is none. For `jamo` see
    `stream_answer`, for the others and for what is raised `open_engine`.
    """
    terminal = Terminal()
    with terminal.loading(path):
        engine = open_engine(path, engine_name, threads)
        system = chat_defaults(path, engine_name)[1] if system is None else system
    if engine.unverified:
        terminal.notify(f"({engine.unverified})")
    if (remark := other_code_line(path)) is not None:
        terminal.notify(f"({remark})")
    with contextlib.suppress(BrokenPipeError):  # as in `… | head -1`
        converse(Conversation(engine, sampling, system or None, jamo), terminal, suggestions(path, engine_name))
    return 0


class Conversation:
    """The history of a chat, and the engine that answers. `turns` alternate between user and assistant."""

    def __init__(self, engine: Engine, sampling: SamplingParams, system: str | None = None, jamo: Jamo = "compatibility") -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = system
        self.jamo: Jamo = jamo
        self.turns: list[Message] = []

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns = []

    def ask(self, text: str, write: Callable[[str], None], notify: Notify) -> Answer:
        """Answer a message, writing piece by piece; both enter the history, a cancelled answer as far as it came.

        The oldest exchanges are left out, with a notice, when the context has no room for an answer of `max_new_tokens` (or of
        half the context, if that is less). Raises `UserError` when even the message alone does not fit; the history is then
        unchanged.
        """
        turns, prompt_ids = self._fit([*self.turns, Message("user", text)])
        left_out = (len(self.turns) + 1 - len(turns)) // 2
        if left_out and len(prompt_ids) < self.engine.context_length:
            what = "exchange" if left_out == 1 else "exchanges"
            notify(f"({left_out} oldest {what} left out: the context holds {self.engine.context_length} tokens)")
        answer = stream_answer(self.engine, prompt_ids, self.sampling, write, self.jamo)
        self.turns = [*turns, Message("assistant", answer.text)]
        return answer

    def _fit(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """The latest turns that leave room for an answer, at least the last one, and their ids."""
        head = [Message("system", self.system)] if self.system else []
        room = min(self.sampling.max_new_tokens, self.engine.context_length // 2)
        while True:
            prompt_ids = render_prompt(self.engine.tokenizer, head + turns)
            if len(prompt_ids) + room <= self.engine.context_length or len(turns) == 1:
                return turns, prompt_ids
            turns = turns[2:]


class Terminal:
    """Where lines come from and text goes to."""

    def __init__(self) -> None:
        if sys.stdin is None:
            raise UserError("standard input is closed; a chat reads its lines there (`keural generate` answers one prompt)")
        self.interactive = is_terminal("stdin") and is_terminal("stdout")
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())

    def loading(self, path: Path) -> contextlib.AbstractContextManager[object]:
        """A sign of life while the model is loaded."""
        return status(f"loading {path}") if self.interactive else contextlib.nullcontext()

    def read(self) -> str:
        """The next line. Raises EOFError at the end of the input."""
        return input("› " if self.interactive else "")

    def write(self, text: str) -> None:
        """A piece of an answer, at once."""
        show_answer(text)

    def notify(self, text: str) -> None:
        """A remark that is not the model's: beside the answers on a terminal, else on standard error."""
        (say if self.interactive else note)(text, "dim")


def converse(conversation: Conversation, terminal: Terminal, to_ask: Sequence[str] = ()) -> None:
    """Read lines and answer them until the input ends or `/exit`; on a terminal first say what there is to ask."""
    if terminal.interactive:
        terminal.notify("Type a message; /help lists the commands, Ctrl-D leaves.")
        if to_ask:
            terminal.notify("Ask, for example:\n" + "\n".join(f"  {text}" for text in to_ask))
    while True:
        try:
            line = terminal.read().strip()
        except (EOFError, KeyboardInterrupt):
            if terminal.interactive:
                terminal.write("\n")
            return
        if line.startswith("/"):
            if not _command(line, conversation, terminal.notify):
                return
        elif line:
            _answer(line, conversation, terminal)


def _answer(line: str, conversation: Conversation, terminal: Terminal) -> None:
    try:
        answer = conversation.ask(line, terminal.write, terminal.notify)
    except UserError as error:
        terminal.notify(f"({error})")
        return
    terminal.write("\n")
    reason = {
        "length": f"(cut after {conversation.sampling.max_new_tokens} tokens)",
        "context": "(the context is full; /reset starts anew)",
        "cancelled": "(stopped)",
    }.get(answer.finish)
    if reason:
        terminal.notify(reason)


def _command(line: str, conversation: Conversation, notify: Notify) -> bool:
    """Obey a line that starts with a slash; False when the chat is over."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        notify(f"{name}: no such command; /help lists them")
        return True
    return COMMANDS[name](conversation, rest.strip(), notify)


def _set_system(conversation: Conversation, text: str, notify: Notify) -> bool:
    conversation.system = text or None
    conversation.reset()
    notify("(system message set, conversation started anew)" if text else "(system message removed, conversation started anew)")
    return True


def _reset(conversation: Conversation, text: str, notify: Notify) -> bool:
    conversation.reset()
    notify("(conversation forgotten)")
    return True


def _help(conversation: Conversation, text: str, notify: Notify) -> bool:
    notify(HELP)
    return True


def _exit(conversation: Conversation, text: str, notify: Notify) -> bool:
    return False


COMMANDS: dict[str, Callable[[Conversation, str, Notify], bool]] = {
    "/system": _set_system,
    "/reset": _reset,
    "/help": _help,
    "/exit": _exit,
}
