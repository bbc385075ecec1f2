"""From the network's thread to a client's socket: the quick ways lose nothing, and send what the slow ones would."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.serve.batching.requests import Chosen
from keural.serve.server import answers
from keural.serve.server.answers import Answer, bell
from keural.serve.server.chat_writer import ChatWriter
from keural.serve.server.completions import CompletionWriter
from keural.serve.server.messages_writer import MessagesWriter
from keural.serve.server.pieces import Piece
from keural.serve.server.protocol import _Connection
from keural.serve.server.replies import Part, Usage, Writer
from keural.serve.server.responses_writer import ResponsesWriter
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples
from tests.helpers.serving import PATIENCE, Writing, service_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture(scope="module")
def service(tokenizer: KeuralTokenizer) -> Service:
    return service_of(tokenizer, Writing(tokenizer, "hello"), name='a "model" \u2028 모델')


def plain(value: Any) -> bytes:
    """JSON as every other answer has it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


WRITERS: dict[str, Callable[[Service], Writer]] = {
    "chat": lambda service: ChatWriter(service, False, False, 2, False),
    "chat with usage": lambda service: ChatWriter(service, False, True, 2, False),
    "completion": lambda service: CompletionWriter(service, False, True),
    "messages": lambda service: MessagesWriter(service, False),
    "responses": lambda service: ResponsesWriter(service, {}, False, False),
}
NAMED = {"messages": b"event: content_block_delta\n", "responses": b"event: response.output_text.delta\n"}
"""What stands before the data of an event, in the APIs whose answers have one choice."""


@pytest.mark.parametrize("name", WRITERS)
@examples(10)
@given(text=TEXTS)
def test_an_event_is_what_json_makes_of_it(service: Service, name: str, text: str) -> None:
    writer = WRITERS[name](service)
    begun = writer.begin(Usage(1, 0, 0))

    for number, index in enumerate((0, 0) if name in NAMED else (1, 0, 1), len(begun)):
        (written,) = writer.part(Part(index, Piece(text, [Chosen(5)], [0]), None))
        head, _, data = written.rpartition(b"data: ")
        assert data.endswith(b"\n\n")
        found = json.loads(data)
        assert plain(found) == data.removesuffix(b"\n\n")
        assert head == NAMED.get(name, b"")
        assert found.get("sequence_number", number) == number
        assert text_of(found) == text
        assert found.get("choices", [{"index": index}])[0]["index"] == index


def text_of(event: dict[str, Any]) -> str:
    if "delta" in event:
        return str(event["delta"] if isinstance(event["delta"], str) else event["delta"]["text"])
    (choice,) = event["choices"]
    return str(choice["text"] if "text" in choice else choice["delta"]["content"])


@given(parts=st.lists(st.binary(max_size=300), max_size=6), version=st.sampled_from([b"1.1", b"1.0"]), length=st.booleans())
def test_a_body_is_framed_as_its_library_frames_it(parts: list[bytes], version: bytes, length: bool) -> None:
    headers = [("content-length", str(sum(map(len, parts))))] if length else []
    sent = []
    for connection in (h11.Connection(h11.SERVER), _Connection(h11.SERVER, 1000)):
        connection.receive_data(b"GET / HTTP/" + version + b"\r\nHost: a\r\nConnection: close\r\n\r\n")
        while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED) and connection.their_state is h11.SEND_BODY:
            pass
        data = [h11.Data(data=part) for part in parts]
        events = [h11.Response(status_code=200, headers=headers, reason=b"OK"), *data, h11.EndOfMessage()]
        sent.append([connection.send(event) for event in events])
    assert sent[0] == sent[1]


class Refusing:
    """A system's library that writes nothing: there is no memory for it."""

    def __init__(self, _: None) -> None:
        self.write = lambda *_: -1  # a function, which has a place for `argtypes`


@pytest.mark.parametrize("library", [None, lambda _: object(), Refusing], ids=["quick", "absent", "refusing"])
def test_whoever_rings_is_heard(library: Callable[[None], Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if library is not None:
        monkeypatch.setattr(answers.ctypes, "PyDLL", library)
    mail: list[int] = []
    heard: list[int] = []
    done = asyncio.Event()

    def hear() -> None:
        heard.extend(mail[len(heard) :])
        if len(heard) == 5000:
            done.set()

    async def listen() -> None:
        ring = bell(asyncio.get_running_loop(), hear)

        def work() -> None:
            for number in range(5000):
                mail.append(number)
                ring()

        threading.Thread(target=work).start()
        await asyncio.wait_for(done.wait(), PATIENCE)

    asyncio.run(listen())
    assert heard == list(range(5000))


def test_a_bell_that_nobody_hears_any_more_holds_nobody_up() -> None:
    async def made() -> Callable[[], None]:
        return bell(asyncio.get_running_loop(), lambda: None)

    ring = asyncio.run(made())
    for _ in range(100_000):
        ring()


def test_what_came_before_somebody_waits_is_not_lost() -> None:
    async def take() -> list[Any]:
        answer, found = Answer(), []
        answer.put(answers.Event([Chosen(1)]))
        await answer.wait(PATIENCE)
        answer.put(answers.Event([Chosen(2)]))
        found.append(await asyncio.wait_for(answer.take(), PATIENCE))
        await answer.wait(0.01)
        asyncio.get_running_loop().call_later(0.01, answer.put, answers.Event(end="stop"))
        found.append(await asyncio.wait_for(answer.take(), PATIENCE))
        return found

    first, last = asyncio.run(take())
    assert first == ([Chosen(1), Chosen(2)], None)
    assert last == ([], answers.Event(end="stop"))
