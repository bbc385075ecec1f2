"""What a service manager hears of a server: that it is ready, that it lives, that it ends."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from keural.serve.server.supervisor import SOCKET, TICKS, WATCHDOG, WATCHDOG_PID, tell, watchdog
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import PATIENCE, Writing, service_of, serving, wait_until


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The manager's end of its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE)
        monkeypatch.setenv(SOCKET, str(tmp_path / "notify"))
        yield listening


def heard(manager: socket.socket, count: int) -> list[str]:
    return [manager.recv(4096).decode() for _ in range(count)]


def test_a_server_says_when_it_is_ready_and_when_it_ends(manager: socket.socket, tokenizer: KeuralTokenizer) -> None:
    with serving(service_of(tokenizer, Writing(tokenizer, "hello"))):
        assert heard(manager, 1) == ["READY=1"]

    assert heard(manager, 1) == ["STOPPING=1"]


def test_a_server_lives_as_long_as_its_network_does(
    manager: socket.socket, tokenizer: KeuralTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WATCHDOG, "200000")
    slots = Writing(tokenizer, "hello")
    service = service_of(tokenizer, slots)

    def fail() -> None:
        raise SystemExit  # the thread ends, the process does not

    with serving(service) as client:
        assert heard(manager, 3) == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        slots.before_step = fail
        client.post("/v1/completions", json={"prompt": "x"})
        wait_until(lambda: client.get("/health").status_code == 503)
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # what was said before
                heard(manager, 1)
        manager.settimeout(0.5)
        with pytest.raises(TimeoutError):
            heard(manager, 1)


@pytest.mark.parametrize(
    ("patience", "process", "ticks"),
    [("60000000", "", 30 * TICKS), ("1", "", 1), ("0", "", 0), ("", "", 0), ("soon", "", 0), ("60000000", "1", 0)],
)
def test_a_manager_is_told_twice_within_its_patience(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, patience: str, process: str, ticks: int
) -> None:
    monkeypatch.setenv(WATCHDOG, patience)
    monkeypatch.setenv(WATCHDOG_PID, process)
    tick = watchdog(lambda: None)
    manager.setblocking(False)
    for counter in range(1, (ticks or 5) + 1):
        tick(counter)

    if ticks:
        assert heard(manager, 1) == ["WATCHDOG=1"]
    with pytest.raises(BlockingIOError):
        manager.recv(1)


@pytest.mark.parametrize("address", ["", "nowhere", "/no/such/socket", "@no-such-socket", "/" + "x" * 200])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(SOCKET, address)

    tell("READY=1")


def test_a_socket_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"keural-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name)
        listening.settimeout(PATIENCE)
        monkeypatch.setenv(SOCKET, "@" + name)
        tell("READY=1")

        assert heard(listening, 1) == ["READY=1"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_server_leaves_nothing_and_needs_no_room(manager: socket.socket, model_dir: Path, tmp_path: Path) -> None:
    """As the image and the service run it: no home, nothing written beside the model or kept; and its log goes to a full disk."""
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "HOME": "/no/such/home", "TMPDIR": str(tmp_path / "tmp")}
    files = {path: path.stat().st_mtime_ns for path in model_dir.rglob("*")}
    command = [sys.executable, "-m", "keural", "serve", str(model_dir), "--port", "0", "--threads", "1"]
    with open("/dev/full", "w") as full:
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=full, text=True)
    try:
        manager.settimeout(2 * PATIENCE)
        assert heard(manager, 1) == ["READY=1"]
        assert running.stdout is not None
        address = running.stdout.readline().split()[2]
        for _ in range(2):
            answer = httpx.post(f"{address}/completions", json={"prompt": "x", "max_tokens": 3}, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
    finally:
        running.terminate()
        running.communicate(timeout=PATIENCE)

    assert running.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in model_dir.rglob("*")} == files
    assert not list((tmp_path / "tmp").iterdir())
