"""The benchmarks of the server run small: they find what they are to find, and every figure is there."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    return done.stdout


def rows(page: str) -> dict[str, list[str]]:
    """The lines of all tables by their first column."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


@pytest.mark.slow
def test_under_load_nothing_is_lost_and_every_request_ends_once(tmp_path: Path) -> None:
    out = tmp_path / "load.md"
    page = run("serving_load.py", str(tmp_path / "work"), "--small", "--out", str(out))
    assert out.read_text() == page.removesuffix("\n")
    found = rows(page)
    assert found["streams that came whole"][0] == "50 of 50"
    assert found["tokens that came"][0] == "400 of 400"
    statuses = {part.split(":")[0] for part in found["answers by status"][0].split(", ")}
    assert statuses == {"200", "429"}
    assert found["answers with a status that they must not have"][0] == "0"
    taken, ended, still_open = found["answers taken, ended, open"][0].split(", ")
    assert taken == ended
    assert still_open == "0"
    success, whole = found["`request_success_total`, `e2e_request_latency_seconds_count`"][0].split(", ")
    assert success == whole == found["`request_success_total`, `e2e_request_latency_seconds_count`"][1]
    assert found["running, waiting by `/metrics`"][0] == "0, 0"
    assert found["slots in use; that hold other tokens than believed"][0] == "0, 0"
    assert found["all slots answer afterwards"][0] == "4 of 4"
    assert found["exit code after SIGTERM"][0] == "0"


@pytest.mark.slow
def test_speed_is_measured_on_every_engine_that_is_here(tmp_path: Path) -> None:
    page = run("serving_speed.py", str(tmp_path), "--small", "--rounds", "1")
    found = rows(page)
    assert "ours, greedy" in found
    assert "ours, card" in found
    reused = [line for line in page.splitlines() if line.startswith("| ours |")]
    assert reused
    assert all(line.endswith("| 6 |") for line in reused), "of the second turn only the five new tokens and one more are read"
    try:
        import llama_cpp  # noqa: F401
    except ModuleNotFoundError:
        return
    assert float(found["1"][0]) > 0
    assert found["4, greedy"][0].startswith("x")
