"""The addresses of the server.

In: a service. Out: an ASGI application with its own description (`/openapi.json`).
"""

import re
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

import keural
from keural.parsing import Malformed, parse_json
from keural.serve.server.chat import ChatRequest, answer_chat
from keural.serve.server.completions import CompletionRequest, answer_completion
from keural.serve.server.description import describe
from keural.serve.server.errors import ApiError, json_response, of_ours, of_status, to_json
from keural.serve.server.fields import refusal
from keural.serve.server.gate import Gate
from keural.serve.server.messages import CountRequest, MessagesRequest, answer_messages, count_tokens
from keural.serve.server.page import File, read_page
from keural.serve.server.responses import ResponsesRequest, answer_responses
from keural.serve.server.service import Service
from keural.serve.server.settings import Limits
from keural.serve.server.tokens import (
    DetokenizeRequest,
    RenderRequest,
    TokenizeRequest,
    detokenize,
    render_chat,
    tokenize,
)

_DIGITS = bytes.maketrans(b"123456789e", b"000000000E")
_ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")
CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s"';]+)""", re.IGNORECASE)
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service) -> ASGIApp:
    """The guarded application."""
    app = FastAPI(title="keural", version=keural.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.route_class = _route_class(service.limits)
    _add_errors(app)
    _add_state(app, service)
    _add_models(app, service)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_page(app)
    describe(app, service)
    return Gate(app, service)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request, fields: Annotated[ChatRequest, Body()]) -> Response:
        """The assistant's next turn of a conversation."""
        return await answer_chat(service, fields, request.headers)

    @app.post("/v1/completions")
    async def create_completion(request: Request, fields: Annotated[CompletionRequest, Body()]) -> Response:
        """What follows a text, or token ids."""
        return await answer_completion(service, fields, request.headers)

    @app.post("/v1/responses")
    async def create_response(request: Request, fields: Annotated[ResponsesRequest, Body()]) -> Response:
        """The assistant's next turn, in the newer API, without a memory."""
        return await answer_responses(service, fields, request.headers)

    @app.post("/v1/messages")
    async def create_message(request: Request, fields: Annotated[MessagesRequest, Body()]) -> Response:
        """The assistant's next turn, in Anthropic's API."""
        return await answer_messages(service, fields, request.headers)

    @app.post("/v1/messages/count_tokens")
    async def count_message_tokens(fields: Annotated[CountRequest, Body()]) -> Response:
        """The tokens of a prompt, in Anthropic's API."""
        return json_response(await count_tokens(service, fields))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize_text(fields: Annotated[TokenizeRequest, Body()]) -> Response:
        """The ids of a text or of a conversation."""
        return json_response(await tokenize(service, fields))

    @app.post("/detokenize")
    async def detokenize_ids(fields: Annotated[DetokenizeRequest, Body()]) -> Response:
        """The text of ids."""
        return json_response(await detokenize(service, fields))

    @app.post("/v1/chat/completions/render")
    async def render_chat_completion(request: Request, fields: Annotated[RenderRequest, Body()]) -> Response:
        """The ids that a conversation's answer would follow."""
        return json_response(await render_chat(service, fields, request.headers))


def _add_models(app: FastAPI, service: Service) -> None:
    of_openai = {"object": "model", "created": service.created, "owned_by": "keural", "max_model_len": service.context_length}
    since = datetime.fromtimestamp(service.created, UTC).isoformat()
    of_messages = {"type": "model", "display_name": service.name, "created_at": since, "lifecycle": "active"}

    def model() -> dict[str, Any]:
        """In both APIs' words: neither minds what the other has beside."""
        return {"id": service.name, **of_openai, **of_messages, **service.facts}

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The models that are served: one."""
        place = {"has_more": False, "first_id": service.name, "last_id": service.name}
        return json_response({"object": "list", "data": [model()], **place})

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        """A model by its name."""
        service.check_model(name)
        return json_response(model())


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the network works or has nothing to do."""
        trouble = service.trouble()
        if trouble is not None:
            raise ApiError(503, trouble, code="unhealthy")
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken."""
        trouble = "the server is shutting down" if service.draining else service.trouble()
        if trouble is not None:
            raise ApiError(503, trouble, code="not_ready")
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": PROMETHEUS})

    @app.get("/version")
    async def version() -> Response:
        """The version of this package."""
        return json_response({"version": keural.__version__})


def _add_page(app: FastAPI) -> None:
    def serve_file(address: str, file: File) -> None:
        @app.get(address, include_in_schema=False)
        async def page(request: Request) -> Response:
            """A file of the page."""
            return file.answer(request)

    for address, file in read_page().items():
        serve_file(address, file)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def refused_by_the_framework(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"
        return of_status(error.status_code, str(error.detail), headers).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found: Any = error.errors()
        path = request.url.path
        if found[0]["loc"] == ("body",) and not request.headers.get("content-type", "").startswith("application/json"):
            what = "send JSON, with the header `Content-Type: application/json`"
            return ApiError(415, what, "content-type", "unsupported_media_type").response(path)
        return refusal(found).response(path)

    @app.exception_handler(Exception)  # the framework would say so in words of its own, and raises it again for the log
    async def failed(request: Request, error: Exception) -> Response:
        return of_ours().response(request.url.path)


def _is_perhaps_no_json(body: bytes) -> bool:
    """Whether there may be in it what Python reads as JSON although nothing may stand in JSON that it becomes: numbers that are
    not finite, and halves of surrogate pairs. Looked for without one expression for all, which takes ten times as long.
    """
    numbers = body.translate(_DIGITS)
    return (
        b"NaN" in body
        or b"Infinity" in body
        or b"E000" in numbers
        or b"E+000" in numbers
        or b"0" * 309 in numbers
        or (b"\\u" in body and _ESCAPED.search(body) is not None)
    )


def _route_class(limits: Limits) -> type[APIRoute]:
    """Routes whose JSON has limits."""

    class LimitedRequest(Request):
        async def json(self) -> Any:
            _check_coding(self.headers)
            body = await self.body()
            try:
                value = parse_json(body, depth=limits.depth, parts=limits.parts, unique=True)
                if _is_perhaps_no_json(body):
                    to_json(value)
            except Malformed as error:
                raise ApiError(400, f"the body is not JSON that can be read: {error}", code="invalid_json") from error
            except UnicodeEncodeError as error:
                raise ApiError(400, "the body is not JSON that can be read: half a surrogate pair", code="invalid_json") from error
            except ValueError as error:
                raise ApiError(400, "the body is not JSON that can be read: not a finite number", code="invalid_json") from error
            return value

    class LimitedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def limited(request: Request) -> Response:
                return await handle(LimitedRequest(request.scope, request.receive))

            return limited

    return LimitedRoute


def _check_coding(headers: Mapping[str, str]) -> None:
    """Raise `ApiError` for a body that is not JSON in UTF-8 as it stands."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    charset = CHARSET.search(headers.get("content-type", ""))
    if coding != "identity":
        raise ApiError(415, "the body is compressed; send it as it is", "content-encoding", "unsupported_encoding")
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "JSON is read as UTF-8 alone", "content-type", "unsupported_encoding")
