"""What strangers and accidents do to a server: it says what is wrong, frees the slot, and answers the next request."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from keural.errors import UserError
from keural.serve.server.keys import Keys, read_keys
from keural.serve.server.running import Server
from keural.serve.server.start import bind
from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import HEAD, HELLO, LaterClock, Start, ask, connect, error_of, in_background, raw
from tests.helpers.serving import JSON, PATIENCE, events, quick, wait_until


class TestADisconnectedClient:
    @pytest.mark.parametrize("stream", [False, True])
    def test_frees_its_slot(self, start: Start, stream: bool) -> None:
        running, client = start()
        running.held.shuts_at = 3
        body = json.dumps({"messages": HELLO, "stream": stream}).encode()
        with connect(client) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            running.held.wait_shut()
            if stream:
                assert b"200 OK" in connection.recv(1000)

        wait_until(lambda: [entry.get("client_left") for entry in running.log] == [True])
        running.held.open.set()
        wait_until(lambda: running.running == 0)
        assert running.service.answers.scheduler.stats.finished == {"cancelled": 1}
        assert 'keural:http_requests_client_disconnected_total{model_name="tiny"} 1.0' in client.get("/metrics").text
        assert ask(client).status_code == 200

    @pytest.mark.parametrize("stream", [False, True])
    def test_is_none_who_leaves_after_the_answer(self, start: Start, stream: bool) -> None:
        running, client = start()
        body = json.dumps({"messages": HELLO, "stream": stream, "max_tokens": 3}).encode()
        with connect(client) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            found = b""
            while (b"[DONE]" if stream else b'"usage"') not in found:
                found += connection.recv(65536)

        wait_until(lambda: running.log and running.service.connections() == 0)
        assert "client_left" not in running.log[0]
        assert 'keural:http_requests_client_disconnected_total{model_name="tiny"} 0.0' in client.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_came_to_a_stop_string_does_not_count_as_given_up(start: Start, stream: bool) -> None:
    running, client = start()

    response = ask(client, max_tokens=100, stop="cat", stream=stream, n=2)

    assert response.status_code == 200
    wait_until(lambda: running.running == 0)
    if not stream:
        kept = response.json()["usage"]["completion_tokens"]
        wait_until(lambda: f'keural:request_generation_tokens_sum{{model_name="tiny"}} {kept}.0' in client.get("/metrics").text)
    assert running.service.answers.scheduler.stats.finished == {"stop": 2}
    assert 'keural:request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in client.get("/metrics").text


class TestAFullQueue:
    def test_is_said_at_once(self, start: Start) -> None:
        running, client = start(limits=quick(waiting=1))
        running.held.open.clear()
        threads = [threading.Thread(target=lambda: ask(client)) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: running.running == 3)
        refused = [ask(client, stream=stream) for stream in (False, True)]
        refused.append(ask(client, temperature="hot"))  # not looked at: a refusal must cost little
        refused.append(client.post("/v1/completions", content=b"{"))
        refused.append(client.post("/v1/responses", content=iter([b"{", b'"input": 1}'])))
        too_large = client.post("/v1/responses", content=b"x" * (quick().body_bytes + 1))
        counted = client.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "x"}]})
        running.held.open.set()
        for thread in threads:
            thread.join(PATIENCE)

        for response in refused:
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert "connection" not in response.headers
        assert too_large.status_code == 413
        assert counted.status_code == 200
        assert ask(client).status_code == 200
        assert 'keural:requests_rejected_total{model_name="tiny",reason="queue_full"} 5.0' in client.get("/metrics").text

    def test_more_answers_than_can_ever_wait_are_an_error_of_the_request(self, start: Start) -> None:
        _, client = start(limits=quick(waiting=1))

        assert ask(client, n=3).status_code == 200
        assert ask(client, n=4).json()["error"]["param"] == "n"


class TestADeadline:
    def test_before_the_first_byte_has_a_status(self, start: Start, clock: LaterClock) -> None:
        running, client = start()
        running.held.open.clear()
        asked = partial(client.post, "/v1/chat/completions", json={"messages": HELLO}, headers={"X-Request-Timeout": "60"})
        with in_background([asked]) as answers:
            wait_until(lambda: running.running == 1)
            clock.passed = 61
            running.held.open.set()

        (response,) = answers
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert ask(client).status_code == 200

    def test_after_it_is_an_event_and_the_end(self, start: Start, clock: LaterClock) -> None:
        running, client = start(limits=quick(deadline=60))
        running.held.shuts_at = 5
        with in_background([lambda: ask(client, stream=True, max_tokens=200)]) as answers:
            running.held.wait_shut()
            clock.passed = 61
            running.held.open.set()

        (response,) = answers
        assert response.status_code == 200
        last = events(response.text)[-1]
        assert json.loads(last)["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: running.running == 0)

    @pytest.mark.parametrize("header", ["soon", "-1", "nan", "0"])
    def test_that_is_no_number_is_refused(self, start: Start, header: str) -> None:
        _, client = start()

        assert (
            client.post("/v1/chat/completions", json={"messages": HELLO}, headers={"X-Request-Timeout": header}).status_code == 400
        )


class TestANetworkThatFails:
    @pytest.mark.parametrize("stream", [False, True])
    def test_is_an_error_and_the_next_request_is_answered(self, tokenizer: KeuralTokenizer, start: Start, stream: bool) -> None:
        running, client = start()

        def fail() -> None:
            running.slots.before_step = running.held
            raise RuntimeError("secret words of a user")

        running.slots.before_step = fail

        response = ask(client, stream=stream)

        assert (response.status_code, response.json()["error"]["code"]) == (500, "model_error")
        assert "secret" not in response.text
        assert ask(client).status_code == 200
        assert client.get("/health").status_code == 200

    def test_in_a_stream_is_an_event(self, start: Start) -> None:
        running, client = start()

        def fail() -> None:
            if running.held.steps > 5:
                raise RuntimeError
            running.held()

        running.slots.before_step = fail
        response = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})

        *_, last = events(response.text)
        assert json.loads(last)["error"] == {
            "message": "the model failed while it was computing", "type": "server_error", "param": None, "code": "model_error",
        }  # fmt: skip

    def test_for_good_is_said_by_health(self, start: Start) -> None:
        running, client = start()

        def fail() -> None:
            raise RuntimeError

        running.slots.before_step = fail
        assert [ask(client).status_code for _ in range(3)] == [500, 500, 500]

        wait_until(lambda: running.service.answers.scheduler.broken)
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        assert ask(client).json()["error"]["code"] == "unavailable"


class TestKeys:
    @pytest.fixture
    def opened(self, start: Start) -> httpx.Client:
        return start(keys=Keys(["first-key", "second-key"]))[1]

    def test_only_who_has_one_is_let_in(self, opened: httpx.Client) -> None:
        routes = opened.get("/openapi.json", headers={"x-api-key": "first-key"}).json()["paths"]
        assert {"/v1/models", "/metrics", "/tokenize", "/health"} <= routes.keys()
        for path, methods in routes.items():
            if path in ("/health", "/ready"):
                assert opened.get(path).status_code == 200
                continue
            for method in (*methods, "options", "head", "delete"):
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}, {"x-api-key": ""}):
                    response = opened.request(method, path, headers=headers)
                    assert response.status_code == 401, (method, path, headers)
                    if method != "head":
                        assert response.json()["error"]["type"] == "authentication_error"
        for path in ("/nowhere", "/v1/models/", "//health", "/web/", "//", "/health/", "/HEALTH", "/health%2f"):
            assert opened.get(f"{str(opened.base_url).rstrip('/')}{path}").status_code == 401, path  # alone `//health` is a host

    @pytest.mark.parametrize(
        "headers", [{"authorization": "Bearer second-key"}, {"authorization": "bearer first-key"}, {"x-api-key": "first-key"}]
    )
    def test_every_key_is_taken(self, opened: httpx.Client, headers: dict[str, str]) -> None:
        assert opened.get("/v1/models", headers=headers).status_code == 200

    def test_a_file_of_keys(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("# mine\nfirst-key\n\n  second-key \n")
        keys = read_keys(file)
        assert [keys.admits(key) for key in (b"first-key", b"second-key", b"# mine", b"", b"first-ke")] == [
            True,
            True,
            False,
            False,
            False,
        ]

    @pytest.mark.parametrize("text", ["", "# nothing\n", "a key\n", "열쇠\n"])
    def test_a_file_without_good_keys_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "keys").write_text(text)
        with pytest.raises(UserError):
            read_keys(tmp_path / "keys")


class TestTheConnection:
    @pytest.mark.parametrize("whole", [True, False])
    def test_a_fat_head(self, start: Start, whole: bool) -> None:
        _, client = start()
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Fat: " + b"a" * 20_000 + (b"\r\n\r\n" if whole else b"")

        assert error_of(raw(client, head)) == (431, "header_too_large")
        assert client.get("/health").status_code == 200

    def test_a_slow_head(self, start: Start) -> None:
        _, client = start(limits=quick(header_seconds=0.3))

        answer = raw(client, b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n"] * 20, pause=0.05)

        assert error_of(answer) == (408, "too_slow")

    def test_silence(self, start: Start) -> None:
        _, client = start(limits=quick(header_seconds=0.2))

        assert raw(client) == b""

    def test_a_slow_second_request_of_a_connection(self, start: Start) -> None:
        _, client = start(limits=quick(header_seconds=0.3))

        answer = raw(client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")

        assert answer.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in answer

    def test_an_idle_connection_is_closed(self, start: Start) -> None:
        _, client = start(limits=quick(idle_seconds=0.2))

        assert raw(client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").endswith(b'{"status":"ok"}')

    def test_a_slow_body(self, start: Start) -> None:
        _, client = start(limits=quick(body_seconds=0.3))

        answer = raw(client, HEAD + b"Content-Length: 100\r\n\r\n", *[b"{"] * 20, pause=0.05)

        assert error_of(answer) == (408, "too_slow")

    def test_a_fat_body_is_refused_before_it_is_sent(self, start: Start) -> None:
        _, client = start()

        assert error_of(raw(client, HEAD + b"Content-Length: 64000000\r\n\r\n")) == (413, "body_too_large")
        assert 'requests_rejected_total{model_name="tiny",reason="body_too_large"} 1.0' in client.get("/metrics").text

    def test_an_endless_body(self, start: Start) -> None:
        _, client = start(limits=quick(body_bytes=1000))
        chunk = b"100\r\n" + b" " * 256 + b"\r\n"

        assert error_of(raw(client, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 5)) == (413, "body_too_large")
        assert ask(client).status_code == 200

    def test_no_http(self, start: Start) -> None:
        _, client = start()

        assert error_of(raw(client, b"\x16\x03\x01 hello\r\n\r\n")) == (400, "malformed_request")

    def test_a_reader_who_takes_nothing_is_cut_off(self, start: Start) -> None:
        running, client = start(limits=quick(send_seconds=0.3))
        body = json.dumps({"prompt": "x " * 30_000, "return_token_strs": True}).encode()
        address = client.base_url.host, client.base_url.port or 80
        whole = len(client.post("/tokenize", content=body, headers=JSON).content)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE)
            connection.connect(address)
            head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: len(running.log) == 2 and running.service.connections() == 1)  # the other client's
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    received += len(part)

        assert received < whole
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", ""])
def test_another_name_is_not_answered(start: Start, host: str) -> None:
    _, client = start(hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))

    response = client.get("/health", headers={"host": host})

    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
    for own in ("localhost", "LOCALHOST:1234", "127.0.0.1:8000", "[::1]:80"):
        assert client.get("/health", headers={"host": own}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}",
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
    ],
)  # fmt: skip
def test_a_broken_body_is_one_line(start: Start, body: bytes) -> None:
    _, client = start()

    response = client.post("/v1/chat/completions", content=body, headers=JSON)

    assert response.status_code == 400
    assert response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]
    assert ask(client).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/models", 405)]
)
def test_what_is_not_there_is_said_in_the_same_shape(start: Start, method: str, path: str, status: int) -> None:
    _, client = start()

    response = client.request(method, path)

    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_no_other_site_may_read_or_ask(start: Start) -> None:
    _, client = start()

    response = client.options(
        "/v1/chat/completions", headers={"origin": "https://evil.example", "access-control-request-method": "POST"}
    )

    assert response.status_code == 405
    answered = client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in (*response.headers, *answered.headers) if name.startswith("access-control")]


def test_requests_have_names(start: Start) -> None:
    _, client = start()

    assert client.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = client.get("/version", headers={"x-request-id": "not <mine>"}).headers["x-request-id"]
    assert len(made) == 32
    assert client.get("/nowhere").headers["x-request-id"] != made


def test_the_log_has_no_words_and_no_keys(start: Start) -> None:
    running, client = start(keys=Keys(["first-key"]), text="an answer nobody logs")
    headers = {"authorization": "Bearer first-key"}

    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hush"}], "user": "hush"}, headers=headers)
    wait_until(lambda: len(running.log) == 1)  # a line is written after its answer was sent
    client.post("/v1/chat/completions?hush=hush", json={"hush": "hush"}, headers=headers)
    client.get("/v1/models/hush", headers=headers)
    client.get("/hush", headers=headers)
    client.get("/v1/models", headers={"authorization": "Bearer wrong-key"})

    wait_until(lambda: len(running.log) == 5)
    text = json.dumps(running.log)
    assert not any(word in text for word in ("hush", "answer nobody", "first-key", "wrong-key"))
    first = running.log[0]
    assert first["route"] == "/v1/chat/completions"
    assert first["status"] == 200
    assert first["finish"] == ["stop"]
    assert first["answer_tokens"] > 0
    assert sorted(entry["status"] for entry in running.log) == [200, 400, 401, 404, 404]


class TestEnding:
    def test_what_runs_ends_and_what_comes_is_turned_away(self, start: Start) -> None:
        running, client = start(limits=quick(drain=10 * PATIENCE))
        running.held.shuts_at = 4
        with in_background([lambda: ask(client, stream=True, max_tokens=60)] * 2) as answers:
            wait_until(lambda: running.running == 2)
            running.held.wait_shut()
            running.service.draining = True
            refused, ready, health = ask(client), client.get("/ready"), client.get("/health")
            running.held.open.set()

        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        assert (ready.status_code, health.status_code) == (503, 200)
        assert [events(answer.text)[-1] for answer in answers] == ["[DONE]"] * 2

    def test_what_does_not_end_in_time_is_cut_off_with_an_event(self, start: Start) -> None:
        running, client = start(limits=quick(drain=0.2))
        running.held.shuts_at = 4
        with in_background([lambda: ask(client, stream=True, max_tokens=200)]) as answers:
            running.held.wait_shut()
            (ticket,) = running.service.answers._open
            running.service.draining = True
            wait_until(lambda: ticket.cancelled)
            running.held.open.set()

        assert json.loads(events(answers[0].text)[-1])["error"]["code"] == "shutting_down"


@contextlib.contextmanager
def started(model_dir: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`keural serve` of a small model in a process of its own, ready."""
    command = [sys.executable, "-m", "keural", "serve", str(model_dir), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline()
            assert "http://127.0.0.1:" in line, (line, running.stderr and running.stderr.read())
            with httpx.Client(base_url=line.split()[2].removesuffix("/v1"), timeout=PATIENCE) as client:
                yield running, client
        finally:
            running.kill()


class TestTheCommand:
    @pytest.fixture(scope="class")
    def keys(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        file = tmp_path_factory.mktemp("served") / "keys"
        file.write_text("first-key\n")
        return file

    @pytest.fixture(scope="class")
    def process(self, model_dir: Path, keys: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
        """One for two tests, the last of which ends it: to start it takes longer than both."""
        with started(model_dir, "--drain", "600", "--api-key-file", str(keys)) as found:
            yield found

    def test_keys_are_read_again(self, process: tuple[subprocess.Popen[str], httpx.Client], keys: Path) -> None:
        running, client = process

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"x-api-key": key}).status_code

        assert (status("first-key"), status("second-key")) == (200, 401)
        keys.write_text("")
        running.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert status("first-key") == 200
        keys.write_text("second-key\n")
        running.send_signal(signal.SIGHUP)
        wait_until(lambda: status("second-key") == 200)
        assert status("first-key") == 401

    def test_ends_after_its_answers(self, process: tuple[subprocess.Popen[str], httpx.Client], keys: Path) -> None:
        running, client = process
        client.headers["x-api-key"] = keys.read_text().strip()
        answers: list[httpx.Response] = []
        asked = {"messages": HELLO, "stream": True, "max_tokens": 100, "logit_bias": {"401": -100, "2": -100}}
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=asked))) for _ in range(8)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        wait_until(lambda: _taken(client) == 8)
        running.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE)

        assert running.wait(PATIENCE) == 0
        assert [events(answer.text)[-1] for answer in answers] == ["[DONE]"] * 8
        assert running.stderr is not None
        assert {json.loads(line)["event"] for line in running.stderr} - {"keys"} == {"request", "draining"}

    def test_a_second_signal_ends_the_process(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        ended: list[int] = []
        monkeypatch.setattr(os, "_exit", ended.append)
        running, _ = start()
        with bind("127.0.0.1", 0) as listener:
            server = Server(running.service, listener)
            server.handle_exit(signal.SIGTERM, None)
            assert (running.service.draining, ended) == (True, [])
            server.handle_exit(signal.SIGTERM, None)
        assert ended == [128 + signal.SIGTERM]

    @pytest.mark.slow  # starting a process to end it takes seconds
    def test_without_its_terminal_it_ends_gently_and_after_a_second_signal_at_once(self, model_dir: Path) -> None:
        asked = {"prompt": "x", "stream": True, "max_tokens": 150, "n": 8, "logit_bias": {"401": -100, "2": -100}}
        codes: list[int] = []
        while (not codes or codes[-1] == 0) and len(codes) < 5:  # 0: on a busy machine the answers have ended before it
            with (
                started(model_dir, "--drain", "600") as (running, client),
                contextlib.suppress(httpx.HTTPError),
                client.stream("POST", "/v1/completions", json=asked) as response,
            ):
                next(response.iter_bytes())
                running.send_signal(signal.SIGHUP)
                assert running.stderr is not None
                assert any('"draining"' in line for line in running.stderr)
                running.send_signal(signal.SIGTERM)
                codes.append(running.wait(PATIENCE))

        assert codes[-1] == 128 + signal.SIGTERM

    def test_a_port_that_is_taken(self, keural: Any, model_dir: Path) -> None:
        with bind("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            code, _, error = keural("serve", model_dir, "--port", port)

        assert code == 2
        assert f"port {port} on 127.0.0.1 cannot be used" in error

    @pytest.mark.parametrize("prefix", ["", "a b", "1st", "ke:ural", "모델"])
    def test_a_prefix_that_cannot_stand_in_a_name(self, keural: Any, model_dir: Path, prefix: str) -> None:
        code, _, error = keural("serve", model_dir, "--port", 0, "--metrics-prefix", prefix)

        assert code == 2
        assert "--metrics-prefix" in error

    def test_without_its_packages(self, keural: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("keural.serve.server.start.NEEDED", ("fastapi", "no_such_package"))

        code, _, error = keural("serve", model_dir, "--port", 0)

        assert code == 2
        assert "pip install 'keural[serve]'" in error


def _taken(client: httpx.Client) -> int:
    """Answers that are under way, wait or have ended, by the counters."""
    names = ("keural:num_requests_running{", "keural:num_requests_waiting{", "keural:request_success_total{")
    return sum(int(float(line.split()[-1])) for line in client.get("/metrics").text.splitlines() if line.startswith(names))
