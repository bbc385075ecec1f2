"""How `/v1/responses` writes its answers: items, a message or calls of tools.

In: what comes of them. Out: one response, or the events of one. Items stand in the order in which they begin; one ends before
the next begins.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from keural.serve.batching.requests import Chosen
from keural.serve.calls import Arguments, CallBegun, CallEnded, Places
from keural.serve.server.chat_writer import named_logprobs
from keural.serve.server.errors import ApiError
from keural.serve.server.replies import Choice, NumberedTextEvent, Part, Usage, event
from keural.serve.server.service import Service
from keural.serve.server.tools.reading import Event, MadeCall, Reading, new_id, reading_of

IN_PROGRESS = "in_progress"
DELTA = "response.output_text.delta"


class ResponsesWriter:
    """Writes responses; `echo` is what they repeat of the request, `places` whether there may be calls in them."""

    def __init__(self, service: Service, echo: Mapping[str, Any], with_logprobs: bool, places: Places) -> None:
        self._tokenizer, self._with_logprobs, self._places = service.tokenizer, with_logprobs, places
        self._reading = Reading(places)
        self._message_id = new_id("msg")
        self._call_ids: list[tuple[str, str]] = []
        """Of the items, and of the calls that they are."""
        self._message_opened = self._message_ended = False
        self._number = 0
        self._said = NumberedTextEvent(self._said_event)
        """More of the message, where there are no log-probabilities."""
        self._head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
            "error": None,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "background": False,
            "service_tier": "default",
            "truncation": "disabled",
            "user": None,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            **echo,
        }

    def begin(self, _: Usage) -> list[bytes]:
        """The response, still empty; where there can be no calls, its one message."""
        empty = {
            **self._head, "status": IN_PROGRESS, "incomplete_details": None, "completed_at": None, "output": [], "usage": None,
        }  # fmt: skip
        events = [self._event("response.created", response=empty), self._event("response.in_progress", response=empty)]
        return events if self._places else events + self._open_message()

    def part(self, part: Part) -> list[bytes]:
        """More of its items."""
        return [written for found in self._reading.take(part.piece, part.finish is not None) for written in self._written(found)]

    def end(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """What has not ended, and the whole response."""
        whole = self.whole(choices, usage)
        events = []
        if whole["output"][0]["type"] == "message":
            events += [] if self._message_opened else self._open_message()
            events += self._end_message(whole["output"][0]["status"])
        if self._reading.calls and not self._reading.calls[-1].whole:
            events += self._end_call()
        return [*events, self._event(f"response.{whole['status']}", response=whole)]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error as an event."""
        return [self._event("error", code=error.code, message=error.message, param=error.param)]

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The response."""
        choice = choices[0]
        reading = reading_of(choice.text, choice.tokens, choice.starts, self._places)
        status = "completed" if choice.finish == "stop" else "incomplete"
        output = [self._call(number, made) for number, made in enumerate(reading.calls)]
        if reading.said or not output:
            ended = "completed" if output else status
            output.insert(0, self._message(ended, [self._content(reading.said, reading.tokens)]))
        return {
            **self._head,
            "status": status,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()) if status == "completed" else None,
            "output": output,
            "usage": _usage(usage),
        }

    def _written(self, found: Event) -> list[bytes]:
        """The events of the API for one of an answer."""
        if isinstance(found, CallBegun):
            ended = self._end_message("completed") if self._message_opened else []
            item = self._call(len(self._call_ids), MadeCall(found.name)) | {"status": IN_PROGRESS}
            return [*ended, self._event("response.output_item.added", output_index=self._place(), item=item)]
        if isinstance(found, Arguments):
            return [
                self._event(
                    "response.function_call_arguments.delta",
                    item_id=self._call_ids[-1][0], output_index=self._place(), delta=found.text,
                )
            ]  # fmt: skip
        if isinstance(found, CallEnded):
            return self._end_call()
        opened = [] if self._message_opened else self._open_message()
        if self._with_logprobs:
            logprobs = named_logprobs(self._tokenizer, found.tokens)
            return [*opened, self._in_message(DELTA, delta=found.text, logprobs=logprobs)]
        return [*opened, self._said(self._next_number(), found.text)]

    def _said_event(self, number: int, text: str) -> bytes:
        fields = {"item_id": self._message_id, "output_index": 0, "content_index": 0, "delta": text, "logprobs": []}
        return _numbered(number, DELTA, fields)

    def _place(self) -> int:
        """Where in the output the call stands that has begun last."""
        return len(self._call_ids) - 1 + self._message_opened

    def _open_message(self) -> list[bytes]:
        self._message_opened = True
        item = self._message(IN_PROGRESS, [])
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._in_message("response.content_part.added", part=self._content("", ())),
        ]

    def _end_message(self, status: str) -> list[bytes]:
        """The end of the message, once; it has been opened."""
        if self._message_ended:
            return []
        self._message_ended = True
        content = self._content(self._reading.said, self._reading.tokens)
        return [
            self._in_message("response.output_text.done", text=content["text"], logprobs=content["logprobs"]),
            self._in_message("response.content_part.done", part=content),
            self._event("response.output_item.done", output_index=0, item=self._message(status, [content])),
        ]

    def _end_call(self) -> list[bytes]:
        """The end of the call that has begun last."""
        number = len(self._call_ids) - 1
        item = self._call(number, self._reading.calls[number])
        return [
            self._event(
                "response.function_call_arguments.done",
                item_id=item["id"], output_index=self._place(), name=item["name"], arguments=item["arguments"],
            ),
            self._event("response.output_item.done", output_index=self._place(), item=item),
        ]  # fmt: skip

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _call(self, number: int, made: MadeCall) -> dict[str, Any]:
        """The item of a call; one that was cut is incomplete."""
        if number == len(self._call_ids):
            self._call_ids.append((new_id("fc"), new_id("call")))
        item_id, call_id = self._call_ids[number]
        return {
            "id": item_id,
            "type": "function_call",
            "call_id": call_id,
            "name": made.name,
            "arguments": made.arguments,
            "status": "completed" if made.whole else "incomplete",
        }

    def _content(self, text: str, tokens: Sequence[Chosen]) -> dict[str, Any]:
        logprobs = named_logprobs(self._tokenizer, tokens) if self._with_logprobs else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _in_message(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return _numbered(self._next_number(), kind, fields)

    def _next_number(self) -> int:
        self._number += 1
        return self._number - 1


def _numbered(number: int, kind: str, fields: Mapping[str, Any]) -> bytes:
    """An event, whose place among all of a response is `number`."""
    return event({"type": kind, "sequence_number": number, **fields}, kind)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.answer,
    }
