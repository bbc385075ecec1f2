"""What a client is told when something does not work, in the shape that its library expects.

In: what is wrong. Out: a status and `{"error": {message, type, param, code}}`.
"""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from keural.errors import UserError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""By status; other ones from 400 on are `invalid_request_error`, and from 500 on `server_error`."""

MESSAGES = "/v1/messages"
MESSAGES_TYPES = TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}
"""The same in Anthropic's API, where others are `invalid_request_error` and `api_error`."""
DETAILS = {"thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}
"""By field that is refused, what Anthropic's own client reads beside: it asks the server to hold the loop of its tools, and goes on
by sending all of the conversation where it hears this."""


class ApiError(HTTPException):
    """A refusal: `status`, one line for a person, the field it is about, and a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.status, self.param, self.code = status, param, code
        self.message = str(UserError(message))  # one line, without what a terminal would obey

    def body(self) -> dict[str, Any]:
        """The error as the API has it."""
        return error_body(self.status, self.message, self.param, self.code)

    def response(self, path: str) -> Response:
        """The answer that says so, in the shape of the API that the address belongs to."""
        return json_response(of_messages(self) if path.startswith(MESSAGES) else self.body(), self.status, self.headers)


def of_messages(error: ApiError) -> dict[str, Any]:
    """The error as Anthropic's API has it."""
    kind = MESSAGES_TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    details = DETAILS.get(error.param or "")
    return {"type": "error", "error": {"type": kind, "message": error.message, **({"details": details} if details else {})}}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that an error is."""
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as an answer in JSON."""
    return Response(to_json(value), status, dict(headers or {}), "application/json")


def to_json(value: Any) -> bytes:
    """JSON as it is sent: UTF-8, without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def of_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """What the web framework refuses by itself."""
    known = {404: ("there is nothing at this address", "not_found"), 405: ("this address has no such method", "method_not_allowed")}
    message, code = known.get(status, (detail, None))
    return ApiError(status, message, code=code, headers=headers)


def of_ours() -> ApiError:
    """What nobody foresaw, as the client hears of it; the log says where it was."""
    return ApiError(500, "the server failed; its log says more", code="internal_error")
