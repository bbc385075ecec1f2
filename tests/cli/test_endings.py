"""Every ending that is not a bug's is one line and an exit code: wrong options, too little of something, closed input, ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keural.cli.endings import one_line_endings
from keural.errors import UserError
from tests.helpers.forks import Ended, Job, run_in_forks

LIMITED = 'eval "$LIMIT"; exec "$@"'


def command(*arguments: object, limit: str = "", redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    line = LIMITED.replace('"$@"', f'"$@" {redirect}')
    full = ["bash", "-c", line, "bash", sys.executable, "-m", "keural", *map(str, arguments)]
    return subprocess.run(full, capture_output=True, text=True, env={**os.environ, "LIMIT": limit, **environment}, check=False)


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("keural: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "toy", "--\x1b[31mnope"], ["\\x1b[31mnope", "keural run --help"]),
        (["\u202erun"], ["\\u202erun"]),
        (["data", "show", "toy/sft-1.yaml", "--step", "\x1b[31m"], ["--step", "keural data show --help"]),
        (["data", "show", "toy/sft-1.yaml", "--step", "-1"], ["--step"]),
        (["data", "show", "toy/sft-1.yaml", "--step", "9" * 5000], ["--step"]),
        (["data", "show", "toy/sft-1.yaml", "--rows", "0"], ["--rows"]),
        (["chat", "x", "--jamo", "[bold]x[/y]"], ["[bold]x[/y]"]),
        (["generate", "x[/y]", "--prompt", "p"], ["x[/y]"]),
        (["generate", "x", "--prompt", "p", "--seed", str(2**63)], ["--seed"]),
        (["generate", "x", "--prompt", "p", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["generate", "x", "--prompt", "p", "--max-new-tokens", str(10**12)], ["--max-new-tokens"]),
        (["run", "y" * 100_000], ["y"]),
        (["run", "toy", "--until", "z" * 100_000], ["z"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_usage_is_one_escaped_line(keural: Any, arguments: list[str], words: list[str]) -> None:
    code, out, err = keural(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert len(err) < 1200
    assert err[:-1].isprintable()
    assert all(word in err for word in words)


def test_no_arguments_show_the_help(keural: Any) -> None:
    code, out, err = keural()
    assert code == 2
    assert "recipes" in out + err


def test_too_many_threads(model_dir: Path, keural: Any) -> None:
    for number in (0, 100_000, 10**30):
        code, _, err = keural("generate", model_dir, "--prompt", "x", "--threads", number)
        assert code == 2
        assert err.count("\n") == 1
    code, _, _ = keural("generate", model_dir, "--prompt", "x", "--threads", 2, "--max-new-tokens", 2)
    assert code == 0


def test_too_little_memory(model_dir: Path) -> None:
    one_line(command("generate", model_dir, "--prompt", "x", "--max-new-tokens", "2", limit="ulimit -v 600000"), "memory")


KOREAN = "io.TextIOWrapper(io.BytesIO('하늘'.encode('euc_kr')), 'euc_kr')"
TERMINAL = """
import pty, threading
ours, theirs = pty.openpty()
seen = os.fdopen(os.dup(1), "wb")

def read():
    try:
        while True:
            seen.write(os.read(ours, 4096))
    except OSError:  # the other end is closed
        seen.close()

reader = threading.Thread(target=read)
reader.start()
for number in range(3):
    os.dup2(theirs, number)
os.close(theirs)
os.environ.update(COLUMNS="500", TERM="xterm")
os.write(ours, b"/exit\\n")
try:
    main()
finally:
    sys.stdout.flush()
    os.closerange(0, 3)
    reader.join()
"""
"""A person at a terminal who leaves at once; what is shown there becomes the program's output."""
RUNS = {
    "few files": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); main()", ["generate", "--prompt", "x"]),
    "a terminal": (TERMINAL, ["chat"]),
    "no questions": ("os.close(0); sys.stdin = None; main()", ["chat"]),
    "no input": ("os.close(0); sys.stdin = None; main()", ["generate", "--prompt", "하늘"]),
    "no output": ("os.close(1); sys.stdout = None; main()", ["generate", "--prompt", "하늘"]),
    "euc_kr": (f"sys.stdin = {KOREAN}; sys.stdout.reconfigure(encoding='euc_kr'); main()", ["chat"]),
    "ascii": ("sys.stdout.reconfigure(encoding='ascii'); main()", ["generate", "--prompt", "하늘"]),
}
"""What makes the process as a system may have started it and runs the command, and what is asked."""


@pytest.fixture(scope="module")
def ended(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How every command ended, each in a fork of one interpreter: to load the network's libraries takes seconds."""
    place, jobs = tmp_path_factory.mktemp("streams"), {}
    odd = place / "[bold]a\x1b]0;t\x07[" / "x]"
    odd.parent.mkdir()
    odd.symlink_to(model_dir, target_is_directory=True)
    for number, (name, (program, (command, *more))) in enumerate(RUNS.items()):
        (place / str(number)).mkdir()
        arguments = [command, str(odd if name == "a terminal" else model_dir), *more, "--max-new-tokens", "60", "--seed", "3"]
        jobs[name] = Job(f"import io, os, sys\nfrom keural.cli.app import main\n{program}", place / str(number), arguments)
    return run_in_forks("import keural.cli.app, keural.serve.chat, keural.serve.engines.transformers", jobs)


def test_too_few_file_descriptors(ended: dict[str, Ended]) -> None:
    code, _, error = ended["few files"]
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("keural: error: ")
    assert "too many open files; raise the limit" in error


@pytest.mark.parametrize("name", ["no input", "no output", "euc_kr", "ascii"])
def test_a_stream_that_is_closed_or_narrow_is_no_error(ended: dict[str, Ended], name: str) -> None:
    assert ended[name].code == 0, ended[name].error
    assert "Traceback" not in ended[name].error


def test_a_chat_without_standard_input(ended: dict[str, Ended]) -> None:
    code, _, error = ended["no questions"]
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("keural: error: ")
    assert "standard input is closed" in error
    assert "keural generate" in error


def test_a_path_with_markup_on_a_terminal(ended: dict[str, Ended]) -> None:
    code, shown, error = ended["a terminal"]
    assert code == 0, error
    assert "loading " in shown
    assert r"[bold]a\x1b]0;t\x07[/x]" in shown
    assert "\x1b]0;" not in shown


class TestRanks:
    """Under torchrun a cause is told once."""

    def end(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, rank: int, file: Path) -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        with pytest.raises(SystemExit) as stop, one_line_endings():
            raise error
        return int(stop.value.code or 0)

    def test_rank_0_speaks(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
        assert self.end(monkeypatch, UserError("wrong"), 0, tmp_path / "error") == 2
        assert capfd.readouterr().err == "keural: error: wrong\n"

    def test_another_rank_leaves_its_message_for_torchrun(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
    ) -> None:
        assert self.end(monkeypatch, UserError("no such file here"), 3, tmp_path / "error") == 2
        assert capfd.readouterr().err == ""
        assert json.loads((tmp_path / "error").read_text())["message"]["message"] == "keural: error: no such file here"

    def test_what_rank_0_tells_is_not_told_again(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
        assert self.end(monkeypatch, UserError("wrong", told=True), 1, tmp_path / "error") == 2
        assert capfd.readouterr().err == ""
        assert not (tmp_path / "error").exists()

    def test_a_lost_peer_is_one_line(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
        lost = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3")
        assert self.end(monkeypatch, lost, 0, tmp_path / "error") == 2
        assert "another rank has ended" in capfd.readouterr().err

    def test_a_bug_on_another_rank_is_not_printed_by_all(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
        assert self.end(monkeypatch, ZeroDivisionError("bug"), 1, tmp_path / "error") == 1
        assert capfd.readouterr().err == ""
        assert "ZeroDivisionError: bug" in json.loads((tmp_path / "error").read_text())["message"]["message"]


def test_a_bug_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ZeroDivisionError), one_line_endings():
        raise ZeroDivisionError


@pytest.mark.slow
class TestLaunch:
    def launch(self, *arguments: object) -> subprocess.Popen[str]:
        full = [sys.executable, "-m", "keural.launch", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def test_a_users_error_is_one_line_and_exit_code_2(self, tmp_path: Path) -> None:
        process = self.launch("run", "toy", "seed=-1", "--out", tmp_path)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 2
        assert out == ""
        assert [line for line in err.splitlines() if "keural: error:" in line] == err.splitlines()
        assert len(err.splitlines()) == 1
        assert "seed" in err

    def test_a_rank_that_is_killed_is_named(self, tmp_path: Path) -> None:
        process = self.launch("run", "toy", "--out", tmp_path, "--until", "pretrain-1")
        metrics = tmp_path / "pretrain-1" / "metrics.jsonl"
        while not metrics.exists() and process.poll() is None:
            pass
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        ranks = {self.rank(child): int(child) for child in children}
        os.kill(ranks["1"], signal.SIGKILL)
        _, err = process.communicate(timeout=240)
        assert process.returncode != 0
        assert "keural: error: rank 1 was ended by SIGKILL" in err
        assert "Traceback" not in err

    def rank(self, pid: str) -> str:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((entry.decode().removeprefix("RANK=") for entry in variables if entry.startswith(b"RANK=")), "")
