"""`/v1/completions`: text or ids in, their continuation out, without chat markers.

In: prompts and settings. Out: one object, or chunks of it. A text is read after the token that begins every text; ids are read as
they are.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from keural.serve.batching.requests import Chosen
from keural.serve.server.chat_writer import DONE, finite, usage_of
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import MOST_ANSWERS, MOST_LOGPROBS, PREFIX, Generation, only
from keural.serve.server.generation import form_of, requests_of, sampling_of
from keural.serve.server.pieces import Piece
from keural.serve.server.replies import Choice, Part, Reply, TextEvent, Usage, event
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer

Id = Annotated[int, Field(ge=0)]


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return f"{PREFIX}text"
    if value and all(isinstance(item, str) for item in value):
        return f"{PREFIX}texts"
    return f"{PREFIX}lists" if value and isinstance(value[0], list) else f"{PREFIX}ids"


Prompt = Annotated[
    Annotated[str, Tag(f"{PREFIX}text")]
    | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS), Tag(f"{PREFIX}texts")]
    | Annotated[list[Id], Field(min_length=1), Tag(f"{PREFIX}ids")]
    | Annotated[
        list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MOST_ANSWERS), Tag(f"{PREFIX}lists")
    ],
    Discriminator(_kind),
]


class CompletionRequest(Generation):
    """The fields of a request."""

    prompt: Prompt = Field(description="A text, texts, token ids, or lists of them.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(None, description="With so many other tokens.")
    best_of: int | None = Field(None, description="Only the value of `n`.")
    echo: only(False, why="the prompt is not repeated")  # type: ignore[valid-type]
    suffix: only(why="nothing can be put before a text that follows")  # type: ignore[valid-type]


async def answer_completion(service: Service, fields: CompletionRequest, headers: Mapping[str, str]) -> Reply:
    """The reply to a request. Raises `ApiError` for one that cannot be answered as it is asked."""
    service.check_model(fields.model)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise ApiError(
            400, "`best_of` is not supported: answers are not compared; leave it out", "best_of", "unsupported_parameter"
        )
    prompts = await service.read(_prompts, service, fields.prompt)
    for prompt in prompts:
        service.check_room(prompt, "prompt")
    sampling = sampling_of(service, fields, fields.max_tokens)
    form = await form_of(service, fields)
    requests = requests_of(service, fields, prompts, sampling, fields.logprobs, headers, form)
    options = fields.stream_options
    writer = CompletionWriter(service, fields.logprobs is not None, options is not None and bool(options.include_usage))
    return Reply(service, requests, fields.n or 1, fields.stop or (), writer, bool(fields.stream))


def _prompts(service: Service, prompt: str | Sequence[Any]) -> list[list[int]]:
    if isinstance(prompt, str):
        return [text_ids(service.tokenizer, prompt)]
    if isinstance(prompt[0], str):
        return [text_ids(service.tokenizer, text) for text in prompt]
    lists = [list(prompt)] if isinstance(prompt[0], int) else [list(ids) for ids in prompt]
    if any(token >= service.tokenizer.vocab_size for ids in lists for token in ids):
        raise ApiError(400, f"`prompt`: token ids go up to {service.tokenizer.vocab_size - 1}", "prompt", "invalid_value")
    return lists


def text_ids(tokenizer: KeuralTokenizer, text: str) -> list[int]:
    """A running text as the model has read them: after the token that begins every one."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


class CompletionWriter:
    """Writes text completions."""

    def __init__(self, service: Service, logprobs: bool, with_usage: bool) -> None:
        self._tokenizer, self._logprobs, self._with_usage = service.tokenizer, logprobs, with_usage
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": service.name,
        }  # fmt: skip
        self._texts: dict[int, TextEvent] = {}
        """By choice."""

    def begin(self, _: Usage) -> list[bytes]:
        """Nothing: a completion has no role."""
        return []

    def part(self, part: Part) -> list[bytes]:
        """A chunk with text; the last of a choice says why it ended."""
        if not part.piece and part.finish is None:
            return []
        if self._logprobs or part.finish is not None:
            return [self._chunk(part.index, part.piece, part.finish)]
        if part.index not in self._texts:
            self._texts[part.index] = TextEvent(lambda text: self._chunk(part.index, Piece(text), None))
        return [self._texts[part.index](part.piece.text)]

    def _chunk(self, index: int, piece: Piece, finish: str | None) -> bytes:
        usage = {"usage": None} if self._with_usage else {}
        choice = self._choice(index, piece.text, piece.tokens, piece.starts, finish)
        return event({**self._head, "choices": [choice], **usage})

    def end(self, _: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The usage, where it was asked for, and the mark of the end."""
        last = [event({**self._head, "choices": [], "usage": usage_of(usage)})] if self._with_usage else []
        return [*last, DONE]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error as an event."""
        return [event(error.body())]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The completion."""
        found = [
            self._choice(index, choice.text, choice.tokens, choice.starts, choice.finish) for index, choice in enumerate(choices)
        ]
        return {**self._head, "choices": found, "usage": usage_of(usage)}

    def _choice(self, index: int, text: str, tokens: Sequence[Chosen], starts: Sequence[int], finish: str | None) -> dict[str, Any]:
        logprobs = self._of_tokens(tokens, starts) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _of_tokens(self, tokens: Sequence[Chosen], starts: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._name(other): finite(logprob) for other, logprob in [*token.top, (token.id, token.logprob)]}
                for token in tokens
            ],
            "text_offset": list(starts),
        }

    def _name(self, token: int) -> str:
        """A token's text, or its bytes where they are not whole characters, as the API writes them."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
