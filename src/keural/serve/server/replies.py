"""An answer on its way to a client: as a whole or as a stream of events, until it ends or nobody is there any more.

In: requests, and how an API writes what comes. Out: what is sent. Until the first byte an error has a status; after it, it is an
event, and the stream ends. Whatever ends a reply, its slots are free at the next step of the network.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keural.errors import UserError
from keural.serve.batching.requests import Chosen, Event, QueueFull, Request
from keural.serve.batching.runner import Ticket
from keural.serve.calls import Places
from keural.serve.server.answers import Answer
from keural.serve.server.errors import ApiError, json_response, to_json
from keural.serve.server.pieces import Piece, Pieces
from keural.serve.server.service import Service

LOG_ENTRY = "keural.log"
"""Key of a request's scope under which its entry of the log lies."""
SEND_BODY = "keural.send"
"""Key of a request's scope under which lies what sends a body, once an answer has begun: the framework's layers only watch the
beginning."""
POSITION_HEADER = b"x-queue-position"
"""Of a request: `1` lets a stream say its place in the queue while it waits."""
POSITION_SECONDS = 0.25
"""So often the place is looked at."""
SHUTTING_DOWN = "the server is shutting down"
Finish = Literal["stop", "length"]


@dataclass(slots=True)
class Part:
    """What came of one choice."""

    index: int
    piece: Piece
    finish: Finish | None
    """Why it ended, with its last part."""


@dataclass
class Choice:
    """What has come of one choice so far."""

    pieces: Pieces
    texts: list[str] = field(default_factory=list)
    tokens: list[Chosen] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, part: Part) -> None:
        """Append a part."""
        self.texts.append(part.piece.text)
        self.tokens += part.piece.tokens
        self.starts += part.piece.starts
        self.finish = part.finish

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class Usage(NamedTuple):
    """Tokens of a reply."""

    prompt: int
    answer: int
    cached: int
    """Of the prompt, those that a slot held already."""


class Writer(Protocol):
    """How an API writes a reply."""

    def begin(self, usage: Usage) -> list[bytes]:
        """Events before all others, sent when the first token is there."""

    def part(self, part: Part) -> list[bytes]:
        """Events of a part."""

    def end(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The last events."""

    def failure(self, error: ApiError) -> list[bytes]:
        """Events of a stream that cannot go on."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The reply as one object."""


def event(value: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(value) + b"\n\n"


class TextEvent:
    """Writes events that differ in one text alone: what stands around it is written once."""

    def __init__(self, written: Callable[[str], bytes]) -> None:
        """`written` gives the whole event for a text, which stands in it once."""
        self._head, self._tail = written(_MARK).split(to_json(_MARK))

    def __call__(self, text: str) -> bytes:
        """The event for a text, as `written` gives it."""
        return self._head + encode_basestring(text).encode() + self._tail


class NumberedTextEvent:
    """Writes events that differ in a number and a text after it; see `TextEvent`."""

    def __init__(self, written: Callable[[int, str], bytes]) -> None:
        """`written` gives the whole event for a number and a text, each of which stands in it once, the number first."""
        self._head, rest = written(_NUMBER, _MARK).split(b"%d" % _NUMBER)
        self._middle, self._tail = rest.split(to_json(_MARK))

    def __call__(self, number: int, text: str) -> bytes:
        """The event for a number and a text, as `written` gives it."""
        return b"%b%d%b%b%b" % (self._head, number, self._middle, encode_basestring(text).encode(), self._tail)


_MARK, _NUMBER = uuid.uuid4().hex, uuid.uuid4().int
"""A text and a number that nobody writes."""


class ClientLeft(Exception):
    """Nobody waits for the reply any more."""


class Reply(Response):
    """Runs requests, `n` for each prompt one after another, and sends what becomes of them."""

    def __init__(
        self,
        service: Service,
        requests: Sequence[Request],
        n: int,
        stops: Sequence[str],
        writer: Writer,
        stream: bool,
        places: Places = "",
    ) -> None:
        super().__init__()
        self._service, self._requests, self._n = service, requests, n
        self._choices = [Choice(Pieces(service.tokenizer, service.spell, stops, places)) for _ in requests]
        self._writer, self._streamed = writer, stream
        self._begun = self._written = False
        """Whether anything of a stream was sent, and whether anything of its answer was."""
        self._log: MutableMapping[str, Any] = {}
        self._send_body: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; what Starlette calls."""
        self._log = scope.get(LOG_ENTRY, {})
        self._send_body = scope.get(SEND_BODY, send)
        try:
            await until_gone(receive, self._run(scope, receive, send))
        except ClientLeft:
            self._service.metrics.client_left()
            self._log["client_left"] = True

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            tells = _wants_position(scope) and self._streamed
            async with self._service.answers.ask(self._requests) as asked:
                try:
                    if tells:
                        await self._tell_position(*asked[0], send)
                    parts = self._follow(0, *asked[0]) if len(asked) == 1 else self._parts(asked)
                    await self._answer([ticket for ticket, _ in asked], parts, send)
                finally:
                    for choice in self._choices:
                        self._service.metrics.count_answer(choice.pieces.count)
        except QueueFull as error:
            self._service.metrics.rejected("queue_full")
            await self._service.queue_full(error).response(scope["path"])(scope, receive, send)
        except (ApiError, UserError) as error:
            refusal = error if isinstance(error, ApiError) else ApiError(503, str(error), code="unavailable")
            self._log["error"] = refusal.code
            if self._begun:
                await _send_events(send, self._writer.failure(refusal), last=True)
            else:
                await refusal.response(scope["path"])(scope, receive, send)

    async def _tell_position(self, ticket: Ticket, answer: Answer, send: Send) -> None:
        """Say the place in the queue, in comments of the stream, until the answer's turn has come."""
        told = None
        await answer.wait(POSITION_SECONDS)
        while (place := self._service.answers.position(ticket)) is not None:
            if place != told:
                await self._begin(send)
                await _send_events(send, [b": queue %d\n\n" % place])
                told = place
            await answer.wait(POSITION_SECONDS)
        if told is not None:
            await _send_events(send, [b": queue 0\n\n"])

    async def _answer(self, tickets: Sequence[Ticket], parts: AsyncGenerator[Part, None], send: Send) -> None:
        async with contextlib.aclosing(parts):
            async for part in parts:
                self._choices[part.index].add(part)
                if not self._streamed:
                    continue
                if self._written:
                    events = self._writer.part(part)
                else:
                    self._written = True
                    events = [*self._writer.begin(self._usage(tickets)), *self._writer.part(part)]
                    await self._begin(send)
                if events:
                    await self._send_body({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        usage = self._usage(tickets)
        self._log.update(prompt_tokens=usage.prompt, cached_tokens=usage.cached, answer_tokens=usage.answer)
        self._log["finish"] = [choice.finish for choice in self._choices]
        if self._streamed:
            await _send_events(send, self._writer.end(self._choices, usage), last=True)
        else:
            await _send_whole(send, json_response(self._writer.whole(self._choices, usage)))

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _usage(self, tickets: Sequence[Ticket]) -> Usage:
        firsts = tickets[:: self._n]
        prompt = sum(len(ticket.request.prompt_ids) for ticket in firsts)
        answer = sum(choice.pieces.count for choice in self._choices)
        return Usage(prompt, answer, sum(ticket.cached_tokens for ticket in firsts))

    async def _parts(self, asked: Sequence[tuple[Ticket, Answer]]) -> AsyncGenerator[Part, None]:
        """The parts of several choices as they come; raises what one of them fails with."""
        queue: asyncio.Queue[Part | Exception] = asyncio.Queue(len(asked))

        async def pass_on(index: int) -> None:
            try:
                async for part in self._follow(index, *asked[index]):
                    await queue.put(part)
            except Exception as error:  # whatever it is: nobody else hears of it, and the reply would wait for ever
                await queue.put(error)

        followers = [asyncio.create_task(pass_on(index)) for index in range(len(asked))]
        try:
            left = len(asked)
            while left:
                found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                left -= found.finish is not None
                yield found
        finally:
            for follower in followers:
                follower.cancel()

    async def _follow(self, index: int, ticket: Ticket, answer: Answer) -> AsyncGenerator[Part, None]:
        """The parts of one choice; the last one, perhaps an empty one, says why it ended."""
        pieces = self._choices[index].pieces
        while True:
            tokens, ended = await answer.take()
            piece = pieces.push(tokens)
            if pieces.stopped_by is None and ended is not None:
                failure = _of_end(ended) or _of_form(ticket.request)
                if failure is not None:
                    if piece:
                        yield Part(index, piece, None)  # it came before what went wrong
                    raise failure
                rest = pieces.finish()
                piece = Piece(piece.text + rest.text, piece.tokens + rest.tokens, piece.starts + rest.starts)
            if pieces.stopped_by is not None:
                self._service.answers.scheduler.cancel(ticket, "stop")
                yield Part(index, piece, "stop")
                return
            if ended is not None:
                yield Part(index, piece, "stop" if ended.end == "stop" else "length")
                return
            yield Part(index, piece, None)


def _of_end(ended: Event) -> ApiError | None:
    """The error that an end is which no answer has by itself."""
    if ended.end == "deadline":
        return ApiError(504, "the answer did not end within its deadline", code="deadline_exceeded")
    if ended.end == "cancelled":
        return ApiError(503, SHUTTING_DOWN, code="shutting_down", headers={"Retry-After": "5"})
    if ended.end == "unavailable":
        return ApiError(503, ended.error or "nobody takes the request", code="unavailable", headers={"Retry-After": "5"})
    if ended.end == "refused":
        return ApiError(400, ended.error or "the engine refused the request", code="refused_by_engine")
    if ended.end == "error":
        return ApiError(500, ended.error or "the model failed", code="model_error")
    return None


def _of_form(request: Request) -> ApiError | None:
    """The error of an answer that ended because nothing could follow in its form."""
    failure = getattr(request.constraint, "failure", None)
    if failure is None:
        return None
    return ApiError(400, f"the answer's form cannot be followed to its end: {failure}", code="form_too_complex")


def _wants_position(scope: Scope) -> bool:
    """Whether a request asks for its place in the queue. Raises `ApiError` for a header that says neither yes nor no."""
    asked = dict(scope["headers"]).get(POSITION_HEADER)
    if asked not in (None, b"0", b"1"):
        raise ApiError(400, "the header X-Queue-Position is 1 or 0", "x-queue-position", "invalid_value")
    return asked == b"1"


async def _send_events(send: Send, events: Sequence[bytes], last: bool = False) -> None:
    body = b"".join(events)
    if body or last:
        await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _send_whole(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work` while the client is there. Raises `ClientLeft`, the work cancelled, when it is not. The body was read before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive()))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(message: Awaitable[MutableMapping[str, Any]]) -> None:
    """Wait until the client has left."""
    await message
