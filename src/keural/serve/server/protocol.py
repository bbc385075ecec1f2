"""The connection: what uvicorn does, with an end to heads that are too large or too slow and to readers who take nothing.

In: bytes from strangers. Out: requests for the application. Bodies have their limits in `gate.py`; before a request has a head, no
application sees it.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from keural.serve.server.errors import error_body, to_json
from keural.serve.server.settings import Limits

SPARE = 256
"""Connections beyond the limit that hear so; further ones are closed without a word."""
MALFORMED = "this is not an HTTP request"


class GuardedProtocol(H11Protocol):
    """One connection."""

    limits: Limits
    refused: Callable[[int, str], str]
    """Hears of a status and its code that were said without an application; gives the request a name."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.conn: _Connection = _Connection(h11.SERVER, self.limits.header_bytes)
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; its first request must come soon."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections + SPARE:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client is gone."""
        _stop(self._head_timer)
        self._head_timer = None
        _stop(self._send_timer)
        self._send_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self.conn.their_state is h11.IDLE and self._head_timer is None:
            self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            _stop(self._head_timer)
            self._head_timer = None

    def on_response_complete(self) -> None:
        """An answer is sent; the next request may already be there in part."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] and self._head_timer is None:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what came, and close; what uvicorn calls when the rules of HTTP are broken."""
        status, message, code = 400, MALFORMED, "malformed_request"
        if self.conn.head_too_large:
            status, code = 431, "header_too_large"
            message = f"the head of a request may have {self.limits.header_bytes:,} bytes"
        self._refuse(status, message, code)

    def pause_writing(self) -> None:
        """The client takes less than is sent."""
        super().pause_writing()
        self._send_timer = self._send_timer or self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken what waited for it."""
        _stop(self._send_timer)
        self._send_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come for a while: close, also where the client does not take what was sent."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request was not whole after {self.limits.header_seconds:.0f} s", "too_slow")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without an application, where that is still possible, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = to_json(error_body(status, message, code=code))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
                ("x-request-id", self.refused(status, code)),
                ("x-content-type-options", "nosniff"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def guarded_protocol(limits: Limits, refused: Callable[[int, str], str]) -> type[GuardedProtocol]:
    """The class of connections with these limits."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits, "refused": staticmethod(refused)})


class _Connection(h11.Connection):
    """h11 limits the head that it still waits for, not one that came at once."""

    def __init__(self, role: Any, most: int) -> None:
        super().__init__(role, max_incomplete_event_size=most)
        self._most = most
        self.head_too_large = False
        self._in_chunks = False
        """Whether the body that is being sent goes in chunks."""

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]
        """See `h11.Connection.send`. The chunks of a stream are framed here, without checks that were made at its beginning."""
        if type(event) is h11.Data and self._in_chunks and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        sent: bytes | None = super().send(event)
        if type(event) is h11.Response:
            self._in_chunks = b"\r\ntransfer-encoding: chunked\r\n" in (sent or b"").lower()
        return sent

    def next_event(self) -> Any:
        """The next event. Raises `h11.RemoteProtocolError`."""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.head_too_large = error.error_status_hint == 431
            raise
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                # A proxy may take the one and we the other for the end of the body, or know no chunks: what follows would be
                # somebody else's request.
                raise h11.RemoteProtocolError("where the body ends can be read in two ways")
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers.raw_items())
            if size > self._most:
                self.head_too_large = True
                raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        return event


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
