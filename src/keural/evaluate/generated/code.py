"""Programs that a model wrote, run once each in a process of their own with limits; and pass@k.

In: a program. Out: whether it came to its end. What is guarded: wall time, processor time, memory, number of open files and
size of written ones, number of processes, standard input and output, the environment, the working directory (a new one, removed
afterwards); and where the system allows new namespaces, the network is taken away and everything that the program started ends
with it. What is not: a program can read what this user can read; without namespaces it can open connections and leave processes
behind; and one that is made for it can say that it passed. Run programs only where that does not matter: in a container, as a
user without rights.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from shutil import which

SHOWN = 2000
"""Characters of a failure that are kept."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Of wall time."""
    processor_seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    """Of each file that it writes."""
    open_files: int = 32
    processes: int = 16
    """Beyond those that the user runs; where the user is root, the system does not hold to it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program, and where it did not pass, why: the end of its error, or the limit."""

    passed: bool
    why: str = ""


_DEFAULT_LIMITS = Limits()


def run_program(program: str, limits: Limits = _DEFAULT_LIMITS) -> Outcome:
    """Run Python code in a new process, with the standard library alone; never raises for what the code does.

    It passes when it comes to its end: a process that ends earlier with status 0 (`sys.exit(0)`) has not.
    """
    with tempfile.TemporaryDirectory(prefix="keural-code-") as place:
        directory = Path(place)
        (directory / "program.py").write_text(program + "\n", encoding="utf-8", errors="backslashreplace")
        (directory / "start.py").write_text(_START, encoding="utf-8")
        word = os.urandom(16).hex()
        said, failed = directory / "said", directory / "failed"
        with said.open("wb") as answer, failed.open("wb") as errors:
            process = subprocess.Popen(
                [*_namespaces(), sys.executable, "-I", "-S", "-B", "start.py"],
                cwd=directory,
                env={"PATH": "/usr/bin:/bin", "HOME": place, "TMPDIR": place, "LANG": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=errors,
                start_new_session=True,
            )
            ended = _wait(process, json.dumps({"word": word, "used": _processes(), **asdict(limits)}), limits.seconds)
        if not ended:
            return Outcome(False, f"timed out after {limits.seconds:g} s")
        if process.returncode == 0 and _beginning(said) == word:
            return Outcome(True)
        if process.returncode < 0 or process.returncode > 128:
            number = -process.returncode if process.returncode < 0 else process.returncode - 128
            return Outcome(False, f"killed by signal {number}")
        why = _beginning(failed)[-SHOWN:]
        if why.startswith("unshare:"):  # which cannot always end as its child did
            return Outcome(False, "killed by a signal")
        return Outcome(False, why or f"ended early with status {process.returncode}")


def _wait(process: "subprocess.Popen[bytes]", orders: str, seconds: float) -> bool:
    """Give a process its orders and let it end; False where it took too long. Its group ends in any case."""
    try:
        process.communicate(orders.encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def _beginning(file: Path) -> str:
    """What a program wrote into a file of ours, as far as anybody wants to know."""
    with file.open("rb") as stream:
        return stream.read(1 << 20).decode("utf-8", "replace").strip()


_START = """
import io, json, os, resource, sys

orders = json.loads(sys.stdin.read())
answer = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
os.dup2(nowhere, 0)
os.dup2(nowhere, 1)
sys.stdin = io.StringIO()
seconds, user = orders["processor_seconds"], orders["used"] + orders["processes"]
for limit, most in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, orders["memory_bytes"]),
    (resource.RLIMIT_FSIZE, orders["file_bytes"]),
    (resource.RLIMIT_NOFILE, orders["open_files"]),
    (resource.RLIMIT_NPROC, user),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (most, most))
with open("program.py", encoding="utf-8") as file:
    code = compile(file.read(), "program.py", "exec")


def run(word):
    exec(code, {"__name__": "program"})
    os.write(answer, word.encode())


run(orders.pop("word"))
"""
"""Limits itself, runs the program, and says the word that it was given where it comes to the end. What is printed is lost."""


def _processes() -> int:
    """Threads of this user, with which the system's limit is counted."""
    user, found = os.getuid(), 0
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):  # ended meanwhile
            if entry.name.isdigit() and entry.stat().st_uid == user:
                found += len(os.listdir(f"/proc/{entry.name}/task"))
    return found


@cache
def _namespaces() -> tuple[str, ...]:
    """The command that gives a program no network and processes of its own; none where the system does not allow it."""
    unshare = which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def has_namespaces() -> bool:
    """Whether programs run here without a network, and cannot leave processes behind."""
    return bool(_namespaces())


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples is right (Chen et al. 2021, equation 1), from `samples` with `right`.

    Raises ValueError for impossible numbers.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {right} right ones among {samples}")
    return 1.0 - math.prod(1.0 - k / count for count in range(samples - right + 1, samples + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """pass@k of a set of items, each with its numbers of samples and of right ones; at least one item."""
    return sum(pass_at_k(samples, right, k) for samples, right in counts) / len(counts)
