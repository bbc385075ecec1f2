"""Programs that a model wrote, run once each in a process of their own with limits; and pass@k.

In: a program. Out: whether it came to its end. What is guarded: wall time, processor time, memory of each process, number of open
files and processes, standard input and output, the environment, the working directory (a new one, removed afterwards). Where Linux
has Landlock, it writes no file anywhere and reads Python's own alone; where the system allows new namespaces, there is no network
and everything that it started ends with it. What is not: without these two it can write, read and connect as this user can, and
leave processes behind; and one that is made for it can say that it passed. Run programs only where that does not matter: in a
container, as a user without rights.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from shutil import which
from typing import IO

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
    with _directory() as directory:
        (directory / "program.py").write_text(program + "\n", encoding="utf-8", errors="backslashreplace")
        (directory / "start.py").write_text(_START, encoding="utf-8")
        word = os.urandom(16).hex()
        with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [*_namespaces(), sys.executable, "-I", "-S", "-B", "start.py"],
                cwd=directory,
                env={"PATH": "/usr/bin:/bin", "HOME": str(directory), "TMPDIR": str(directory), "LANG": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=errors,
                start_new_session=True,
            )
            orders = {"word": word, "used": _processes(), "reads": [*_READS, str(directory)], **asdict(limits)}
            ended = _wait(process, json.dumps(orders), limits.seconds)
            said, why = _beginning(answer), _beginning(errors)[-SHOWN:]
        if not ended:
            return Outcome(False, f"timed out after {limits.seconds:g} s")
        if process.returncode == 0 and said == word:
            return Outcome(True)
        if process.returncode < 0 or process.returncode > 128:
            number = -process.returncode if process.returncode < 0 else process.returncode - 128
            return Outcome(False, f"killed by signal {number}")
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


def _beginning(file: IO[bytes]) -> str:
    """What a program wrote into a file of ours, as far as anybody wants to know."""
    file.seek(0)
    return file.read(1 << 20).decode("utf-8", "replace").strip()


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A new directory, gone afterwards whatever was made in it: names without rights, and more levels than Python can go down."""
    place = Path(tempfile.mkdtemp(prefix="keural-code-"))
    try:
        yield place
    finally:
        try:
            shutil.rmtree(place)
        except (OSError, RecursionError):
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", str(place)], capture_output=True, check=False)


_READS = (
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("platstdlib"),
    f"{sys.base_prefix}/lib",
    *("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"),
)
"""What a program may read: Python's modules, and the libraries that these load."""


_START = """
import ctypes, io, json, os, resource, sys


def landlock(reads):
    "No file can be written any more, and only these be read; False where the system has no Landlock."
    call = ctypes.CDLL(None, use_errno=True).syscall
    version = call(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = call(444, ctypes.byref(ctypes.c_uint64(handled)), ctypes.c_size_t(8), 0)
    for path in reads:
        try:
            place = os.open(path, os.O_PATH)
        except OSError:
            continue
        allowed = 0b1101 if os.path.isdir(path) else 0b101
        rule = allowed.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        call(445, rules, 1, rule, 0)
        os.close(place)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
    locked = call(446, rules, 0) == 0
    os.close(rules)
    return locked


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
landlock(orders["reads"])
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


@cache
def has_landlock() -> bool:
    """Whether programs write no files here, and read Python's own alone."""
    return not run_program("open('written', 'w')").passed


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
