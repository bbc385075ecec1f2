"""What killed processes leave is cleared, and damaged files are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keural.errors import UserError
from keural.files import atomic_directory, clear_leftovers, read_json, read_object, read_yaml, write_atomic, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
from keural import files
files.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "file":
    files.write_atomic(Path(sys.argv[1]) / "summary.json", "x" * 100_000)
else:
    with files.atomic_directory(Path(sys.argv[1]) / "model") as directory:
        (directory / "weights").write_bytes(b"x")
"""


def left_by_a_killed_process(directory: Path, kind: str) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(directory), kind], check=False)
    assert process.returncode == -9


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_process_left_is_cleared_wherever_it_lies(tmp_path: Path, kind: str) -> None:
    inner = tmp_path / "stage" / "data"
    inner.mkdir(parents=True)
    left_by_a_killed_process(inner, kind)
    assert len(list(inner.iterdir())) == 1

    clear_leftovers(tmp_path)

    assert list(inner.iterdir()) == []


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = [
        "notes.tmp", ".notes.tmp", f".notes.{dead.pid}.tmp", f"notes.{dead.pid}-0123abcd.tmp", f".x.{alive.pid}-0123abcd.tmp",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".x.{alive.pid}.tmp").mkdir()
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "notes.tmp")

    clear_leftovers(tmp_path)

    alive.communicate(b"\n")
    assert {path.name for path in tmp_path.iterdir()} == {*names, f".x.{alive.pid}.tmp", ".link.tmp"}


def test_a_file_that_another_machine_is_writing_stays(tmp_path: Path) -> None:
    import fcntl

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / f".summary.json.{dead.pid}-0123abcd.tmp"  # its number says nothing here: the lock does
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        clear_leftovers(tmp_path)
        assert path.exists()
    clear_leftovers(tmp_path)
    assert not path.exists()


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", "x")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "b") as directory:
        (directory / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_utf_8_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x1b.txt")
    write_json(tmp_path / "a.json", {name: [name]})
    assert read_json(tmp_path / "a.json") == {name: [name]}


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe\x00", b"", b"{", b"\0" * 100],
    ids=["brackets", "objects", "digits", "bytes", "empty", "half", "zeros"],
)  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keural.json"
    path.write_bytes(content)
    for read in (read_json, read_object, read_yaml):
        if read is read_yaml and content in (b"", b"9" * 5000):
            continue
        with pytest.raises(UserError, match=r"keural\.json: not ") as caught:
            read(path)
        assert len(str(caught.value)) < 500


def test_a_value_of_another_kind_is_no_object(tmp_path: Path) -> None:
    for value in ([], "x", 3, None):
        (tmp_path / "a.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match="not a JSON object"):
            read_object(tmp_path / "a.json")


def test_a_directory_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
