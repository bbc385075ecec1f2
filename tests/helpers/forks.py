"""Code in interpreters that are fresh but for what was imported once: a start from nothing costs seconds where torch is imported.

In: what all of them have, and a program for each. Out: how each ended. One process imports, and each program runs in a fork of it,
so that none sees what another one did.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_RUN = """
import json, os, sys, traceback

def run(program, place, arguments):
    os.chdir(place)
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(place + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["-c", *arguments]
    code = 0
    try:
        exec(program, {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)

codes = []
for job in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        run(*job)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
json.dump(codes, sys.stdout)
"""


class Ended(NamedTuple):
    """How a program ended, and what it wrote."""

    code: int
    out: str
    error: str


class Job(NamedTuple):
    """A program, the directory that it runs in (beside which its output is put), and its arguments."""

    program: str
    directory: Path
    arguments: Sequence[str] = ()


def run_in_forks(imported: str, jobs: Mapping[str, Job]) -> dict[str, Ended]:
    """Run every job, one after the other, where the code `imported` was run before."""
    told = json.dumps([(job.program, str(job.directory), list(job.arguments)) for job in jobs.values()])
    done = subprocess.run(
        [sys.executable, "-c", imported + _RUN], input=told, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return {
        name: Ended(code, *(Path(f"{job.directory}.{kind}").read_text(errors="replace") for kind in ("out", "error")))
        for code, (name, job) in zip(json.loads(done.stdout), jobs.items(), strict=True)
    }
