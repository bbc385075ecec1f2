"""What programs are told of the addresses (`/openapi.json`): every status that may come, and the shape of every answer.

In: an application and its service. Out: the description that the web framework makes of requests, with answers as they are. The
framework knows neither: its own 422 is never sent, and answers are not models of its kind.
"""

from typing import Any

from fastapi import FastAPI

from keural.serve.server.errors import MESSAGES
from keural.serve.server.gate import OPEN
from keural.serve.server.generation import TIMEOUT_HEADER
from keural.serve.server.replies import POSITION_HEADER
from keural.serve.server.service import Service

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": COUNT}
ANY: Schema = {"type": "object"}
ALWAYS = {
    400: "A field or header is wrong, or this is no HTTP.",
    408: "The request did not come in time.",
    431: "The head of the request is too large.",
    500: "The network failed, or the server did.",
    503: "It shuts down, has too many connections, or cannot answer any more.",
}
"""What any address may answer beside what was asked for."""
WITH_BODY = {
    404: "There is no model of this name.",
    413: "The body is too large.",
    415: "The body is not JSON in UTF-8 as it stands.",
}
GENERATING = {429: "Too many wait; `Retry-After` says how long.", 504: "The answer did not end within its deadline."}
GENERATES = {"/v1/chat/completions", "/v1/completions", "/v1/responses", MESSAGES}
TEXT_ANSWERS = {"/metrics": "text/plain"}
BEARER: dict[str, list[str]] = {"bearer": []}
API_KEY: dict[str, list[str]] = {"api_key": []}


def _object(**properties: Schema) -> Schema:
    """An object that has all of these, and perhaps more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _word(*words: str | bool | None) -> Schema:
    return {"enum": list(words)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


USAGE = _object(
    prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT, prompt_tokens_details=_object(cached_tokens=COUNT)
)
MODEL = _object(
    id=TEXT, object=_word("model"), created=COUNT, owned_by=TEXT, max_model_len=COUNT,
    type=_word("model"), display_name=TEXT, created_at=TEXT, lifecycle=_word("active"),
)  # fmt: skip
ANSWERS: dict[str, Schema] = {
    "/health": _object(status=_word("ok")),
    "/ready": _object(status=_word("ready")),
    "/metrics": TEXT,
    "/version": _object(version=TEXT),
    "/v1/models": _object(object=_word("list"), data=_list(MODEL), has_more=_word(False), first_id=TEXT, last_id=TEXT),
    "/v1/models/{name}": MODEL,
    "/v1/chat/completions": _object(
        id=TEXT,
        object=_word("chat.completion"),
        created=COUNT,
        model=TEXT,
        choices=_list(
            _object(
                index=COUNT,
                message=_object(role=_word("assistant"), content=_or_null(TEXT)),
                logprobs=_or_null(ANY),
                finish_reason=TEXT,
            )
        ),
        usage=USAGE,
    ),
    "/v1/completions": _object(
        id=TEXT,
        object=_word("text_completion"),
        created=COUNT,
        model=TEXT,
        choices=_list(_object(index=COUNT, text=TEXT, logprobs=_or_null(ANY), finish_reason=TEXT)),
        usage=USAGE,
    ),
    "/v1/responses": _object(
        id=TEXT,
        object=_word("response"),
        created_at=COUNT,
        model=TEXT,
        status=_word("completed", "incomplete"),
        output=_list(_object(type=TEXT)),
        usage=_object(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
    ),
    MESSAGES: _object(
        id=TEXT,
        type=_word("message"),
        role=_word("assistant"),
        model=TEXT,
        content=_list(_object(type=TEXT)),
        stop_reason=TEXT,
        stop_sequence=_or_null(TEXT),
        usage=_object(input_tokens=COUNT, output_tokens=COUNT),
    ),
    f"{MESSAGES}/count_tokens": _object(input_tokens=COUNT),
    "/tokenize": _object(count=COUNT, max_model_len=COUNT, tokens=IDS),
    "/detokenize": _object(prompt=TEXT),
    "/v1/chat/completions/render": _object(token_ids=IDS, count=COUNT, max_model_len=COUNT),
}
"""The shape of what was asked for, by address; a stream is events."""
EVENT: Schema = {"type": "object", "properties": {"event": TEXT, "data": TEXT}, "required": ["data"]}
"""Of a stream: one of its events."""
ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)))
MESSAGES_ERROR = _object(type=_word("error"), error=_object(type=TEXT, message=TEXT))


def describe(app: FastAPI, service: Service) -> None:
    """Let the application describe itself as it is."""
    made_by_the_framework = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made_by_the_framework(), service)
        return made_by_the_framework()  # it keeps what it made

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(found: dict[str, Any], service: Service) -> None:
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= {"Error": ERROR, "MessagesError": MESSAGES_ERROR}
    for schema in schemas.values():
        _name_model(schema, service.name)
    if service.keys is not None:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "api_key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _responses(path, method, service)
            if path in GENERATES:
                operation.setdefault("parameters", []).extend([_timeout(), _position()])
            if service.keys is not None:
                operation["security"] = [] if path in OPEN else [BEARER, API_KEY]


def _responses(path: str, method: str, service: Service) -> dict[str, Any]:
    """Every status that a request may be answered with."""
    statuses = dict(ALWAYS)
    if method == "post":
        statuses |= WITH_BODY
    if "{" in path:
        statuses[404] = WITH_BODY[404]
    if path in GENERATES:
        statuses |= GENERATING
    if service.keys is not None and path not in OPEN:
        statuses[401] = "A key is missing, or not known."
    if service.hosts is not None:
        statuses[403] = "This server does not answer to the name that it was called by."
    kind = "MessagesError" if path.startswith(MESSAGES) else "Error"
    failure = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
    whole = {TEXT_ANSWERS.get(path, "application/json"): {"schema": ANSWERS.get(path, {})}}
    streamed = {"text/event-stream": {"schema": EVENT}} if path in GENERATES else {}
    return {
        "200": {"description": "What was asked for.", "content": whole | streamed},
        **{str(status): {"description": what, "content": failure} for status, what in sorted(statuses.items())},
    }


def _timeout() -> dict[str, Any]:
    return {
        "name": TIMEOUT_HEADER.title(),
        "in": "header",
        "description": "Seconds for the answer, where they are fewer than the server's own.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }


def _position() -> dict[str, Any]:
    return {
        "name": POSITION_HEADER.decode().title(),
        "in": "header",
        "description": "1: comments of a stream say its place in the queue while it waits.",
        "schema": {"enum": ["0", "1"]},
    }


def _name_model(schema: Schema, name: str) -> None:
    """Say which model there is."""
    model = schema.get("properties", {}).get("model")
    if model is not None:
        for kind in model.get("anyOf", [model]):
            if kind.get("type") == "string":
                kind["enum"] = [name]
