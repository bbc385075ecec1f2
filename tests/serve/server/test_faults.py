"""What breaks, and who breaks it: what the documentation promises happens, no slot is lost, and the next request is answered."""

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor

from keural.serve.server.app import make_app
from keural.serve.server.gate import OPEN
from keural.serve.server.keys import Keys
from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import HEAD, HELLO, Running, Start, ask, check_whole, connect, in_background
from tests.helpers.serving import JSON, PATIENCE, Writing, events, quick, service_of, wait_until

Body = Callable[[], bytes]


def whole(stream: bool = False, **fields: Any) -> bytes:
    """A request as it is sent."""
    body = json.dumps({"messages": HELLO, "stream": stream} | fields).encode()
    return HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


class TestTheNetworksThread:
    """A step that ends the thread, as an error inside a library can."""

    def kill(self, running: Running, after: int) -> None:
        def step() -> None:
            if running.held.steps >= after:
                raise SystemExit
            running.held()

        running.slots.before_step = step

    @pytest.mark.parametrize("stream", [False, True])
    def test_dies_before_the_first_byte(self, start: Start, stream: bool) -> None:
        running, client = start()
        self.kill(running, 0)

        response = ask(client, stream=stream)

        assert (response.status_code, response.json()["error"]["code"]) == (500, "model_error")

    def test_dies_in_the_middle_of_everything(self, start: Start) -> None:
        running, client = start(limits=quick(deadline=10 * PATIENCE))
        running.held.open.clear()  # until all four have come: what comes after the end is turned away
        self.kill(running, 6)
        asked = {"messages": HELLO, "max_tokens": 60}
        streams = [lambda: client.post("/v1/chat/completions", json=asked | {"stream": True}) for _ in range(2)]
        waiting = [lambda: client.post("/v1/chat/completions", json=asked) for _ in range(2)]
        with in_background([*streams, *waiting]) as answers:
            wait_until(lambda: running.running == 4)
            running.held.open.set()
            wait_until(lambda: client.get("/health").status_code == 503)
            late = ask(client)  # whose patience is shorter than its deadline: nobody waits for a network that is gone

        assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
        assert client.get("/ready").status_code == 503
        assert client.get("/metrics").status_code == 200
        for answer in answers:
            last = json.loads(events(answer.text)[-1]) if answer.status_code == 200 else answer.json()
            assert last["error"]["code"] == "model_error"
        assert running.running == 0


class TestANetworkThatHangs:
    def test_is_said_by_health_until_it_goes_on(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("keural.serve.server.service.STALLED", 0.3)
        running, client = start()
        running.held.open.clear()
        with in_background([lambda: ask(client)]) as answers:
            wait_until(lambda: client.get("/health").status_code == 503)
            assert "no step of the network" in client.get("/health").json()["error"]["message"]
            running.held.open.set()

        assert [answer.status_code for answer in answers] == [200]
        check_whole(running, client)


class TestLogitsThatAreNoNumbers:
    """One conversation whose logits are NaN must not cost another one its answer."""

    @pytest.fixture
    def poisoned(self, start: Start) -> tuple[Running, httpx.Client]:
        running, client = start()
        plain = running.slots.step

        def step(rows: Any) -> Tensor:
            logits = plain(rows)
            wanted = [row for row in rows if row.wants_logits]
            for place, row in enumerate(wanted):
                if running.slots.poison in running.slots.held[row.slot]:  # type: ignore[attr-defined]
                    logits[place] = float("nan")
            return logits

        running.slots.step = step  # type: ignore[method-assign]
        return running, client

    def test_end_their_own_answer_alone(self, poisoned: tuple[Running, httpx.Client], tokenizer: KeuralTokenizer) -> None:
        running, client = poisoned
        running.slots.poison = tokenizer.encode("쀍")[-1]  # type: ignore[attr-defined]
        asked = {"max_tokens": 40}
        bad, good = [{"role": "user", "content": "쀍"}], HELLO
        with in_background([lambda: ask(client, messages=good, **asked), lambda: ask(client, messages=bad, **asked)]) as answers:
            pass

        assert sorted(answer.status_code for answer in answers) == [200, 500]
        check_whole(running, client)

    def test_in_a_stream_are_its_last_event(self, poisoned: tuple[Running, httpx.Client]) -> None:
        running, client = poisoned
        running.slots.poison = running.slots.ids[5]  # type: ignore[attr-defined]

        response = ask(client, stream=True, max_tokens=40)

        *_, last = events(response.text)
        assert json.loads(last)["error"]["code"] == "model_error"
        running.slots.poison = -1  # type: ignore[attr-defined]
        check_whole(running, client)


class TestAClientThatLeaves:
    @pytest.fixture(params=["closes", "resets"])
    def leave(self, request: pytest.FixtureRequest) -> Callable[[socket.socket], None]:
        def go(connection: socket.socket) -> None:
            if request.param == "resets":  # what a machine that is switched off looks like, or a crash
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        return go

    @pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b"Content-Length: 100\r\n\r\n{",
                                      HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"],
                             ids=["silence", "half a head", "a head", "half a body", "half a chunk"])  # fmt: skip
    def test_before_its_request_is_whole(self, start: Start, leave: Callable[[socket.socket], None], sent: bytes) -> None:
        running, client = start()
        connection = connect(client)
        connection.sendall(sent)
        time.sleep(0.05)
        leave(connection)

        check_whole(running, client)
        assert not [entry for entry in running.log if entry.get("error")]

    def test_in_the_middle_of_its_body_was_told_no_status(self, start: Start, leave: Callable[[socket.socket], None]) -> None:
        running, client = start()
        connection = connect(client)
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100"), "the body is waited for"
        connection.sendall(b"{")
        leave(connection)

        wait_until(lambda: running.log)
        assert (running.log[0].get("client_left"), "status" in running.log[0]) == (True, False)
        told = client.get("/metrics").text
        assert 'keural:http_requests_client_disconnected_total{model_name="tiny"} 1.0' in told
        assert 'status="400"' not in told

    def test_from_the_queue(self, start: Start, leave: Callable[[socket.socket], None]) -> None:
        running, client = start()
        running.held.open.clear()
        with in_background([lambda: ask(client) for _ in range(running.slots.count)]) as answers:
            wait_until(lambda: running.running == running.slots.count)
            connection = connect(client)
            connection.sendall(whole())
            wait_until(lambda: running.running == running.slots.count + 1)
            leave(connection)
            wait_until(lambda: [entry for entry in running.log if entry.get("client_left")])
            running.held.open.set()

        assert [answer.status_code for answer in answers] == [200] * running.slots.count
        assert running.service.answers.scheduler.stats.finished == {"length": running.slots.count, "cancelled": 1}
        check_whole(running, client)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("steps", [1, 8], ids=["while its prompt is read", "in its answer"])
    def test_while_the_network_works_for_it(
        self, start: Start, leave: Callable[[socket.socket], None], stream: bool, steps: int
    ) -> None:
        running, client = start()
        running.held.shuts_at = steps + 1
        long = [{"role": "user", "content": "the cat sees " * 30}]  # more than a step reads
        connection = connect(client)
        connection.sendall(whole(stream, messages=long))
        running.held.wait_shut()
        leave(connection)

        wait_until(lambda: [entry for entry in running.log if entry.get("client_left")])
        running.held.open.set()
        wait_until(lambda: running.running == 0)
        assert running.service.answers.scheduler.stats.finished == {"cancelled": 1}
        check_whole(running, client)

    def test_of_several_answers_at_once(self, start: Start, leave: Callable[[socket.socket], None]) -> None:
        running, client = start()
        running.held.shuts_at = 6
        connection = connect(client)
        connection.sendall(whole(True, n=8))
        running.held.wait_shut()
        assert b"200 OK" in connection.recv(1000)
        leave(connection)

        wait_until(lambda: [entry for entry in running.log if entry.get("client_left")])
        running.held.open.set()
        wait_until(lambda: running.running == 0)
        assert running.service.answers.scheduler.stats.finished == {"cancelled": 8}
        check_whole(running, client)


class TestASlowClient:
    def test_who_reads_byte_by_byte_holds_no_slot(self, start: Start) -> None:
        """What is not read waits in its connection; the answer goes on at the network's pace and ends."""
        running, client = start(limits=quick(send_seconds=10 * PATIENCE))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(PATIENCE)
            connection.connect((client.base_url.host, client.base_url.port or 80))
            connection.sendall(whole(True))
            for _ in range(5):
                assert connection.recv(1)
                time.sleep(0.05)
            wait_until(lambda: running.running == 0)
            assert ask(client).status_code == 200, "nobody waits for the other one's end, which is later than their patience"
            assert connection.recv(1)
        check_whole(running, client)

    def slowloris(self, client: httpx.Client) -> list[socket.socket]:
        """Forty connections with heads and bodies that have begun."""
        beginnings = [b"GET /health HTTP/1.1\r\nX-", HEAD + b"Content-Length: 900\r\n\r\n{"]
        connections = [connect(client) for _ in range(40)]
        for place, connection in enumerate(connections):
            connection.sendall(beginnings[place % 2])
        return connections

    def test_others_are_answered_while_many_write_byte_by_byte(self, start: Start) -> None:
        running, client = start()
        connections = self.slowloris(client)
        for _ in range(4):
            assert ask(client).status_code == 200
            for connection in connections:
                connection.send(b"a")
        assert running.service.connections() == 41, "all are still writing"
        for connection in connections:
            connection.close()
        check_whole(running, client)

    def test_many_who_write_byte_by_byte_are_turned_away(self, start: Start) -> None:
        """Heads and bodies that never end, though something of them comes all the time."""
        running, client = start(limits=quick(header_seconds=0.3, body_seconds=0.3))
        connections = self.slowloris(client)
        for _ in range(8):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(b"a")
            time.sleep(0.05)
        answers = []
        for connection in connections:
            with connection, contextlib.suppress(ConnectionResetError):
                answers.append(connection.recv(4096))

        assert all(answer.split()[1] == b"408" for answer in answers)
        assert answers  # who is reset while it writes may get none
        wait_until(lambda: 'reason="too_slow"} 40.0' in client.get("/metrics").text)
        check_whole(running, client)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["-H", "-B", "-X"], ids=["heads", "bodies", "readers"])
    def test_slowhttptest_finds_it_open(self, start: Start, mode: str, tmp_path: Path) -> None:
        tool = shutil.which("slowhttptest")
        if tool is None:
            pytest.skip("slowhttptest is not installed (Debian's package slowhttptest)")
        running, client = start(limits=quick(header_seconds=3, body_seconds=3, send_seconds=3))
        address = f"{str(client.base_url).rstrip('/')}/{'web/app.js' if mode == '-X' else 'v1/completions'}"
        options = [mode, "-c", "400", "-r", "200", "-i", "1", "-l", "20", "-p", "2", "-u", address]
        more = {
            "-H": ["-t", "GET"],
            "-B": ["-t", "POST", "-s", "8192"],
            "-X": ["-w", "10", "-y", "20", "-n", "1", "-z", "1", "-k", "3"],
        }
        with subprocess.Popen(
            [tool, *options, *more[mode]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        ) as attack:
            delays = []
            while attack.poll() is None and len(delays) < 200:
                begun = time.monotonic()
                assert ask(client).status_code == 200
                delays.append(time.monotonic() - begun)
                time.sleep(0.2)
            attack.kill()

        assert len(delays) > 10
        assert max(delays) < 2, delays
        wait_until(lambda: running.service.connections() <= 1, 10)
        check_whole(running, client)


class TestBombs:
    """What is small to send and large to do. It is refused, or done within its bounds, and nobody else waits for it long."""

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    def test_many_answers(self, start: Start, path: str) -> None:
        running, client = start()
        asked: dict[str, Any] = {"messages": HELLO} if "chat" in path else {"prompt": "x"}

        for n in (9, 10**6, 10**30, -1, 0, 1.5, True, "8", [8]):
            response = client.post(path, json=asked | {"n": n})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "n"), n
        assert running.running == 0

    def test_many_answers_to_many_prompts(self, start: Start) -> None:
        running, client = start()

        assert client.post("/v1/completions", json={"prompt": ["x"] * 5, "n": 2}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": [[5]] * 1000}).status_code == 400
        check_whole(running, client)

    @pytest.mark.parametrize(
        ("path", "opening", "item", "closing"),
        [
            ("/v1/chat/completions", '{"messages":[', "{}", "]}"),
            ("/v1/chat/completions", '{"messages":[', "1", "]}"),
            ("/v1/chat/completions", '{"messages":[{"role":"user","content":[', "1", "]}]}"),
            ("/v1/chat/completions", '{"messages":[{"role":"user","content":"x"}],', '"#":1', "}"),
            ("/v1/responses", '{"input":[', "0", "]}"),
            ("/v1/responses", '{"input":"x","metadata":{', '"#":1', "}}"),
            ("/v1/responses", '{"input":"x","include":[', "1", "]}"),
            ("/v1/messages", '{"max_tokens":3,"messages":[', "1", "]}"),
            ("/v1/completions", '{"prompt":[', "-1", "]}"),
            ("/v1/completions", '{"prompt":[', "[]", "]}"),
            ("/detokenize", '{"tokens":[', '""', "]}"),
        ],
    )
    def test_a_body_in_which_everything_is_wrong(self, start: Start, path: str, opening: str, item: str, closing: str) -> None:
        """Half a million mistakes are not looked for one after another while everybody waits."""
        running, client = start()
        items = [item.replace("#", str(place)) for place in range(1_000_000 // (len(item) + 1))]
        body = (opening + ",".join(items))[: 1_000_000 - len(closing)].rpartition(",")[0] + closing
        begun = time.process_time()

        response = client.post(path, content=body.encode(), headers=JSON)

        assert response.status_code == 400, response.text[:1000]
        assert len(response.text) < 1000
        assert time.process_time() - begun < 4
        check_whole(running, client)

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {"enum": [*range(500)]}}}},
            {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
            {"type": "string", "minLength": 1_000_000},
            {"type": "string", "pattern": "(a|aa|aaa)*" * 60},
            {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"},
            {"type": "array", "minItems": 1_000_000_000},
            {"allOf": [{"anyOf": [{"type": "object", "required": [f"{word}{i}"]} for word in "ab"]} for i in range(20)]},
            {"type": "object", "properties": {f"k{i}": {} for i in range(1500)}, "required": [f"k{i}" for i in range(1500)]},
            {"$ref": "#"},
            {"type": "integer", "minimum": -(10**40), "maximum": 10**40, "multipleOf": 7},
        ],
        ids=["nested", "circle", "long", "many ways", "catastrophe", "endless", "products", "wide", "itself", "numbers"],
    )  # fmt: skip
    def test_schemas(self, start: Start, schema: Any) -> None:
        running, client = start()
        asked = {"max_tokens": 5, "response_format": {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}}
        begun = time.process_time()
        with in_background([lambda: ask(client, **asked)]) as answers:
            time.sleep(0.02)
            assert ask(client).status_code == 200
            other = time.process_time() - begun

        assert answers[0].status_code in (200, 400), answers[0].text
        assert other < 5
        assert time.process_time() - begun < 10
        check_whole(running, client)

    @pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":['])
    def test_deep_json(self, start: Start, opening: bytes) -> None:
        running, client = start()

        response = client.post("/v1/chat/completions", content=opening * 50_000, headers=JSON)

        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
        assert "deeper than 32 levels" in response.json()["error"]["message"]
        check_whole(running, client)

    def test_a_body_that_is_really_sent(self, start: Start) -> None:
        """64 MB, announced or in chunks: not read to its end, and answered with 413 or a closed connection."""
        running, client = start()
        part = b"x" * 65_536
        for head, piece in ((b"Content-Length: 64000000", part), (b"Transfer-Encoding: chunked", b"10000\r\n" + part + b"\r\n")):
            sent = 0
            with connect(client) as connection:
                connection.sendall(HEAD + head + b"\r\n\r\n")
                with contextlib.suppress(OSError):
                    for _ in range(1000):
                        connection.sendall(piece)
                        sent += len(piece)
                with contextlib.suppress(OSError):
                    assert connection.recv(100).split()[1] == b"413"
            assert sent < 32_000_000
        check_whole(running, client)


class TestEveryAddress:
    def test_asks_for_a_key(self, start: Start, tokenizer: KeuralTokenizer) -> None:
        """Those that the application knows, however they are declared, and some that it does not."""
        routes = make_app(service_of(tokenizer, Writing(tokenizer, "x")))._app.routes  # type: ignore[attr-defined]
        addresses = {route.path.replace("{name:path}", "tiny"): sorted(route.methods) for route in routes}
        assert {"/openapi.json", "/v1/messages", "/", "/web/app.js", "/v1/models/tiny"} <= addresses.keys()
        assert addresses.keys() >= OPEN
        running, client = start(keys=Keys(["first-key"]))
        wrong: list[dict[str, str]] = [
            {}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"authorization": "first-key"},
            {"authorization": "Basic first-key"}, {"x-api-key": ""}, {"x-api-key": "first-key2"}, {"api-key": "first-key"},
            {"cookie": "key=first-key"}, {"authorization": "Bearer first-key, Bearer wrong"},
        ]  # fmt: skip
        for address, methods in (addresses | {"/nowhere": ["GET"], "/v1": ["POST"]}).items():
            for method in (*methods, "DELETE"):
                for headers in wrong[:1] if address in OPEN else wrong:
                    status = client.request(method, address, headers=headers).status_code
                    assert (status == 401) is (address not in OPEN), (method, address, headers)
                assert client.request(method, address, headers={"x-api-key": "first-key"}).status_code != 401
        assert client.get("/v1/models?key=first-key").status_code == 401
        assert running.running == 0


def test_a_log_that_cannot_be_written_costs_no_answer(start: Start) -> None:
    def full(entry: Any) -> None:
        raise OSError(28, "No space left on device")

    running, client = start(log=full)

    assert [ask(client).status_code for _ in range(3)] == [200] * 3
    assert events(ask(client, stream=True).text)[-1] == "[DONE]"
    check_whole(running, client)


class TestAnErrorOfOurs:
    """What nobody foresaw, in the middle of answers."""

    def failing(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = iter(range(1000))

        def spell(text: str) -> str:
            if next(calls) == 5:
                raise ValueError("an error of ours")
            return text

        monkeypatch.setattr(running.service, "spell", spell)

    @pytest.mark.parametrize("n", [1, 2])
    def test_in_the_text_of_an_answer_is_said(self, start: Start, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        running, client = start()
        self.failing(running, monkeypatch)

        response = ask(client, n=n, max_tokens=40)

        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        check_whole(running, client)

    @pytest.mark.parametrize("n", [1, 2])
    def test_in_the_text_of_a_stream_ends_it(self, start: Start, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        running, client = start()
        self.failing(running, monkeypatch)

        with pytest.raises(httpx.RemoteProtocolError):
            ask(client, n=n, max_tokens=40, stream=True)

        check_whole(running, client)

    def test_in_the_counting_costs_no_answer(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        running, client = start()

        def failing(*_: object) -> None:
            raise ValueError("an error of ours")

        monkeypatch.setattr(running.service.answers, "_observe", failing)

        assert [ask(client).status_code for _ in range(3)] == [200] * 3
        assert events(ask(client, stream=True).text)[-1] == "[DONE]"
        check_whole(running, client)
