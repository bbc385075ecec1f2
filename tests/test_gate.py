"""The gate says how much disk it needs, and begins nothing where less is free."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parents[1] / ".ci" / "run"
(NEEDED,) = map(int, re.findall(r"^needed=(\d+)", GATE.read_text(), re.MULTILINE))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the gate, an environment of 3 MB and a `make` that ends at once, as if the first target failed."""
    for name in (".ci", ".venv", "bin"):
        (tmp_path / name).mkdir()
    shutil.copy(GATE, tmp_path / ".ci" / "run")
    (tmp_path / ".venv" / "library").write_bytes(b"x" * 3_000_000)
    (tmp_path / "bin" / "make").write_text('#!/bin/sh\necho "make $*"\nexit 7\n')
    return tmp_path


def run_gate(checkout: Path, free_kb: int) -> subprocess.CompletedProcess[str]:
    """With so much free on the disk as `df` tells."""
    (checkout / "bin" / "df").write_text(f"#!/bin/sh\necho 'Filesystem 1024-blocks Used Available'\necho 'disk 0 0 {free_kb} 0'\n")
    for program in (checkout / "bin").iterdir():
        program.chmod(0o700)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(checkout)}
    return subprocess.run([checkout / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)


def test_a_disk_that_is_too_small_is_refused_in_one_line_and_nothing_is_removed(checkout: Path) -> None:
    done = run_gate(checkout, NEEDED * 1_000_000 - 10_000)
    assert done.returncode == 1
    assert done.stdout == f".ci/run needs {NEEDED} GB of disk; {NEEDED - 1} GB are free in {checkout}\n"
    assert (checkout / ".venv" / "library").exists()


def test_what_it_removes_counts_as_free_and_nothing_is_left_of_a_gate_that_failed(checkout: Path) -> None:
    done = run_gate(checkout, NEEDED * 1_000_000 - 1_000)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (7, ["make setup"])
    assert {path.name for path in checkout.iterdir()} == {".ci", "bin"}
