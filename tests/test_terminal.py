"""One place prints: no terminal obeys what a stranger wrote, and no stream that is closed, full or narrow stops work."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keural.errors import UserError
from keural.terminal import json_text, note, say, show, show_answer, show_pieces, show_table, show_text, yaml_text

SOURCE = Path(__file__).resolve().parents[1] / "src" / "keural"
EVIL = "\x1b]0;t\x07\x1b[31m\x9b2J\u202eevil\u2066 [bold]x[/x] :smile: \udce9"
RAW = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\udce9")


class Screen(io.StringIO):
    """A terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def look_at(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Screen:
    """Standard output and standard error as one screen. Without colours: whatever escape is left came from the text."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    return screen


either = pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])


def test_no_other_module_prints() -> None:
    """`print`, standard streams and rich's consoles are for `keural.terminal`."""
    found = []
    for path in SOURCE.rglob("*.py"):
        if path.name == "terminal.py" and path.parent == SOURCE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {
                ast.Name: lambda node: node.id in {"print", "Console", "rprint"},
                ast.Attribute: lambda node: (
                    node.attr in {"Console", "stdout", "stderr", "__stdout__", "__stderr__", "echo", "secho"}
                ),
                ast.ImportFrom: lambda node: node.module in {"rich", "rich.console", "rich.live", "rich.table"},
            }
            if (uses := names.get(type(node))) and uses(node) and not _is_a_field(node):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert found == []


def _is_a_field(node: ast.AST) -> bool:
    """Whether it is a result's `stdout`, as subprocess gives it, and not the stream."""
    return isinstance(node, ast.Attribute) and not (
        isinstance(node.value, ast.Name) and node.value.id in {"sys", "typer", "click", "rich"}
    )


@either
def test_whatever_is_quoted_is_shown_escaped(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen = look_at(monkeypatch, terminal)
    show(EVIL)
    show(EVIL, "bold")
    show_text(EVIL)
    show_pieces([(EVIL, "dim"), (EVIL, "")])
    show_table(EVIL, {EVIL: "left", "n": "right"}, [[EVIL, EVIL]])
    say(EVIL)
    note(EVIL)
    shown = screen.getvalue()
    assert not [character for character in RAW if character in shown]
    assert "\\x1b]0;t\\x07\\x1b[31m\\x9b2J\\u202eevil\\u2066 [bold]x[/x] :smile: \\udce9" in shown


@either
def test_a_models_answer_is_escaped_on_a_terminal_and_whole_in_a_file(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen = look_at(monkeypatch, terminal)
    show_answer("a\tb\x1b[2J가\n")
    assert screen.getvalue() == ("a\tb\\x1b[2J가\n" if screen.terminal else "a\tb\x1b[2J가\n")


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.lists(st.integers() | st.text(max_size=5)), max_size=4))
def test_escaped_json_and_yaml_still_hold_the_value(value: dict[str, object]) -> None:
    assert json.loads(json_text(value)) == value
    assert yaml.safe_load(yaml_text(value)) == value


def test_json_and_yaml_hide_nothing() -> None:
    for text in (json_text({EVIL: EVIL}), yaml_text({EVIL: EVIL, "plain": "안녕"})):
        assert not [character for character in RAW if character in text]
    assert "plain: 안녕" in yaml_text({"plain": "안녕"})


class Broken(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "No space left")]
)
def test_a_lost_reader_stops_what_was_asked_for_and_never_the_work(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    say("on it goes")
    note("on it goes")
    with pytest.raises(BrokenPipeError if isinstance(error, BrokenPipeError) else UserError):
        show("what was asked for")


def command(*arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`keural` in a shell of its own, with its streams redirected."""
    line = f'exec "$@" {redirect}'
    environ = {**os.environ, **environment}
    return subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-m", "keural", *arguments], capture_output=True, env=environ, check=False
    )


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(redirect: str) -> None:
    result = command("recipes", redirect=redirect)
    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
    assert (b"toy" in result.stdout) == (">&-" not in redirect.replace("2>&-", ""))


def test_a_closed_stream_does_not_lend_its_number_to_a_file(tmp_path: Path) -> None:
    """What is printed to a closed stream must not land in the next file that is opened."""
    program = "import os, sys; from keural.terminal import open_streams; open_streams(); " + (
        "file = open(sys.argv[1], 'wb'); os.write(1, b'x'); os.write(2, b'x'); print('y'); file.close()"
    )
    subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", sys.executable, "-c", program, str(tmp_path / "a")], check=True)
    assert (tmp_path / "a").read_bytes() == b""


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    result = command("recipes", redirect=">/dev/full")
    assert result.returncode == 2
    assert result.stderr == b"keural: error: standard output cannot be written (No space left on device)\n"


def test_a_reader_that_left_is_no_error() -> None:
    result = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-m", "keural", "recipe", "toy"],
        capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode in (0, 1)
    assert result.stderr == b""


@pytest.mark.parametrize("encoding", ["euc_kr", "cp949", "ascii"])
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(encoding: str, tmp_path: Path) -> None:
    result = command("recipes", "\U0001f600�힣", PYTHONIOENCODING=encoding)
    assert result.returncode == 2
    assert b"Traceback" not in result.stderr
    shown = subprocess.run(
        [sys.executable, "-c", FACES], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True
    )
    assert shown.stdout.startswith("가 ? ?\n".encode(encoding, "replace"))


FACES = """
from keural.terminal import open_streams, show, show_table
open_streams()
show("가 \\U0001f600 \\ufffd")
show_table("표", {"가": "left"}, [["\\U0001f600"]])
"""
