"""HTTP as strangers write it: requests sent at once, two lengths of one body, names that are not ours, connections without end."""

import json
import re
import resource
from collections.abc import Iterator

import httpx
import pytest

from keural.serve.server.protocol import SPARE
from keural.serve.server.running import allow_files
from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import HEAD, Running, Start, check_whole, connect, error_of, raw
from tests.helpers.serving import quick, serving, wait_until

LOCAL = b"Host: localhost\r\n"
LAST = b"Connection: close\r\n"
BODY = b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}'
NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@pytest.fixture(scope="module")
def server(tokenizer: KeuralTokenizer) -> Iterator[tuple[Running, httpx.Client]]:
    """One for all requests that must leave it as it was."""
    running = Running(tokenizer, hosts=NAMES)
    with serving(running.service) as client:
        yield running, client


Served = tuple[Running, httpx.Client]


def get(path: bytes, *headers: bytes, host: bytes = LOCAL, method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\n" + host + b"".join(headers) + b"\r\n"


def post(body: bytes = BODY, *headers: bytes) -> bytes:
    return HEAD + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


def test_requests_that_are_sent_at_once_are_answered_in_their_order(start: Start) -> None:
    running, client = start()
    streamed = json.dumps(json.loads(BODY) | {"stream": True}).encode()

    found = raw(client, get(b"/version") + post() + get(b"/nowhere") + post(streamed) + get(b"/health", LAST))

    assert statuses(found) == [200, 200, 404, 200, 200]
    order = [found.index(sign) for sign in (b'"version"', b"chat.completion", b"not_found", b"[DONE]", b'"status":"ok"')]
    assert order == sorted(order)
    check_whole(running, client)


def test_a_client_that_leaves_with_requests_behind_its_stream_loses_one_slot_at_most(start: Start) -> None:
    running, client = start()
    running.held.shuts_at = 5
    with connect(client) as connection:
        connection.sendall((HEAD + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 1) + BODY.replace(b" 2}", b" 60}")) * 5)
        running.held.wait_shut()

    wait_until(lambda: running.log)
    running.held.open.set()
    wait_until(lambda: running.running == 0)
    assert sum(running.service.answers.scheduler.stats.finished.values()) <= 2
    check_whole(running, client)


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        post(BODY, b"Content-Length: 5\r\n"),
        HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
        HEAD + b"Content-Length: +5\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + BODY,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n" + BODY,
        HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        get(b"/health", b"Host: evil.example\r\n"),
        get(b"/health", host=b""),
        get(b"/health", b"X: a\x00b\r\n"),
        get(b"/health", b"X : a\r\n"),
        get("/v1/models/한".encode()),
    ],
    ids=["two kinds of length", "two lengths", "negative", "signed", "huge", "two codings", "no chunk", "chunks in 1.0",
         "two hosts", "no host", "zero byte", "blank", "raw path"],
)  # fmt: skip
def test_what_two_readers_could_read_in_two_ways_is_refused_and_the_connection_closed(server: Served, request_: bytes) -> None:
    running, client = server
    before = dict(running.service.answers.scheduler.stats.finished)

    found = raw(client, request_ + get(b"/v1/models"))

    assert error_of(found) == (400, "malformed_request")
    assert running.service.answers.scheduler.stats.finished == before
    check_whole(running, client)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example", b"localhost@evil.example", b"localhost:80@evil.example", b"localhost, evil.example", b"localhost.",
        b"localhost.evil.example", b"[::1]evil.example", b"[::1", b"\xff", b"", b"localhost:8000:80", b"http://localhost", b"127.1",
    ],
)  # fmt: skip
def test_a_name_that_only_begins_like_ours(server: Served, host: bytes) -> None:
    _, client = server

    found = raw(client, get(b"/v1/models", LAST, host=b"Host: " + host + b"\r\n"))

    assert error_of(found) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get(b"http://evil.example/health", LAST), 404),
        (get(b"*", LAST, method=b"OPTIONS"), 404),
        (get(b"localhost:80", LAST, method=b"CONNECT"), 404),
        (get(b"/health", LAST, method=b"TRACE"), 405),
        (get(b"/health", LAST, method=b"FOO"), 405),
        (get(b"/v1/models/%ff%00", LAST), 404),
        (get(b"/v1/models/%0d%0aX:%20y", LAST), 404),
        (get(b"/v1/models/%zz", LAST), 404),
        (get(b"/web/../../etc/passwd", LAST), 404),
        (get(b"/web/%2e%2e/%2e%2e/etc/passwd", LAST), 404),
        (get(b"/health", b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n"), 200),
        (get(b"/health", b"X-Request-Id: \xff\r\n", LAST), 200),
        (get(b"/health", b"Content-Length: 100000000\r\n") + b"x" * 1000, 200),
        (get(b"/health", b"Transfer-Encoding: chunked\r\n") + b"3e8\r\n" + b"x" * 1000, 200),
        (post(BODY, b"Expect: 100-continue\r\n", LAST), 100),
        (b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", 200),
    ],
)
def test_odd_requests(server: Served, request_: bytes, status: int) -> None:
    running, client = server

    found = raw(client, request_)

    assert statuses(found)[0] == status
    assert b"X: y" not in found
    check_whole(running, client)


@pytest.mark.parametrize("kind", [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b""])
def test_a_body_that_is_not_called_json_is_refused(server: Served, kind: bytes) -> None:
    """These are what a page of another site can send without asking."""
    running, client = server
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + LOCAL + LAST + (b"Content-Type: " + kind + b"\r\n" if kind else b"")

    found = raw(client, head + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)

    assert error_of(found) == (415, "unsupported_media_type")
    check_whole(running, client)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Content-Encoding: gzip", 415), (b"Content-Encoding: br", 415), (b"Content-Encoding: identity", 200),
        (b"Content-Type: application/json; charset=euc-kr", 415), (b"Content-Type: application/json;charset='cp949'", 415),
        (b"Content-Type: application/json; charset=UTF-8", 200), (b'Content-Type: application/json; charset="utf-8"', 200),
    ],
)  # fmt: skip
def test_a_body_in_another_coding_is_refused(server: Served, header: bytes, status: int) -> None:
    running, client = server
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + LOCAL + LAST
    plain = b"" if header.startswith(b"Content-Type") else b"Content-Type: application/json\r\n"

    found = raw(client, head + plain + header + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)

    assert statuses(found) == [status], found
    assert status == 200 or error_of(found)[1] == "unsupported_encoding"
    check_whole(running, client)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [(b"nonsense\r\n\r\n", 400, "malformed_request"), (get(b"/health", b"X: " + b"a" * 20_000 + b"\r\n"), 431, "header_too_large"),
     (b"GET /he", 408, "too_slow")],
)  # fmt: skip
def test_what_never_was_a_request_has_a_name_and_a_line_too(start: Start, sent: bytes, status: int, code: str) -> None:
    running, client = start(limits=quick(header_seconds=0.3))

    found = raw(client, sent)

    assert error_of(found) == (status, code)
    (entry,) = [entry for entry in running.log if entry["event"] == "request"]
    assert (entry["status"], entry["error"]) == (status, code)
    assert f"x-request-id: {entry['request_id']}".encode() in found
    assert f'http_requests_total{{model_name="tiny",status="{status}"}} 1.0' in client.get("/metrics").text


class TestManyConnections:
    def test_beyond_the_limit_hear_so_and_health_still_answers(self, start: Start) -> None:
        running, client = start(limits=quick(connections=5))
        assert client.get("/health").status_code == 200
        idle = [connect(client) for _ in range(5)]
        wait_until(lambda: running.service.connections() == 6)

        found = raw(client, get(b"/v1/models"))
        assert error_of(found) == (503, "too_many_connections")
        assert b"retry-after" in found.lower()
        assert b"x-request-id" in found.lower()
        assert [client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        for connection in idle:
            connection.close()
        wait_until(lambda: running.service.connections() <= 1)
        assert client.get("/v1/models").status_code == 200
        assert 'reason="connections"} 1.0' in client.get("/metrics").text
        check_whole(running, client)

    def test_far_beyond_it_are_closed(self, start: Start) -> None:
        running, client = start(limits=quick(connections=1))
        many = [connect(client) for _ in range(SPARE + 20)]
        wait_until(lambda: running.service.connections() == SPARE + 1)
        for connection in many:
            connection.close()

        wait_until(lambda: running.service.connections() == 0)
        check_whole(running, client)

    def test_have_files(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
            allow_files(600)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(600, hard), hard)
            allow_files(300)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(600, hard), hard)
            allow_files(hard + 1)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def addresses_of(client: httpx.Client) -> list[tuple[str, bool]]:
    """Every address that is described, and files of the page; each with whether it is read by GET."""
    described = client.get("/openapi.json").json()["paths"]
    found = [(path.replace("{name}", "tiny"), "get" in methods) for path, methods in described.items()]
    return [*found, ("/", True), ("/web/app.js", True), ("/openapi.json", True), ("/nowhere", True)]


def test_head_is_asked_of_every_address_that_get_is(server: Served) -> None:
    """As balancers ask: the same status and headers, nothing after them, and the connection is good for the next request."""
    _, client = server
    changing = {"date", "x-request-id", "request-id", "content-length"}
    addresses = addresses_of(client)
    assert {("/health", True), ("/ready", True), ("/v1/models/tiny", True), ("/v1/chat/completions", False)} <= set(addresses)
    for address, is_read in addresses:
        head = client.head(address)
        assert head.content == b"", address
        if is_read:
            whole = client.get(address)
            assert head.status_code == whole.status_code, address
            assert [item for item in head.headers.items() if item[0] not in changing] == [
                item for item in whole.headers.items() if item[0] not in changing
            ], address
        else:
            assert (head.status_code, head.headers["allow"]) == (405, "POST"), address


def test_an_address_says_which_methods_it_has(server: Served) -> None:
    _, client = server
    assert client.post("/health").headers["allow"] == "GET, HEAD"
    assert client.get("/v1/responses").headers["allow"] == "POST"


def test_head_stands_in_the_log_with_its_route(start: Start) -> None:
    running, client = start()
    client.head("/version")
    wait_until(lambda: running.log)

    assert (running.log[-1]["method"], running.log[-1]["route"], running.log[-1]["status"]) == ("HEAD", "/version", 200)


def test_head_says_no_where_get_does(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running, client = start()
    assert [client.head(address).status_code for address in ("/health", "/ready")] == [200, 200]

    monkeypatch.setattr(running.service, "trouble", lambda: "it is in order, but says that it is not")

    assert [client.head(address).status_code for address in ("/health", "/ready")] == [503, 503]
