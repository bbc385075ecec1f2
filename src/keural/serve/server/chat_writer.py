"""How `/v1/chat/completions` writes its answers.

In: what comes of them. Out: one object, or chunks of it.
"""

import functools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from keural.serve.batching.requests import Chosen
from keural.serve.calls import Arguments, CallBegun, Places
from keural.serve.server.errors import ApiError
from keural.serve.server.replies import Choice, Part, TextEvent, Usage, event
from keural.serve.server.service import Service
from keural.serve.server.tools.reading import Event, MadeCall, Reading, Spoken, new_id, reading_of
from keural.tokenizer import KeuralTokenizer

CHUNK = "chat.completion.chunk"
DONE = b"data: [DONE]\n\n"


class ChatWriter:
    """Writes chat completions; `places` where there may be calls of tools in them."""

    def __init__(self, service: Service, logprobs: bool, with_usage: bool, n: int, places: Places) -> None:
        self._tokenizer, self._logprobs, self._with_usage = service.tokenizer, logprobs, with_usage
        self._places = places
        self._readings = [Reading(places) for _ in range(n)]
        self._calls_begun = [0] * n
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self._said = [TextEvent(functools.partial(self._said_chunk, index)) for index in range(n)]

    def begin(self, _: Usage) -> list[bytes]:
        """One chunk for each choice, with its role."""
        content = None if self._places else ""
        return [self._chunk(index, {"role": "assistant", "content": content}) for index in range(len(self._readings))]

    def part(self, part: Part) -> list[bytes]:
        """Chunks with text and calls; the last of a choice says why it ended, and has neither."""
        reading = self._readings[part.index]
        events = reading.take(part.piece, part.finish is not None)
        chunks = [chunk for event in events for chunk in self._written(part.index, event)]
        if part.finish is not None:
            chunks.append(self._chunk(part.index, {}, {"finish_reason": _finish(part.finish, reading)}))
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
        found = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "object": "chat.completion", "choices": found, "usage": usage_of(usage)}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        reading = reading_of(choice.text, choice.tokens, choice.starts, self._places)
        calls = {"tool_calls": [_call(made) for made in reading.calls]} if reading.calls else {}
        content = reading.said or None if reading.calls else reading.said
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None, **calls},
            "logprobs": self._of_tokens(reading.tokens) if self._logprobs else None,
            "finish_reason": _finish(choice.finish, reading),
        }

    def _written(self, index: int, event: Event) -> list[bytes]:
        """The chunk of an event; the end of a call needs none."""
        if isinstance(event, Spoken):
            if self._logprobs:
                return [self._chunk(index, {"content": event.text}, {"logprobs": self._of_tokens(event.tokens)})]
            return [self._said[index](event.text)]
        if isinstance(event, CallBegun):
            self._calls_begun[index] += 1
            call = _call(MadeCall(event.name))
        elif isinstance(event, Arguments):
            call = {"function": {"arguments": event.text}}
        else:
            return []
        return [self._chunk(index, {"tool_calls": [{"index": self._calls_begun[index] - 1, **call}]})]

    def _said_chunk(self, index: int, text: str) -> bytes:
        return self._chunk(index, {"content": text})

    def _chunk(self, index: int, delta: dict[str, Any], more: Mapping[str, Any] = {}) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        usage = {"usage": None} if self._with_usage else {}
        return event({**self._head, "object": CHUNK, "choices": [choice], **usage})

    def _of_tokens(self, tokens: Sequence[Chosen]) -> dict[str, Any]:
        return {"content": named_logprobs(self._tokenizer, tokens), "refusal": None}


def _call(made: MadeCall) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": {"name": made.name, "arguments": made.arguments}}


def _finish(finish: str | None, reading: Reading) -> str | None:
    """Why a choice ended, as the API calls it."""
    return "tool_calls" if finish == "stop" and reading.calls else finish


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
