"""Programs run with limits, and pass@k."""

import contextlib
import ctypes
import itertools
import os
import socket
from pathlib import Path

import pytest

from keural.evaluate.generated import code
from keural.evaluate.generated.code import Limits, has_landlock, has_namespaces, mean_pass_at_k, pass_at_k, run_program
from tests.helpers.serving import wait_until

ENOUGH = Limits(seconds=240, processor_seconds=60, memory_bytes=1 << 28)
"""What a program comes to its end in, though the machine is slow and busy."""
SHORT = Limits(seconds=1, processor_seconds=60)


def test_a_program_passes_when_it_comes_to_its_end() -> None:
    assert run_program("import math\nassert math.sqrt(4) == 2\nprint('한글')", ENOUGH).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "ended early with status 0"),
        ("import os; os._exit(0)", "ended early with status 0"),
        ("raise SystemExit", "ended early"),
        ("input()", "EOFError"),
        ("x = '\\ud800'\nraise ValueError(x)", "ValueError"),
        ("'\ud800' + 1", "Error"),
        ("x = 'a' * (1 << 29)", "MemoryError"),
        ("import os\nos.write(2, b'a' * (1 << 22))\nos.write(2, b'a')", ""),
        ("files = [open('/dev/null') for _ in range(99)]", "Too many open files"),
        ("import numpy", "ModuleNotFoundError"),
        ("import sys\nwhile True: sys.stderr.write('x' * 100000)", ""),
    ],
)
def test_what_fails_says_why_and_harms_nobody(program: str, why: str) -> None:
    outcome = run_program(program, ENOUGH)
    assert not outcome.passed
    assert why in outcome.why
    assert len(outcome.why) <= 2000


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(600)"])
def test_what_does_not_end_is_ended(program: str) -> None:
    outcome = run_program(program, SHORT)
    assert (outcome.passed, outcome.why) == (False, "timed out after 1 s")


def test_a_program_knows_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "word")
    assert run_program(
        "import os\nassert 'SECRET' not in os.environ\nassert sorted(os.listdir()) == ['program.py', 'start.py']", ENOUGH
    ).passed


def test_a_program_has_a_directory_of_its_own_that_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("import os\nassert os.getcwd() == os.environ['HOME']\nprint(open('program.py').read())", ENOUGH).passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "program",
    [
        "open('left', 'w')",
        "open('/dev/shm/keural-left', 'w')",
        "open({outside!r}, 'w')",
        "open({outside!r}).read()",
        "import os\nos.listdir({parent!r})",
        "import os\nos.symlink({parent!r}, 'link')",
        "import os\nos.remove('start.py')",
        "import os\nos.mkdir('deep')",
        "import os\nos.truncate({outside!r}, 0)",
        "import os\nos.rename({outside!r}, {outside!r} + '2')",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import ctypes\nctypes.CDLL(None).syscall(444, None, 0, 1)\nopen({outside!r}).read()",
    ],
)
def test_a_program_writes_no_file_and_reads_none_but_pythons(program: str, tmp_path: Path) -> None:
    if ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 1:  # the kernel is asked, not what is tested
        pytest.skip("this system has no Landlock")
    assert has_landlock()
    (tmp_path / "outside").write_text("mine")

    outcome = run_program(program.format(outside=str(tmp_path / "outside"), parent=str(tmp_path)), ENOUGH)

    assert "PermissionError" in outcome.why
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("outside", "mine")]


def test_modules_of_python_are_read_under_the_lock() -> None:
    assert run_program(
        "import collections, ctypes, decimal, hashlib, heapq, itertools, json, random, re, statistics", ENOUGH
    ).passed


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(1100):\n    os.mkdir('d'); os.chdir('d')",
        "import os\nos.mkdir('q'); open('q/x', 'w').close(); os.chmod('q', 0)",
        "import os\nos.remove('start.py'); os.mkdir('start.py'); os.mkdir('said')",
    ],
)
def test_what_a_program_leaves_where_nothing_locks_it_is_removed(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(code, "_START", code._START.replace('landlock(orders["reads"])', ""))

    assert run_program(program, ENOUGH).passed
    assert list(tmp_path.iterdir()) == []


def test_a_program_has_no_network_and_leaves_no_process_behind() -> None:
    if not has_namespaces():
        pytest.skip("this system allows no new namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", ENOUGH)
    assert "Network is unreachable" in outcome.why or "refused" in outcome.why or "unreachable" in outcome.why
    marker = f"keural-left-{os.getpid()}"
    child = f"os.setsid()\n    ctypes.CDLL(None).prctl(15, b'{marker[:15]}', 0, 0, 0)\n    time.sleep(600)"
    assert run_program(f"import ctypes, os, time\nif os.fork() == 0:\n    {child}", ENOUGH).passed
    wait_until(lambda: marker[:15] not in names_of_processes())


def names_of_processes() -> list[str]:
    names = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(entry.read_text().strip())
    return names


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for samples in range(1, 7):
        for right in range(samples + 1):
            for k in range(1, samples + 1):
                draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
                assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws)), (samples, right, k)


def test_pass_at_k_of_a_set_is_the_mean_of_its_items() -> None:
    assert mean_pass_at_k([(10, 0), (10, 10), (10, 5)], 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_processor_time_has_a_limit_of_its_own() -> None:
    outcome = run_program("while True: pass", Limits(seconds=240, processor_seconds=1))
    assert "killed" in outcome.why
