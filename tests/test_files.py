"""Files are whole or absent, and believed only when they are what was written."""

import os
from pathlib import Path

import pytest

from keural.errors import UserError
from keural.files import (
    CheckedFile,
    FileHashes,
    FileState,
    check_output,
    fingerprint,
    read_checked_text,
    read_object,
    read_text,
    remembered_check,
    sha256_file,
    write_atomic,
    write_checked_text,
    write_json,
)
from tests.helpers.serving import wait_until


class Marker(CheckedFile):
    """A file with one value of each kind that markers have."""

    name: str
    steps: int
    losses: dict[str, float]
    files: list[str]


MARKER = Marker(name="chat 한", steps=12, losses={"loss": 0.1, "other": float("nan")}, files=["a", "b"])


def test_a_checked_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    MARKER.write(tmp_path / "marker.json")
    assert repr(Marker.read(tmp_path / "marker.json")) == repr(MARKER)
    assert Marker.find(tmp_path / "other.json") is None


def test_every_flipped_bit_of_it_is_refused_in_one_line_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "marker.json"
    MARKER.write(path)
    content = path.read_bytes()
    refused, told = 0, set()
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert repr(Marker.read(path)) == repr(MARKER)  # white space between values
        except UserError as error:
            refused += 1
            told.add((str(error).startswith(f"{path}: "), "delete it and run the same command again" in str(error)))
    assert told == {(True, True)}
    assert refused > 7 * len(content)


def test_a_file_without_a_checksum_is_not_a_checked_one(tmp_path: Path) -> None:
    write_json(tmp_path / "marker.json", MARKER.model_dump())
    with pytest.raises(UserError, match="written by an earlier version of keural"):
        Marker.read(tmp_path / "marker.json")


@pytest.mark.parametrize("change", [{"steps": "12"}, {"steps": 1.5}, {"more": 1}, {"losses": []}, {"name": None}])
def test_wrong_types_are_refused_whatever_the_checksum_says(tmp_path: Path, change: dict[str, object]) -> None:
    content = MARKER.model_dump() | change
    write_json(tmp_path / "marker.json", {"checksum": fingerprint(content), **content})
    with pytest.raises(UserError, match=f"key '{next(iter(change))}"):
        Marker.read(tmp_path / "marker.json")


def test_a_checked_text_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_checked_text(path, "name: 한\nsteps: 3\n")
    assert read_checked_text(path) == "name: 한\nsteps: 3\n"
    for text in (path.read_text().replace("3\n", "4\n"), "name: 한\nsteps: 3\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=r"recipe\.yaml: is not what keural wrote there"):
            read_checked_text(path)


def let_the_clock_step(file: Path, clock: Path) -> None:
    """Wait until a change of a file would show in its times, as it does in another file's: a file system's clock has steps."""
    wait_until(lambda: clock.write_text("x") and clock.stat().st_ctime_ns > file.stat().st_ctime_ns)


class TestFileHashes:
    """Checksums of big files are remembered, and never believed of a file that has changed."""

    @pytest.fixture
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file that was written some time ago."""
        path = tmp_path / "data.jsonl"
        path.write_text("the sea")
        monkeypatch.setattr("keural.files.SETTLED_NS", -1)
        return path

    def remembered(self, directory: Path, data: Path) -> FileHashes:
        hashes = FileHashes(directory / "hashes.json")
        hashes.of(data)
        hashes.save()
        return FileHashes(directory / "hashes.json")

    def test_a_file_is_read_once(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hashes = self.remembered(tmp_path, data)
        monkeypatch.setattr("keural.files.sha256_file", lambda path: 1 / 0)
        assert hashes.of(data) == FileHashes(tmp_path / "hashes.json").of(data)

    def test_a_change_of_equal_size_and_time_is_noticed(self, data: Path, tmp_path: Path) -> None:
        hashes, before = self.remembered(tmp_path, data), data.stat()
        digest = hashes.of(data)
        let_the_clock_step(data, tmp_path / "clock")
        data.write_text("the zea")
        os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (data.stat().st_size, data.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert hashes.of(data) != digest

    def test_so_is_another_file_in_its_place(self, data: Path, tmp_path: Path) -> None:
        hashes, digest = self.remembered(tmp_path, data), self.remembered(tmp_path, data).of(data)
        other = tmp_path / "other"
        other.write_text("the zea")
        os.utime(other, ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns))
        other.replace(data)
        assert hashes.of(data) != digest

    def test_a_file_that_may_change_within_one_tick_of_the_clock_is_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text("fresh")
        state = FileState.of(path)
        assert [state.is_settled(state.changed + seconds * 10**9) for seconds in (0, 1, 2, 3)] == [False, False, False, True]
        monkeypatch.setattr("keural.files.SETTLED_NS", 3600 * 10**9)  # however late it is by now
        hashes = FileHashes(tmp_path / "hashes.json")
        hashes.of(path)
        hashes.save()
        assert read_object(tmp_path / "hashes.json")["files"] == {}

    @pytest.mark.parametrize("content", ["", "[]", '{"checksum": "x", "files": {}}', '{"a.jsonl": [7, 7, "0"]}'])
    def test_a_damaged_memory_is_said_and_made_again(
        self, content: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        digest = self.remembered(tmp_path, data).of(data)
        (tmp_path / "hashes.json").write_text(content)
        again = FileHashes(tmp_path / "hashes.json")
        assert "hashes.json: damaged" in capfd.readouterr().out
        assert again.of(data) == digest
        again.save()
        assert FileHashes(tmp_path / "hashes.json").of(data) == digest
        assert capfd.readouterr().out == ""


def test_a_check_is_done_again_only_when_a_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keural.files.SETTLED_NS", -1)
    directory, memory, done = tmp_path / "model", tmp_path / "checked.json", []
    directory.mkdir()
    (directory / "a").write_text("1")

    def rewrite() -> None:
        let_the_clock_step(directory / "a", tmp_path / "clock")
        (directory / "a").write_text("2")

    for change, times in ((lambda: None, 1), (lambda: None, 1), (rewrite, 2)):
        change()
        remembered_check(directory, memory, lambda: done.append(1))
        assert len(done) == times
    (directory / "b").touch()
    remembered_check(directory, memory, lambda: done.append(1))
    memory.write_text("[]")
    remembered_check(directory, memory, lambda: done.append(1))
    assert len(done) == 4


def test_a_check_that_fails_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keural.files.SETTLED_NS", -1)

    def fail() -> None:
        raise UserError("damaged")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").touch()
    for _ in range(2):
        with pytest.raises(UserError):
            remembered_check(tmp_path / "model", tmp_path / "checked.json", fail)


@pytest.mark.parametrize(
    ("blocked", "written", "advice"),
    [
        ("there/", "there", "it is a directory: move it away, or choose another directory"),
        ("file", "file/there", "a file is where a directory of its path should be"),
        (None, "a" * 300, "choose a shorter name"),
    ],
)
def test_the_advice_fits_what_the_system_refused(tmp_path: Path, blocked: str | None, written: str, advice: str) -> None:
    if blocked is not None and blocked.endswith("/"):
        (tmp_path / blocked / "inside").mkdir(parents=True)
    elif blocked is not None:
        (tmp_path / blocked).touch()

    with pytest.raises(UserError, match="cannot be written") as refused:
        write_atomic(tmp_path / written, "text")

    assert advice in str(refused.value)
    assert "free some space" not in str(refused.value)


def test_what_might_never_end_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (read_text, read_object, read_checked_text, Marker.read, Marker.find):
        with pytest.raises(UserError, match=r"pipe: .*(a pipe or a device|no such file)"):
            read(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(OSError, match="a pipe or a device, not a file"):
            sha256_file(path)


def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    pipe, device = tmp_path / "pipe", tmp_path / "device"
    os.mkfifo(pipe)
    device.symlink_to("/dev/full")
    for path in (pipe, device):
        with pytest.raises(UserError, match=f"{path}: is a pipe or a device"):
            write_atomic(path, "figures")
    assert pipe.is_fifo()
    assert device.is_symlink()
    assert sorted(tmp_path.iterdir()) == [device, pipe]


def test_only_a_file_can_be_replaced_by_an_output(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("earlier figures")
    link.symlink_to(file)
    os.mkfifo(pipe)
    check_output(file)
    check_output(tmp_path / "new" / "figures.json")
    refused = {tmp_path: "is a directory", link: "is a link", pipe: "a pipe", file / "x": "is no directory"}
    refused[Path("-")] = "standard output"
    for path, reason in refused.items():
        with pytest.raises(UserError, match=rf"--json {path}: .*{reason}"):
            check_output(path, "--json")


def test_an_output_is_refused_before_the_work_where_its_directory_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.symlink_to(tmp_path)
    gone.symlink_to(tmp_path / "nowhere")
    check_output(there / "figures.json")
    for path in (gone / "figures.json", gone / "more" / "figures.json"):
        with pytest.raises(UserError, match=rf"{gone} is no directory that can be written to"):
            check_output(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"{tmp_path} is no directory that can be written to"):
        check_output(tmp_path / "figures.json")
