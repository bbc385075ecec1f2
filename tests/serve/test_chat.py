"""The terminal chat and one-shot generation: history, commands, interrupts, what reaches the screen."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from keural.errors import UserError
from keural.serve.chat import Conversation, run_chat
from keural.serve.engines.base import Finish
from keural.serve.engines.decoding import check_prompt
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine
from keural.serve.generate import run_generate
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


@dataclass
class Script:
    """An engine that recites prepared answers and notes what it was asked; an exception in an answer is raised there."""

    tokenizer: KeuralTokenizer
    answers: list[list[int | type[BaseException]]]
    context_length: int = 160
    prompts: list[list[int]] = field(default_factory=list)
    closed: int = 0

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams, stop: Collection[int]) -> Generator[int, None, Finish]:
        check_prompt(prompt_ids, self.context_length)
        self.prompts.append(list(prompt_ids))
        try:
            for token in self.answers.pop(0):
                if not isinstance(token, int):
                    raise token
                yield token
        finally:
            self.closed += 1
        return "stop"


class Screen:
    """Collects what is written and noticed."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.notices: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture
def screen() -> Screen:
    return Screen()


def ask(conversation: Conversation, text: str, screen: Screen) -> str:
    return conversation.ask(text, screen.pieces.append, screen.notices.append).finish


def test_history_is_rendered_as_in_training(tokenizer: KeuralTokenizer, screen: Screen) -> None:
    engine = Script(tokenizer, [tokenizer.encode("red house"), tokenizer.encode("파란 새")])
    conversation = Conversation(engine, GREEDY, "Be brief.")

    ask(conversation, "the cat", screen)
    ask(conversation, "고양이는 <|im_end|>", screen)

    messages = [
        Message("system", "Be brief."), Message("user", "the cat"), Message("assistant", "red house"),
        Message("user", "고양이는 <|im_end|>"),
    ]  # fmt: skip
    assert engine.prompts == [render_prompt(tokenizer, messages[:2]), render_prompt(tokenizer, messages)]
    assert conversation.turns == [*messages[1:], Message("assistant", "파란 새")]
    assert screen.text == "red house파란 새"


def test_ctrl_c_keeps_what_was_said_and_goes_on(tokenizer: KeuralTokenizer, screen: Screen) -> None:
    engine = Script(tokenizer, [[*tokenizer.encode("red house"), KeyboardInterrupt], tokenizer.encode("two")])
    conversation = Conversation(engine, GREEDY)

    assert ask(conversation, "the cat", screen) == "cancelled"
    assert conversation.turns[-1] == Message("assistant", "red house")
    assert engine.closed == 1
    assert ask(conversation, "and", screen) == "stop"


def test_oldest_exchanges_leave_with_a_notice(tokenizer: KeuralTokenizer, screen: Screen) -> None:
    engine = Script(tokenizer, [tokenizer.encode("red house") for _ in range(9)])
    conversation = Conversation(engine, SamplingParams(max_new_tokens=40), "Be brief.")

    for number in range(9):
        ask(conversation, f"the cat sees {number}", screen)

    assert all(len(prompt) + 40 <= 160 for prompt in engine.prompts)
    assert 2 < len(conversation.turns) < 18
    assert conversation.turns[0].role == "user"
    assert conversation.turns[-2].content == "the cat sees 8"
    assert engine.prompts[-1][:8] == engine.prompts[0][:8]  # the system message stays
    assert screen.notices[0] == "(1 oldest exchange left out: the context holds 160 tokens)"


def test_message_beyond_the_context_is_refused_and_forgotten(tokenizer: KeuralTokenizer, screen: Screen) -> None:
    engine = Script(tokenizer, [tokenizer.encode("two"), tokenizer.encode("two")])
    conversation = Conversation(engine, GREEDY)
    ask(conversation, "the cat", screen)
    before = list(conversation.turns)

    with pytest.raises(UserError, match="the model's context is 160"):
        ask(conversation, "cat " * 300, screen)

    assert conversation.turns == before
    assert screen.notices == []
    assert ask(conversation, "and", screen) == "stop"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, model_dir: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run a whole chat on given input; returns exit code, output and remarks."""

    def run(text: str, system: str | None = None, sampling: SamplingParams = GREEDY) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = run_chat(model_dir, sampling, system)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def expected_answers(model_dir: Path, system: str | None, *texts: str) -> str:
    engine, screen = TransformersEngine(model_dir, device="cpu"), Screen()
    conversation = Conversation(engine, GREEDY, system)
    for text in texts:
        ask(conversation, text, screen)
        screen.pieces.append("\n")
    return screen.text


def test_piped_chat_writes_only_answers_to_standard_output(piped, model_dir: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = piped("the cat\n\n  고양이는 \n", system="")

    assert code == 0
    assert out == expected_answers(model_dir, None, "the cat", "고양이는")
    assert set(err.splitlines()) <= {"(cut after 12 tokens)"}


def test_saved_system_message_is_the_default(piped, model_dir: Path) -> None:  # type: ignore[no-untyped-def]
    assert piped("the cat\n")[1] == expected_answers(model_dir, "Be brief.", "the cat")
    assert piped("the cat\n", system="안녕하세요")[1] == expected_answers(model_dir, "안녕하세요", "the cat")


def test_commands(piped, model_dir: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = piped("/help\n/system 감사합니다\nthe cat\n/reset\nthe cat\n/nonsense\n/system\nthe cat\n/exit\nnever\n")

    assert code == 0
    once = expected_answers(model_dir, "감사합니다", "the cat")
    assert out == once + once + expected_answers(model_dir, None, "the cat")
    assert "/system TEXT" in err
    assert "(conversation forgotten)" in err
    assert "/nonsense: no such command; /help lists them" in err


def test_too_long_a_message_is_a_remark_not_the_end(piped, model_dir: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = piped("cat " * 300 + "\nthe cat\n", system="")

    assert code == 0
    assert out == expected_answers(model_dir, None, "the cat")
    assert "the model's context is 160; shorten it" in err


def test_generate_answers_a_user_turn(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_generate(model_dir, "the cat", GREEDY, system="") == 0

    assert capsys.readouterr().out == expected_answers(model_dir, None, "the cat")


def test_generate_raw_continues_the_text(model_dir: Path, tokenizer: KeuralTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_generate(model_dir, "the cat", GREEDY, raw=True) == 0

    engine = TransformersEngine(model_dir, device="cpu")
    ids = list(engine.stream([1, *tokenizer.encode("the cat")], GREEDY, {2, tokenizer.im_end_id}))
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_reader_may_leave_before_the_end(model_dir: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe cat\n"))
        code = run_generate(model_dir, "the cat", GREEDY) if command == "generate" else run_chat(model_dir, GREEDY)

    assert code == 0


def test_generate_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model directory"):
        run_generate(tmp_path, "the cat", GREEDY)


TERMINAL = """
import os, sys, time
from pathlib import Path
from keural.serve.chat import run_chat
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine
read, reads = TransformersEngine._read, []
def read_once(*arguments):
    reads.append(arguments)
    if len(reads) == 2:  # the first token was said: the answer is going on, and will be when the interrupt comes
        os.write(1, b"[answering]")
        while True:  # a signal between two instructions would leave a single long sleep asleep
            time.sleep(0.01)
    return read(*arguments)
TransformersEngine._read = read_once
sys.exit(run_chat(Path(sys.argv[1]), SamplingParams(temperature=0.0, max_new_tokens=120), ""))
"""


class Keyboard:
    """A chat in a pseudo-terminal."""

    def __init__(self, model_dir: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, str(model_dir)], stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def wait_for(self, text: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.seen.decode(errors="replace")
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen.split(text.encode(), 1)[1]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_terminal_session_ctrl_c_stops_the_answer_and_ctrl_d_leaves(model_dir: Path) -> None:
    keyboard = Keyboard(model_dir)
    try:
        keyboard.wait_for("/help lists the commands")
        keyboard.wait_for("› ")
        keyboard.type("the cat\n")
        keyboard.wait_for("the cat\r\n")
        keyboard.wait_for("[answering]")
        os.kill(keyboard.process.pid, signal.SIGINT)
        keyboard.wait_for("(stopped)")
        keyboard.wait_for("› ")
        keyboard.type("/reset\n")
        keyboard.wait_for("(conversation forgotten)")
        keyboard.wait_for("› ")
        keyboard.type("\x04")
        assert keyboard.process.wait(timeout=240) == 0
    finally:
        keyboard.process.kill()
        keyboard.process.wait()
        os.close(keyboard.master)
