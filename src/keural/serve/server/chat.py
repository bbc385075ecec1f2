"""`/v1/chat/completions`: a conversation in, the assistant's next turn out.

In: messages and settings. Out: one object, or chunks of it. The prompt is made of ids: whatever a message spells stays text.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from keural.serve.batching.requests import Chosen
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import MOST_LOGPROBS, PREFIX, Accepted, Count, Fields, Generation, only
from keural.serve.server.generation import form_of, requests_of, sampling_of
from keural.serve.server.replies import Choice, Part, Reply, Usage, event
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

NO_TOOLS = "calls of tools are not supported here"
NO_MEDIA = "this model reads and writes text alone"


class TextPart(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Accepted


def _form(value: Any) -> str:
    return f"{PREFIX}parts" if isinstance(value, list) else f"{PREFIX}text"


Parts = Annotated[list[TextPart], Field(min_length=1)]
Content = Annotated[
    Annotated[str, Tag(f"{PREFIX}text")] | Annotated[Parts, Tag(f"{PREFIX}parts")],
    Discriminator(_form),
]


class Said(Fields):
    """A message of somebody else than the assistant."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: only(why="the model knows roles, not names")  # type: ignore[valid-type]


class Answered(Fields):
    """A turn of the assistant; what our own answers have beside the text may be sent back as it came."""

    role: Literal["assistant"]
    content: Content
    name: only(why="the model knows roles, not names")  # type: ignore[valid-type]
    refusal: only(why="a refusal is said in `content`")  # type: ignore[valid-type]
    annotations: only([], why=NO_MEDIA)  # type: ignore[valid-type]
    audio: only(why=NO_MEDIA)  # type: ignore[valid-type]
    tool_calls: only([], why=NO_TOOLS)  # type: ignore[valid-type]
    function_call: only(why=NO_TOOLS)  # type: ignore[valid-type]


def _speaker(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else None
    return f"{PREFIX}answered" if role == "assistant" else f"{PREFIX}said"


Turn = Annotated[Annotated[Said, Tag(f"{PREFIX}said")] | Annotated[Answered, Tag(f"{PREFIX}answered")], Discriminator(_speaker)]


class Conversation(Fields):
    """What a prompt is made of."""

    messages: Annotated[list[Turn], Field(min_length=1)]


class PlainText(Fields):
    """An answer of any form."""

    type: Literal["text"]


class AnyObject(Fields):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class NamedSchema(Fields):
    """A JSON schema with its name; answers follow it whether it is called strict or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class OfASchema(Fields):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{PREFIX}{kind if kind in ('json_object', 'json_schema') else 'text'}"


Format = Annotated[
    Annotated[PlainText, Tag(f"{PREFIX}text")]
    | Annotated[AnyObject, Tag(f"{PREFIX}json_object")]
    | Annotated[OfASchema, Tag(f"{PREFIX}json_schema")],
    Discriminator(_kind),
]


def schema_of(form: PlainText | AnyObject | OfASchema | None) -> Mapping[str, Any] | None:
    """The schema that answers follow; None for any text."""
    if form is None or isinstance(form, PlainText):
        return None
    return (isinstance(form, OfASchema) and form.json_schema.schema_) or {"type": "object"}


class ChatRequest(Generation, Conversation):
    """The fields of a request."""

    max_completion_tokens: Count | None = Field(None, description="The same as `max_tokens`, and stronger.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(None, description="Only with `logprobs: true`.")
    metadata: Accepted
    safety_identifier: Accepted
    prompt_cache_key: Accepted
    prompt_cache_options: Accepted
    prompt_cache_retention: Accepted
    service_tier: only("auto", "default", why="there is one tier")  # type: ignore[valid-type]
    store: only(False, why="nothing is kept")  # type: ignore[valid-type]
    modalities: only(["text"], why=NO_MEDIA)  # type: ignore[valid-type]
    audio: only(why=NO_MEDIA)  # type: ignore[valid-type]
    response_format: Format | None = Field(None, description="What the answer must be.")
    tools: only([], why=NO_TOOLS)  # type: ignore[valid-type]
    tool_choice: only("none", "auto", why=NO_TOOLS)  # type: ignore[valid-type]
    parallel_tool_calls: only(True, False, why=NO_TOOLS)  # type: ignore[valid-type]
    functions: only([], why=NO_TOOLS)  # type: ignore[valid-type]
    function_call: only("none", "auto", why=NO_TOOLS)  # type: ignore[valid-type]
    prediction: only(why="the answer is not predicted")  # type: ignore[valid-type]
    moderation: only(why="nothing is moderated")  # type: ignore[valid-type]
    reasoning_effort: only("none", why="the model does not reason before it answers")  # type: ignore[valid-type]
    verbosity: only("medium", why="say in a message how long the answer should be")  # type: ignore[valid-type]
    web_search_options: only(why="nothing is searched")  # type: ignore[valid-type]


async def prompt_of(service: Service, turns: Sequence[Said | Answered]) -> list[int]:
    """The ids of a conversation, with the model's own system message where it begins with none. Raises `ApiError`."""
    return await prompt_of_messages(
        service, [Message("system" if turn.role == "developer" else turn.role, _text(turn.content)) for turn in turns]
    )


async def prompt_of_messages(service: Service, messages: list[Message]) -> list[int]:
    """See `prompt_of`."""
    if service.system and messages[0].role != "system":
        messages = [Message("system", service.system), *messages]
    return await service.read(render_prompt, service.tokenizer, messages)


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


async def answer_chat(service: Service, fields: ChatRequest, headers: Mapping[str, str]) -> Reply:
    """The reply to a request. Raises `ApiError` for one that cannot be answered as it is asked."""
    service.check_model(fields.model)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ApiError(400, "`top_logprobs` is only for `logprobs: true`", "top_logprobs", "invalid_value")
    sampling = sampling_of(service, fields, fields.max_completion_tokens or fields.max_tokens)
    prompt = await prompt_of(service, fields.messages)
    service.check_room(prompt, "messages")
    form = await form_of(service, fields, schema_of(fields.response_format), "response_format")
    top = (fields.top_logprobs or 0) if fields.logprobs else None
    requests = requests_of(service, fields, [prompt], sampling, top, headers, form)
    options = fields.stream_options
    writer = ChatWriter(service, bool(fields.logprobs), options is not None and bool(options.include_usage), len(requests))
    return Reply(service, requests, len(requests), fields.stop or (), writer, bool(fields.stream))


class ChatWriter:
    """Writes chat completions."""

    def __init__(self, service: Service, logprobs: bool, with_usage: bool, n: int) -> None:
        self._tokenizer, self._logprobs, self._with_usage, self._n = service.tokenizer, logprobs, with_usage, n
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}

    def begin(self, _: Usage) -> list[bytes]:
        """One chunk for each choice, with its role."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._n)]

    def part(self, part: Part) -> list[bytes]:
        """A chunk with text; the last of a choice says why it ended, and has no text."""
        chunks = []
        if part.piece:
            logprobs = {"logprobs": self._of_tokens(part.piece.tokens)} if self._logprobs else {}
            chunks.append(self._chunk(part.index, {"content": part.piece.text}, logprobs))
        if part.finish is not None:
            chunks.append(self._chunk(part.index, {}, {"finish_reason": part.finish}))
        return chunks

    def end(self, _: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The usage, where it was asked for, and the mark of the end."""
        last = [event({**self._head, "object": CHUNK, "choices": [], "usage": usage_of(usage)})] if self._with_usage else []
        return [*last, DONE]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error as an event."""
        return [event(error.body())]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The completion."""
        found = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._of_tokens(choice.tokens) if self._logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": found, "usage": usage_of(usage)}

    def _chunk(self, index: int, delta: dict[str, Any], more: Mapping[str, Any] = {}) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        usage = {"usage": None} if self._with_usage else {}
        return event({**self._head, "object": CHUNK, "choices": [choice], **usage})

    def _of_tokens(self, tokens: Sequence[Chosen]) -> dict[str, Any]:
        return {"content": named_logprobs(self._tokenizer, tokens), "refusal": None}


CHUNK = "chat.completion.chunk"
DONE = b"data: [DONE]\n\n"


def named_logprobs(tokenizer: KeuralTokenizer, tokens: Sequence[Chosen]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities and those of others."""
    return [
        {
            **_named(tokenizer, token.id, token.logprob),
            "top_logprobs": [_named(tokenizer, other, logprob) for other, logprob in token.top],
        }
        for token in tokens
    ]


def _named(tokenizer: KeuralTokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    """A token with the bytes it stands for, which may be a part of a character only."""
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float | None) -> float:
    """A log-probability as JSON can hold it: that of a token which cannot come is -9999, as the API has it."""
    return max(-9999.0, logprob if logprob is not None else -9999.0)


def usage_of(usage: Usage) -> dict[str, Any]:
    """The tokens of a reply as the API has them."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.answer,
        "total_tokens": usage.prompt + usage.answer,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
