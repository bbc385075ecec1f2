"""What stands before every address: who may come in, how much may be sent, and one line in the log for each request.

In: an ASGI application. Out: the same, guarded. It is the outermost layer: whatever fails behind it is an error in the API's shape.
"""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keural.serve.server.errors import ApiError, of_ours
from keural.serve.server.keys import offered_key
from keural.serve.server.metrics import REASONS
from keural.serve.server.page import ADDRESSES
from keural.serve.server.replies import LOG_ENTRY, SEND_BODY, SHUTTING_DOWN
from keural.serve.server.service import Service
from keural.serve.server.settings import Limits

SILENT = {"/health", "/ready"}
"""Addresses that are asked all the time: the log has them when they say no."""
OPEN = SILENT | set(ADDRESSES)
"""Addresses that need no key: they say yes or no, or are files of this package. The page asks for a key itself."""
ANSWERED = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
"""Addresses at which the network answers. While its queue is full nobody looks at what is asked: refusals must cost little."""
BODIES = {413: "body_too_large", 408: "too_slow"}
HOST = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::[0-9]*)?")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

log = logging.getLogger("keural.serve")


class Gate:
    """Lets requests through to `app`, or answers them itself."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the server calls."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        entry: dict[str, Any] = {"request_id": _request_id(headers), "method": scope["method"]}
        scope[LOG_ENTRY] = entry
        begun = time.perf_counter()
        body = _Body(receive, headers, self._service.limits)
        reply = _Sending(send, body, entry)
        scope[SEND_BODY] = reply.send
        try:
            await self._pass(scope, headers, body, reply)
        finally:
            if body.left:
                self._service.metrics.client_left()
                entry["client_left"] = True
            self._note(scope, entry, time.perf_counter() - begun)

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", reply: "_Sending") -> None:
        try:
            refusal = self._refusal(scope, headers)
            if refusal is None and scope["method"] == "POST" and scope["path"] in ANSWERED:
                refusal = await self._queue_full(body)
            if refusal is not None:
                await refusal.response(scope["path"])(scope, body.receive, reply.send)
            else:
                await self._answer(scope, body, reply)
        except Exception as error:  # an error of ours: the client hears of it, the log says where, and the server goes on
            log.exception("a request failed")
            scope[LOG_ENTRY]["error"] = type(error).__name__
            if not reply.begun:
                await of_ours().response(scope["path"])(scope, body.receive, reply.send)

    async def _answer(self, scope: Scope, body: "_Body", reply: "_Sending") -> None:
        """Let a request through. HEAD is asked of every address that GET is; the server leaves its body out."""
        seen = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(seen, body.receive, reply.send)
        finally:
            scope["route"] = seen.get("route")

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        """Why a request is not even looked at."""
        service = self._service
        if service.connections() > service.limits.connections and scope["path"] not in SILENT:
            service.metrics.rejected("connections")
            return ApiError(503, f"more than {service.limits.connections:,} connections are open", code="too_many_connections",
                            headers={"Retry-After": "5", "Connection": "close"})  # fmt: skip
        host = headers.get(b"host", b"").decode("latin-1")
        if service.hosts is not None and _host_name(host) not in service.hosts:
            service.metrics.rejected("host")
            return ApiError(403, "this server does not answer to that name; see --allow-host", code="host_not_allowed")
        if service.keys is not None and scope["path"] not in OPEN:
            key = offered_key(headers)
            if key is None or not service.keys.admits(key):
                service.metrics.rejected("key")
                what = "no API key was sent" if key is None else "this API key is not known"
                return ApiError(401, f"{what}; send one as `Authorization: Bearer KEY`", code="invalid_api_key",
                                headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if service.draining and scope["method"] == "POST":
            service.metrics.rejected("draining")
            return ApiError(503, SHUTTING_DOWN, code="shutting_down", headers={"Retry-After": "5", "Connection": "close"})
        return None

    async def _queue_full(self, body: "_Body") -> ApiError | None:
        """Why nothing more is asked of the network now. The body is taken first: who still sends might not read the answer."""
        try:
            self._service.check_queue()
        except ApiError as refusal:
            try:
                while not body.whole and not body.left:
                    await body.receive()
            except ApiError as error:
                return error
            self._service.metrics.rejected("queue_full")
            return refusal
        return None

    def _note(self, scope: Scope, entry: dict[str, Any], seconds: float) -> None:
        """Put a request into the log: its route, not its address, which may hold anything."""
        entry["route"] = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in ANSWERED else None)
        entry["seconds"] = round(seconds, 4)
        if "status" in entry:
            self._service.metrics.answered(entry["status"])
        if entry.get("status") in BODIES:
            self._service.metrics.rejected(BODIES[entry["status"]])
        if entry["route"] not in SILENT or entry.get("status") != 200:
            with contextlib.suppress(OSError):  # a disk that is full: the answer was sent, and the next one will be
                self._service.log({"event": "request", **entry})


def refused_before(service: Service, status: int, code: str) -> str:
    """Count and log what was refused before it was a request; returns its name."""
    entry: dict[str, Any] = {"request_id": _request_id({}), "method": None, "status": status, "route": None, "error": code}
    service.metrics.answered(status)
    if code in REASONS:
        service.metrics.rejected(code)
    with contextlib.suppress(OSError):
        service.log({"event": "request", **entry})
    return str(entry["request_id"])


class _Body:
    """A request's body as it is received: not too much of it, and not too slowly."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._announced = headers.get(b"content-length", b"0")
        self.whole = b"transfer-encoding" not in headers and self._announced == b"0"
        """Whether nothing more of it comes."""
        self.left = False
        """Whether the client left before all of it had come: nobody hears of what is sent then, and no status counts."""
        self._size = 0
        self._end: float | None = None

    async def receive(self) -> Message:
        """The next message. Raises `ApiError` beyond the limits."""
        if self.whole and self._size == 0 and self._end is None:
            self._end = 0.0
            return {"type": "http.request", "body": b"", "more_body": False}
        if self.whole:
            return await self._receive_rest()
        if int(self._announced) > self._limits.body_bytes:
            raise self._too_large()
        loop = asyncio.get_running_loop()
        self._end = self._end or loop.time() + self._limits.body_seconds
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, f"the request was not whole after {self._limits.body_seconds:.0f} s", code="too_slow") from error
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limits.body_bytes:
                raise self._too_large()
            self.whole = not message.get("more_body", False)
        else:
            self.left = True
        return message

    async def _receive_rest(self) -> Message:
        """After the body only the end of the connection is news; the server may still say that the body is whole."""
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request may have {self._limits.body_bytes:,} bytes", code="body_too_large")


class _Sending:
    """What is sent, with the headers that every answer has."""

    def __init__(self, send: Send, body: _Body, entry: dict[str, Any]) -> None:
        self._send, self._body, self._entry = send, body, entry
        self.begun = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if self._body.left:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self._entry["status"] = message["status"]
            name = self._entry["request_id"].encode()
            added = [(b"x-request-id", name), (b"request-id", name), (b"x-content-type-options", b"nosniff")]
            if not self._body.whole:
                added.append((b"connection", b"close"))  # the rest of the body is not read
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await self._send(message)


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The name of a request: as the client calls it, where that is a plain name."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    """A host without its port; nothing where that is not what it is."""
    found = HOST.fullmatch(host)
    return found[1].lower() if found else ""
