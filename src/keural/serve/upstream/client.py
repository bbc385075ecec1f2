"""One server elsewhere: its health, what it can do, and the stream of an answer.

In: an address, a contract, a key. Out: parts of answers. Nothing is taken on trust: sizes are bounded, and what is no JSON of the
contract's shape is an error of that server.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx

from keural.serve.batching.requests import Request
from keural.serve.upstream.child import Child
from keural.serve.upstream.contract import (
    NOT_THE_REQUEST,
    Contract,
    Facts,
    Failed,
    Garbage,
    Gone,
    Json,
    Later,
    Part,
    Refused,
    raise_error,
    the_object,
)

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 25.0
"""For an answer about health: SGLang makes a token first and gives itself 20."""
LOOK_SECONDS = 60.0
"""For what a server says of itself, and the one token that is asked for."""
SETTLE_SECONDS = 0.5
LARGEST_EVENT = 16 * 1024 * 1024
LONGEST_ERROR = 64 * 1024
DONE = b"[DONE]"
HINTS = {
    401: "it wants another key (--upstream-key-file)",
    403: "it does not let us; vLLM must be started with --enable-scale-out",
    404: "it has no such address; see --engine for the kind of server that it is",
    429: "it has too much to do",
}
"""What to do about a status."""


class Server:
    """A server that continues ids."""

    def __init__(self, url: str, contract: Contract, key: str | None, child: Child | None = None) -> None:
        self.url, self.contract, self.child = url, contract, child
        self.facts: Facts | None = None
        """None until it was looked at."""
        self.trouble: str | None = "it was not asked yet"
        """Why it answers nothing now; None while it does."""
        self.running = self.asked = self.failed = 0
        """Requests that it has now, that it was given, and that it did not bring to an end."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(connect=CONNECT_SECONDS, read=None, write=30.0, pool=None)
        self.wake = asyncio.Event()
        """Set when somebody should look after it at once."""
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None), trust_env=False
        )  # fmt: skip

    def lose(self, why: str) -> None:
        """It cannot be spoken to: nothing is asked of it until somebody has looked."""
        if self.trouble is None:
            self.trouble = why
        self.wake.set()

    async def settle(self) -> None:
        """After a failure: wait a moment for the end of an engine of ours, which explains it."""
        self.wake.set()
        if self.child is not None and self.child.exit is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.child.wait(), SETTLE_SECONDS)
        if self.child is not None and self.child.exit is not None:
            self.lose("has ended")

    async def close(self) -> None:
        """Give its connections back."""
        await self._client.aclose()

    async def healthy(self) -> bool:
        """Whether it says that it works. Raises `Failed` where it cannot be reached."""
        try:
            return (await self._client.get("/health", timeout=httpx.Timeout(HEALTH_SECONDS, connect=CONNECT_SECONDS))).is_success
        except httpx.HTTPError as error:
            raise _failure(error) from error

    async def look(self, model: str, vocab_size: int, longest: int) -> Facts:
        """What it can do, after a look at whether it is a server of this model. Raises `Failed` where it is not."""
        found: Facts = await self.contract.facts(self._get, model)
        if found.context_length > longest:
            found = replace(found, context_length=longest)
        await self._check_vocabulary(model, vocab_size)
        return found if self.child is None else replace(found, plain_logprobs=True)

    async def _check_vocabulary(self, model: str, vocab_size: int) -> None:
        """The last id must be known and the next one not."""
        try:
            await self._post(self.contract.path, self.contract.probe(model, vocab_size - 1))
        except Refused as error:
            raise Failed(f"does not know the last of this model's {vocab_size} ids: it serves another model", error.said) from error
        try:
            await self._post(self.contract.path, self.contract.probe(model, vocab_size))
        except Refused:
            return
        raise Failed(f"knows more than this model's {vocab_size} ids: it serves another model")

    async def _get(self, path: str) -> Any:
        return await self._json("GET", path, None)

    async def _post(self, path: str, body: Json) -> Any:
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: Json | None) -> Any:
        """The JSON of an answer. Raises `Failed`."""
        timeout = httpx.Timeout(LOOK_SECONDS, connect=CONNECT_SECONDS)
        try:
            async with self._client.stream(method, path, json=body, timeout=timeout) as response:
                await _check_status(response)
                data = await _up_to(response, LARGEST_EVENT)
        except httpx.HTTPError as error:
            raise _failure(error) from error
        return _parsed(data)

    async def answer(self, request: Request, request_id: str, model: str, max_tokens: int) -> AsyncGenerator[Part, None]:
        """The parts of an answer; after the one with an end come only numbers of held tokens. Raises `Failed`.

        Closing the generator gives the answer up.
        """
        assert self.facts is not None, "a server is asked after it was looked at"
        body = self.contract.body(request, request_id, model, max_tokens, self.facts)
        read, ended = self.contract.reader(request), False
        try:
            async with self._client.stream("POST", self.contract.path, json=body) as response:
                await _check_status(response)
                async with contextlib.aclosing(_events(response)) as events:
                    async for data in events:
                        part = read(the_object(_parsed(data), "an event"))
                        if ended:
                            part = Part(cached=part.cached)
                        ended = ended or part.end is not None
                        yield part
        except httpx.HTTPError as error:
            if not ended:
                raise _failure(error) from error
        if not ended:
            raise Later("broke the answer off")

    async def give_up(self, request_id: str) -> None:
        """Tell it that nobody waits for an answer any more, where closing the connection does not. Raises nothing."""
        if self.contract.abort is not None:
            path, body = self.contract.abort(request_id)
            with contextlib.suppress(httpx.HTTPError):
                await self._client.post(path, json=body, timeout=CONNECT_SECONDS)


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events up to the mark of the end. Raises `Garbage`."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise Garbage(f"answers with {kind[:60]!r} where a stream was asked for")
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > LARGEST_EVENT:
            raise Garbage("gave an event without an end")
        for line in lines:
            line = line.strip()
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == DONE:
                    return
                yield data


async def _check_status(response: httpx.Response) -> None:
    """Raise what a status other than success says."""
    if response.is_success:
        return
    status = response.status_code
    said = (await _up_to(response, LONGEST_ERROR)).decode("utf-8", "replace")
    with contextlib.suppress(ValueError, AttributeError):
        found = json.loads(said)
        error = found.get("error", found.get("detail", said))
        said = str(error.get("message", error) if isinstance(error, dict) else error)
    said = said[:300] or response.reason_phrase
    if status in (502, 503, 504):
        raise Later(f"answers with status {status}", said)
    if status in HINTS:
        raise Failed(f"answers with status {status}: {HINTS[status]}", said)
    if status in NOT_THE_REQUEST or status >= 500 or status < 400:
        raise Failed(f"answers with status {status}", said)
    raise_error({"message": said, "code": status})


async def _up_to(response: httpx.Response, most: int) -> bytes:
    """The body of a response. Raises `Garbage` where it is longer than `most` bytes."""
    data = b""
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > most:
            raise Garbage("gave an answer without an end")
    return data


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbage("gave what is not JSON") from error


def _failure(error: httpx.HTTPError) -> Failed:
    """What is said of a connection that failed."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Gone("cannot be reached")
    return Later("does not answer" if isinstance(error, httpx.ReadTimeout) else "broke the connection")
