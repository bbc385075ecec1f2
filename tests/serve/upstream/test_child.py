"""An engine as a child: how it starts, dies, comes back and ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from keural.errors import UserError
from keural.serve.batching.requests import Event, Request
from keural.serve.batching.runner import Ticket
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.upstream import watch
from keural.serve.upstream.models import FrontModel, find_export, front_model
from keural.serve.upstream.opening import CONTRACTS, own
from keural.tokenizer import KeuralTokenizer
from tests.conftest import Keural
from tests.helpers.fake_installs import install, install_script
from tests.helpers.fronting import HELLO, TEXT
from tests.helpers.serving import PATIENCE, events, service_of, serving, wait_until

READY = "the engine is ready "


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FrontModel, Path]:
    model = front_model(model_dir)
    return model, find_export(model, tmp_path_factory.mktemp("export") / "granite")


@pytest.fixture
def script(tokenizer: KeuralTokenizer) -> list[int]:
    return [*tokenizer.encode(TEXT), tokenizer.im_end_id]


def own_engine(kind: str, exported: tuple[FrontModel, Path], log: list[Any], *more: str) -> Any:
    model, export = exported
    return own(CONTRACTS[kind], export, more, model, "tiny", 8, log.append)


def pids(log: list[Any]) -> list[int]:
    """The processes of the engines that were started, in their order."""
    said = [entry["message"] for entry in log if entry["event"] == "engine"]
    return [int(line.removeprefix(READY)) for line in said if line.startswith(READY)]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "zombie" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (ProcessLookupError, FileNotFoundError):  # it may end between the two
        return False


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_engine_that_is_not_installed_is_said_in_one_line(
    keural: Keural, kind: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    code, out, error = keural("serve", model_dir, "--engine", kind, "--port", 0)

    assert (code, out) == (2, "")
    assert error.startswith("keural: error: ")
    assert f"pip install {kind}" in error
    assert error.count("\n") == 1
    assert not (model_dir.parent / "model-granite").exists(), "nothing is exported for it"


def test_an_engine_that_dies_at_its_start_ends_the_command_with_its_last_words(
    exported: tuple[FrontModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_script(monkeypatch, tmp_path / "bin", "echo reading; echo 'CUDA error: no device' >&2; exit 3")

    with pytest.raises(UserError, match="vllm ended with exit code 3 before it answered: reading / CUDA error: no device"):
        own_engine("vllm", exported, []).__enter__()

    install_script(
        monkeypatch, tmp_path / "bin", "echo 'ValueError: no such file'; echo warnings; echo 'semaphores leaked'; exit 1"
    )
    with pytest.raises(UserError, match=r"before it answered: ValueError: no such file$"):
        own_engine("vllm", exported, []).__enter__()

    install_script(monkeypatch, tmp_path / "bin", "kill -9 $$")
    with pytest.raises(UserError, match="vllm was ended by signal 9 before it answered, without a word"):
        own_engine("vllm", exported, []).__enter__()


def test_an_engine_and_what_it_has_started_end_with_the_block(
    exported: tuple[FrontModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pid"
    install_script(monkeypatch, tmp_path / "bin", f"sleep 1000 & echo $! > {file}.part; mv {file}.part {file}; wait")
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * watch.START_SECONDS * file.exists())
    monkeypatch.setattr(watch, "time", clock)  # the time is over when it has started something
    monkeypatch.setattr(watch, "WHILE_DOWN", 0.1)

    with pytest.raises(UserError, match="vllm does not answer"):
        own_engine("vllm", exported, []).__enter__()

    wait_until(lambda: not is_there(int(file.read_text(encoding="utf-8"))))


@pytest.fixture(params=["vllm", "sglang"])
def running(
    request: pytest.FixtureRequest,
    exported: tuple[FrontModel, Path],
    script: list[int],
    tokenizer: KeuralTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[httpx.Client, list[Any]]]:
    """Our server on a child, with its log."""
    kind, log = request.param, list[Any]()
    install(monkeypatch, tmp_path / "bin", kind, script, pause=0.03)
    monkeypatch.setattr(watch, "BACKOFF", 0.2)
    with own_engine(kind, exported, log) as upstreams, serving(service_of(tokenizer, upstreams)) as client:
        yield client, log


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO} | fields)


@pytest.mark.slow
def test_an_engine_that_is_killed_in_an_answer_comes_back(running: tuple[httpx.Client, list[Any]]) -> None:
    client, log = running
    assert ask(client).json()["choices"][0]["message"]["content"] == TEXT
    (pid,) = pids(log)

    with client.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        first = next(lines)
        os.kill(pid, signal.SIGKILL)
        rest = "\n".join([first, *lines])

    assert json.loads(events(rest)[-1])["error"]["code"] == "model_error"
    wait_until(lambda: client.get("/health").status_code == 503)
    assert client.get("/ready").status_code == 503
    refused = ask(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    wait_until(lambda: client.get("/health").status_code == 200)
    assert ask(client).json()["choices"][0]["message"]["content"] == TEXT
    assert len(pids(log)) == 2
    assert 'engine_restarts_total{model_name="tiny",upstream="0"} 1.0' in client.get("/metrics").text


@pytest.mark.slow
def test_a_request_that_waits_while_an_engine_dies_is_answered_when_it_is_back(
    exported: tuple[FrontModel, Path],
    script: list[int],
    tokenizer: KeuralTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, found = list[Any](), list[tuple[Ticket, Event]]()
    install(monkeypatch, tmp_path / "bin", "vllm", script, pause=0.03)
    monkeypatch.setattr(watch, "BACKOFF", 0.2)
    request = Request([5, 6, 7], SamplingParams(temperature=0, max_new_tokens=100), {tokenizer.im_end_id})
    model, export = exported
    with own(CONTRACTS["vllm"], export, [], model, "tiny", 1, log.append) as upstreams:
        first, second = upstreams.delivering(found.extend, 8).submit([request, request])
        wait_until(lambda: found)
        os.kill(pids(log)[0], signal.SIGKILL)
        wait_until(lambda: first.end and second.end)

    assert (first.end, second.end) == ("error", "stop")
    assert second.answer == script[:-1]


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again_is_given_up(
    exported: tuple[FrontModel, Path],
    script: list[int],
    tokenizer: KeuralTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    install(monkeypatch, tmp_path / "bin", "vllm", script)
    monkeypatch.setattr(watch, "BACKOFF", 0.01)
    monkeypatch.setattr(watch, "MOST_RESTARTS", 2)
    with own_engine("vllm", exported, log) as upstreams, serving(service_of(tokenizer, upstreams)) as client:
        install_script(monkeypatch, tmp_path / "bin", "exit 1")
        os.kill(pids(log)[0], signal.SIGKILL)
        wait_until(lambda: upstreams.lost is not None)
        message = client.get("/health").json()["error"]["message"]
        assert "started again 2 times" in message
        assert ask(client).status_code == 503


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ending"), [("vllm", "SIGTERM"), ("vllm", "SIGINT"), ("vllm", "SIGKILL"), ("sglang", "SIGTERM")])
def test_the_command_serves_from_a_model_directory_to_its_end(
    kind: str, ending: str, model_dir: Path, script: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    install(monkeypatch, tmp_path / "bin", kind, script, pause=0.03)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = command(
        "serve", model_dir, "--engine", kind, "--port", 0, "--export", tmp_path / "granite", "--repetition-penalty", 1
    )
    address = process.line(" on http").split(" on ")[1].split("/v1")[0]
    pid = int(process.error_line(READY).split(READY)[1].rstrip('"}'))
    assert is_there(pid)

    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", json={"messages": HELLO, "stream": True}, timeout=PATIENCE
    ) as response:
        lines = response.iter_lines()
        first = next(lines)
        process.send(getattr(signal, ending))
        if ending != "SIGKILL":
            assert events("\n".join([first, *lines]))[-1] == "[DONE]", "what runs may end"

    assert process.wait() == (0 if ending != "SIGKILL" else -9)
    wait_until(lambda: not is_there(pid))
    assert [*(tmp_path / "tmp").iterdir()] == [], "the file with the key is gone"


class Command:
    """`keural …` as a process."""

    def __init__(self, arguments: Any, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keural", *map(str, arguments)],
            stdout=(log / "out").open("wb"),
            stderr=(log / "error").open("wb"),
        )

    def _line(self, name: str, part: str) -> str:
        found: list[str] = []

        def look() -> bool:
            assert self.process.poll() is None, (self.log / "error").read_text(encoding="utf-8")
            found[:] = [line for line in (self.log / name).read_text(encoding="utf-8").splitlines() if part in line]
            return bool(found)

        wait_until(look)
        return found[0]

    def line(self, part: str) -> str:
        return self._line("out", part)

    def error_line(self, part: str) -> str:
        return self._line("error", part)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*arguments: Any) -> Command:
        started.append(Command(arguments, tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()
