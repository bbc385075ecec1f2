"""Files of results: what is appended is read back, a kill costs the line that it cut, anything else that is wrong is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from keural.errors import UserError
from keural.evaluate.results.records import ItemResult
from keural.evaluate.results.store import Header, LeftOut, ModelIdentity, find_results, open_results, read_results, results_file
from keural.files import fingerprint

MODEL = ModelIdentity("toy-sft-1", "ab" * 32, "cd" * 32, "bos", "", "float32", "transformers")
HEADER = Header(MODEL, "kobest_copa", "ko", "choice", 0.5, "ef" * 32, 3, left_out={"no_word": 2})


def item(number: int) -> ItemResult:
    return ItemResult(f"id{number}", None, float(number % 2), "왜?\n\x1b", "A", "B", (-1.5, -0.25), 7, {"scores": {"sum": 1.0}})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = results_file(tmp_path, HEADER)
    with open_results(file, HEADER) as writer:
        writer.append([(2, item(2)), (0, item(0))])
        writer.append([(1, LeftOut("id1", "too_long", "900 tokens"))])
    return file


def test_what_is_appended_is_read_back_in_the_order_of_the_set(path: Path) -> None:
    results = read_results(path).results()

    assert results.items == [item(0), item(2)]
    assert (results.task, results.language, results.kind, results.chance) == ("kobest_copa", "ko", "choice", 0.5)
    assert results.left_out == {"no_word": 2, "too_long": 1}
    assert read_results(path).results(2).items == [item(0)]


def test_baselines_are_of_as_many_items_as_they_say(path: Path) -> None:
    with open_results(path, HEADER) as writer:
        writer.append_baselines(2, {"xz_9": 2.5})

    kept = read_results(path)

    assert kept.results(2).baselines == {"xz_9": 2.5}
    assert kept.results().baselines == {}


def test_baselines_that_an_earlier_version_wrote_into_the_header_are_of_the_whole_set(path: Path) -> None:
    header, *lines = path.read_bytes().splitlines(keepends=True)
    value = json.loads(header)
    del value["checksum"]
    value["baselines"] = {"xz_9": 2.5}
    whole = {**value, "checksum": fingerprint(value)[:16]}
    path.write_bytes(json.dumps(whole).encode() + b"\n" + b"".join(lines))

    assert read_results(path).results().baselines == {"xz_9": 2.5}
    assert read_results(path).results(1).baselines == {}


@pytest.mark.parametrize("line", [{"first": -1, "baselines": {}}, {"first": 1, "baselines": {"xz_9": "2"}}, {"baselines": {}}])
def test_baselines_of_another_form_are_refused_by_line(path: Path, line: dict[str, object]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(line | {"checksum": fingerprint(line)[:16]}).encode() + b"\n")

    with pytest.raises(UserError, match=rf"{path}:5: is no result"):
        read_results(path)


def test_a_second_process_appends_to_what_is_there(path: Path) -> None:
    with open_results(path, HEADER) as writer:
        assert set(writer.items) == {"id0", "id1", "id2"}
        writer.append([(0, item(3))])

    assert len(read_results(path).items) == 4


def test_a_model_is_found_again_under_another_name(path: Path, tmp_path: Path) -> None:
    other = replace(HEADER, model=replace(MODEL, name="final"))

    assert results_file(tmp_path, other) == path
    assert results_file(tmp_path, replace(HEADER, model=replace(MODEL, dtype="bfloat16"))) != path
    assert find_results(tmp_path) == [path]


def test_a_line_that_a_kill_cut_is_passed_over_and_then_cut_off(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        assert set(read_results(path).items) == {"id0", "id2"}
    with open_results(path, HEADER) as writer:
        writer.append([(1, item(1))])

    assert set(read_results(path).items) == {"id0", "id1", "id2"}
    assert "half-written" in capsys.readouterr().out


def test_a_header_that_a_kill_cut_is_written_again(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])

    with pytest.raises(UserError, match="no results yet"):
        read_results(path)
    with open_results(path, HEADER) as writer:
        writer.append([(0, item(0))])
    assert read_results(path).results().items == [item(0)]


@pytest.mark.parametrize("line", [1, 2, 3, 4])
def test_every_byte_of_every_line_is_guarded(path: Path, line: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    for place in range(0, len(lines[line - 1]) - 1, 17):
        damaged = bytearray(lines[line - 1])
        damaged[place] ^= 1
        if b"\n" in damaged[:-1]:
            continue
        path.write_bytes(b"".join([*lines[: line - 1], bytes(damaged), *lines[line:]]))
        with pytest.raises(UserError, match=rf"{path}:{line}: (damaged|is no)|of another version"):
            read_results(path)


@pytest.mark.parametrize("added", [b"\n", b"[]\n", b"\x00\x00\x00\n", b"nothing\n"])
def test_lines_that_were_never_written_are_refused(path: Path, added: bytes) -> None:
    with path.open("ab") as file:
        file.write(added)

    with pytest.raises(UserError, match=rf"{path}:5: damaged"), open_results(path, HEADER):
        pass


@pytest.mark.parametrize("place", [-1, 3, True, 1.0, None])
def test_an_item_whose_place_is_not_in_the_set_is_refused(path: Path, place: object) -> None:
    line = item(9).to_json() | {"number": place}
    with path.open("ab") as file:
        file.write(json.dumps(line | {"checksum": fingerprint(line)[:16]}).encode() + b"\n")

    with pytest.raises(UserError, match=rf"{path}:5: is no result"):
        read_results(path)


@pytest.mark.parametrize("change", [{}, {"score": 0.5}])
def test_an_item_that_is_there_twice_is_refused(path: Path, change: dict[str, object]) -> None:
    line = item(0).to_json() | {"number": 0} | change
    with path.open("ab") as file:
        file.write(json.dumps(line | {"checksum": fingerprint(line)[:16]}).encode() + b"\n")

    with pytest.raises(UserError, match=rf"{path}:5: has item id0 a second time"):
        read_results(path)


def test_an_item_that_was_left_out_or_cut_may_be_asked_once_more_in_the_other_way(path: Path) -> None:
    cut = replace(item(1), details={"cut": 5})
    for entry in (cut, LeftOut("id1", "too_long", "900 tokens"), cut):
        with open_results(path, HEADER) as writer:
            writer.append([(1, entry)])
        assert read_results(path).items["id1"] == (1, entry)


@pytest.mark.parametrize("score", [3.0, -0.5])
def test_a_score_that_is_no_share_is_refused_but_for_bits(path: Path, tmp_path: Path, score: float) -> None:
    with open_results(path, HEADER) as writer:
        writer.append([(0, replace(item(3), score=score))])
    with pytest.raises(UserError, match=rf"{path}:5: is no result"):
        read_results(path)
    bits = replace(HEADER, kind="rolling", digest="12" * 32)
    with open_results(results_file(tmp_path, bits), bits) as writer:
        writer.append([(0, replace(item(3), score=3.0))])
    assert read_results(results_file(tmp_path, bits)).items["id3"][1] == replace(item(3), score=3.0)


@pytest.mark.parametrize("change", [{"chance": float("nan")}, {"chance": 2.0}, {"size": -1}, {"shots": -1}, {"more": 1}])
def test_a_header_of_impossible_values_is_none(path: Path, change: dict[str, object]) -> None:
    header, *lines = path.read_bytes().splitlines(keepends=True)
    value = json.loads(header) | change
    del value["checksum"]
    whole = {**value, "checksum": fingerprint(value)[:16]}
    path.write_bytes(json.dumps(whole).encode() + b"\n" + b"".join(lines))

    with pytest.raises(UserError, match=rf"{path}:1: (is no header of results|damaged)"):
        read_results(path)


def test_a_file_without_its_header_has_none(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))

    with pytest.raises(UserError, match=rf"{path}:1: is no header of results"):
        read_results(path)


def test_a_pipe_in_their_place_is_not_waited_for(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(UserError, match="a pipe or a device"):
        read_results(path)
    with pytest.raises(UserError, match="a pipe or a device"), open_results(path, HEADER):
        pass


def test_results_of_something_else_in_their_place_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match="another model or task"), open_results(path, replace(HEADER, digest="00" * 32)):
        pass


def test_two_processes_do_not_write_at_once(path: Path) -> None:
    with (
        open_results(path, HEADER),
        pytest.raises(UserError, match="another process evaluates"),
        open_results(path, HEADER),
    ):
        pass


def test_a_process_that_is_killed_keeps_every_batch_that_it_finished(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.getcwd()!r})
from pathlib import Path
from tests.evaluate.test_results import HEADER, item
from keural.evaluate.results.store import open_results
with open_results(Path({str(tmp_path)!r}) / "a" / "b.jsonl", HEADER) as writer:
    writer.append([(0, item(0))])
    writer.append([(1, item(1)), (2, item(2))])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9

    assert set(read_results(tmp_path / "a" / "b.jsonl").items) == {"id0", "id1", "id2"}
