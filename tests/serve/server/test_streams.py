"""A stream while it waits, and one that cannot go on: where it stands in the queue, and every token that came before an error."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from keural.serve.server import replies
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer
from tests.helpers.held_server import LaterClock
from tests.helpers.serving import PATIENCE, Writing, events, quick, service_of, serving, wait_until

HELLO: Any = [{"role": "user", "content": "hello"}]
TEXT = "안녕 the cat"
POSITION = {"x-queue-position": "1"}


class Queue:
    """A server with one place, which somebody has until it is opened."""

    def __init__(self, service: Service, client: httpx.Client, gate: threading.Event) -> None:
        self.service, self.client, self.gate = service, client, gate

    def ask(self, **headers: str) -> "Waiting":
        """Ask for a stream, and wait until the server has taken the question."""
        before = self.service.answers.open
        waiting = Waiting(self.client, headers)
        wait_until(lambda: self.service.answers.open == before + 1)
        return waiting


class Waiting:
    """A stream that is read in a thread of its own."""

    def __init__(self, client: httpx.Client, headers: dict[str, str]) -> None:
        self.text, self.status = "", 0
        self._client, self._headers = client, headers
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        asked = {"messages": HELLO, "stream": True}
        with self._client.stream("POST", "/v1/chat/completions", json=asked, headers=self._headers) as response:
            self.status = response.status_code
            for text in response.iter_text():
                self.text += text

    def end(self) -> str:
        """All of it."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.text


@pytest.fixture
def queue(tokenizer: KeuralTokenizer) -> Iterator[Queue]:
    gate = threading.Event()
    slots = Writing(tokenizer, TEXT, count=1, before_step=lambda: gate.wait(2 * PATIENCE))
    service = service_of(tokenizer, slots, limits=quick(waiting=5))
    with serving(service) as client:
        yield Queue(service, client, gate)
        gate.set()


def said(text: str) -> str:
    """What a stream says."""
    parts = [json.loads(data) for data in events(text) if data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in part.get("choices", ()))


class TestThePlaceInTheQueue:
    def test_is_said_to_who_asks(self, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replies, "POSITION_SECONDS", 10 * PATIENCE)
        first = queue.ask(**POSITION)
        wait_until(lambda: queue.service.answers.scheduler.running == 1)
        monkeypatch.setattr(replies, "POSITION_SECONDS", 0.05)
        second, third = queue.ask(**POSITION), queue.ask(**POSITION)
        wait_until(lambda: second.text and third.text)
        assert second.text == ": queue 1\n\n"
        assert third.text == ": queue 2\n\n"
        queue.gate.set()

        assert "queue" not in first.end()
        assert second.end().startswith(": queue 1\n\n: queue 0\n\ndata: ")
        assert third.end().startswith(": queue 2\n\n")
        assert [said(waiting.text) for waiting in (first, second, third)] == [TEXT] * 3

    def test_moves_up_when_somebody_leaves(self, queue: Queue) -> None:
        queue.ask()
        body = json.dumps({"messages": HELLO}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection((queue.client.base_url.host, queue.client.base_url.port or 80)) as leaving:
            leaving.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: queue.service.answers.open == 2)
            last = queue.ask(**POSITION)
            wait_until(lambda: last.text == ": queue 2\n\n")
        wait_until(lambda: last.text == ": queue 2\n\n: queue 1\n\n")
        queue.gate.set()

        assert said(last.end()) == TEXT

    def test_is_not_said_to_others(self, queue: Queue, clock: LaterClock) -> None:
        """They have a status as long as nothing else was sent."""
        queue.ask()
        quiet = queue.ask(**{"x-request-timeout": "60"})
        told = queue.ask(**POSITION, **{"x-request-timeout": "60"})
        wait_until(lambda: told.text)
        clock.passed = 61
        queue.gate.set()

        assert json.loads(quiet.end())["error"]["code"] == "deadline_exceeded"
        assert quiet.status == 504
        *_, last = events(told.end())
        assert json.loads(last)["error"]["code"] == "deadline_exceeded"
        assert told.status == 200
        assert "[DONE]" not in told.text

    def test_strict_clients_read_over_it(self, queue: Queue) -> None:
        queue.ask()
        url = str(queue.client.base_url)
        openai = OpenAI(
            base_url=f"{url}/v1", api_key="none", _strict_response_validation=True, max_retries=0, default_headers=POSITION
        )
        claude = Anthropic(base_url=url, api_key="none", _strict_response_validation=True, max_retries=0, default_headers=POSITION)
        streams: list[Any] = [
            openai.chat.completions.create(model="tiny", messages=HELLO, stream=True),
            openai.responses.create(model="tiny", input="x", stream=True),
            claude.messages.create(model="tiny", max_tokens=50, messages=HELLO, stream=True),
        ]
        queue.gate.set()

        chat, response, message = (list(stream) for stream in streams)
        assert "".join(part.choices[0].delta.content or "" for part in chat) == TEXT
        assert response[-1].response.output_text == TEXT
        assert message[-1].type == "message_stop"

    @pytest.mark.parametrize("stream", [True, False])
    def test_is_asked_for_in_one_way(self, queue: Queue, stream: bool) -> None:
        queue.gate.set()
        for value, status in (("0", 200), ("1", 200), ("yes", 400), ("", 400), ("{}", 400)):
            response = queue.client.post(
                "/v1/chat/completions", json={"messages": HELLO, "stream": stream}, headers={"x-queue-position": value}
            )
            assert response.status_code == status, value


def test_tokens_that_came_before_an_error_are_sent_before_it(tokenizer: KeuralTokenizer) -> None:
    """Also where the client takes nothing for a while, so that they come to it together with the error."""
    steps, most = iter(range(10**6)), 120

    def fail() -> None:
        if next(steps) >= most:
            raise RuntimeError

    service = service_of(tokenizer, Writing(tokenizer, "the cat " * 60, before_step=fail))
    body = json.dumps({"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with serving(service) as client, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect((client.base_url.host, client.base_url.port or 80))
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: service.answers.scheduler.stats.finished)
        time.sleep(0.1)
        received = b""
        while part := connection.recv(65536):
            received += part

    found = [json.loads(data) for data in events(received.decode())]
    tokens = [
        entry for part in found for choice in part.get("choices", ()) for entry in (choice["logprobs"] or {}).get("content", ())
    ]
    assert len(tokens) == service.answers.scheduler.stats.answer_tokens > most // 2
    assert found[-1]["error"]["code"] == "model_error"
