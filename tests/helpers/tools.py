"""The same question with tools in the shape of each API, and what each answers in one shape."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from keural.tokenizer import ToolCall, with_calls
from tests.helpers.serving import events

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "하늘의 상태",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["서울 </tool_call>", "부산"]}},
        "required": ["city"],
    },
}
AGE: dict[str, Any] = {
    "name": "age",
    "description": "of somebody",
    "parameters": {
        "type": "object",
        "properties": {"who": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
        "required": ["who"],
    },
}
TOOLS = [WEATHER, AGE]
CALLS = with_calls("", [ToolCall("weather", {"city": "서울 </tool_call>"}), ToolCall("age", {"who": "me", "old": True})])
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Found:
    """An answer of any API: `finish` is `stop`, `length` or `calls`."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str = ""


class Api(Protocol):
    """Asks one API."""

    def __call__(self, client: httpx.Client, stream: bool, **asked: Any) -> Found:
        """Ask and read."""

    def send(self, client: httpx.Client, **asked: Any) -> httpx.Response:
        """Only ask."""


class _Asking:
    path = ""

    def body(self, tools: Sequence[Any], choice: str | None, parallel: bool | None, allowed: Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, answer: Any) -> Found:
        raise NotImplementedError

    def streamed(self, parts: Sequence[Any]) -> Found:
        raise NotImplementedError

    def send(
        self, client: httpx.Client, tools: Sequence[Any], choice: str | None = None, parallel: bool | None = None,
        allowed: Sequence[str] = (), **more: Any,
    ) -> httpx.Response:  # fmt: skip
        body = self.body(tools, choice, parallel, allowed)
        return client.post(self.path, json=body | self.named(more))

    def named(self, more: dict[str, Any]) -> dict[str, Any]:
        return more

    def __call__(self, client: httpx.Client, stream: bool, **asked: Any) -> Found:
        response = self.send(client, stream=stream, **asked)
        assert response.status_code == 200, response.text
        if not stream:
            return self.whole(response.json())
        return self.streamed([json.loads(part) for part in events(response.text) if part != "[DONE]"])


FINISH = {"tool_calls": "calls"}


class _Chat(_Asking):
    path = "/v1/chat/completions"

    def body(self, tools: Sequence[Any], choice: str | None, parallel: bool | None, allowed: Sequence[str]) -> dict[str, Any]:
        def named(name: str) -> dict[str, Any]:
            return {"type": "function", "function": {"name": name}}

        tool_choice: Any = choice if choice in (None, "auto", "none", "required") else named(str(choice))
        if allowed:
            inner = {"mode": "required", "tools": [named(name) for name in allowed]}
            tool_choice = {"type": "allowed_tools", "allowed_tools": inner}
        given = [{"type": "function", "function": tool} for tool in tools]
        return {"messages": HELLO, "tools": given, "tool_choice": tool_choice, "parallel_tool_calls": parallel}

    def whole(self, answer: Any) -> Found:
        (choice,) = answer["choices"]
        message, finish = choice["message"], choice["finish_reason"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        assert all(call["type"] == "function" and call["id"] for call in message.get("tool_calls", ()))
        return Found(message["content"] or "", [(call["name"], call["arguments"]) for call in calls], FINISH.get(finish, finish))

    def streamed(self, parts: Sequence[Any]) -> Found:
        found, heads, arguments = Found(), list[Any](), list[str]()
        for choice in (choice for part in parts for choice in part["choices"]):
            found.text += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                if call["index"] == len(heads):  # the first one of a call names it, the others do not
                    assert (call["type"], call["function"]["arguments"]) == ("function", "")
                    heads.append((call["id"], call["function"]["name"]))
                    arguments.append("")
                else:
                    assert call.keys() == {"index", "function"}
                    assert call["function"].keys() == {"arguments"}
                    assert call["function"]["arguments"]
                    assert call["index"] == len(heads) - 1
                arguments[-1] += call["function"]["arguments"]
            finish = choice["finish_reason"]
            found.finish = FINISH.get(finish, finish) or found.finish
        assert len({call_id for call_id, _ in heads}) == len(heads)
        found.calls = [(name, text) for (_, name), text in zip(heads, arguments, strict=True)]
        return found


class _Responses(_Asking):
    path = "/v1/responses"

    def named(self, more: dict[str, Any]) -> dict[str, Any]:
        return {{"max_tokens": "max_output_tokens"}.get(name, name): value for name, value in more.items()}

    def body(self, tools: Sequence[Any], choice: str | None, parallel: bool | None, allowed: Sequence[str]) -> dict[str, Any]:
        def named(name: str) -> dict[str, Any]:
            return {"type": "function", "name": name}

        tool_choice: Any = choice if choice in (None, "auto", "none", "required") else named(str(choice))
        if allowed:
            tool_choice = {"type": "allowed_tools", "mode": "required", "tools": [named(name) for name in allowed]}
        given = [{"type": "function", "strict": None, **tool} for tool in tools]
        return {"input": "hello", "tools": given, "tool_choice": tool_choice, "parallel_tool_calls": parallel}

    def whole(self, answer: Any) -> Found:
        calls = [item for item in answer["output"] if item["type"] == "function_call"]
        said = [item["content"][0]["text"] for item in answer["output"] if item["type"] == "message"]
        finish = "length" if answer["status"] == "incomplete" else "calls" if calls else "stop"
        return Found("".join(said), [(call["name"], call["arguments"]) for call in calls], finish)

    def streamed(self, parts: Sequence[Any]) -> Found:
        assert [part["sequence_number"] for part in parts] == list(range(len(parts)))
        final = parts[-1]["response"]
        for place, item in enumerate(final["output"]):
            mine = [part for part in parts if part.get("output_index") == place]
            kinds = [part["type"] for part in mine]
            assert kinds[0] == "response.output_item.added"
            assert kinds[-1] == "response.output_item.done"
            assert mine[-1]["item"] == item
            assert mine[0]["item"]["id"] == item["id"]
            if item["type"] == "function_call":
                deltas = [part["delta"] for part in mine if part["type"] == "response.function_call_arguments.delta"]
                assert "".join(deltas) == item["arguments"]
                assert kinds[-2] == "response.function_call_arguments.done"
                assert {part.get("item_id", item["id"]) for part in mine} == {item["id"]}
            else:
                deltas = [part["delta"] for part in mine if part["type"] == "response.output_text.delta"]
                assert "".join(deltas) == item["content"][0]["text"]
        order = [part["output_index"] for part in parts if "output_index" in part]
        assert order == sorted(order)
        return self.whole(final)


class _Messages(_Asking):
    path = "/v1/messages"

    def named(self, more: dict[str, Any]) -> dict[str, Any]:
        return {"max_tokens": 300} | {{"stop": "stop_sequences"}.get(name, name): value for name, value in more.items()}

    def body(self, tools: Sequence[Any], choice: str | None, parallel: bool | None, allowed: Sequence[str]) -> dict[str, Any]:
        kinds: dict[Any, Any] = {None: None, "auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}
        tool_choice = kinds.get(choice, {"type": "tool", "name": choice})
        if parallel is not None:
            tool_choice = (tool_choice or {"type": "auto"}) | {"disable_parallel_tool_use": not parallel}
        given = [{"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]} for tool in tools]
        return {"messages": HELLO, "tools": given, "tool_choice": tool_choice}

    def whole(self, answer: Any) -> Found:
        return self.read(answer["content"], answer["stop_reason"])

    def read(self, content: Sequence[Any], reason: str) -> Found:
        finish = {"tool_use": "calls", "max_tokens": "length", "end_turn": "stop", "stop_sequence": "stop"}[reason]
        text = "".join(block["text"] for block in content if block["type"] == "text")
        calls = [block for block in content if block["type"] == "tool_use"]
        as_text = [(call["name"], call.get("partial") or json.dumps(call["input"], ensure_ascii=False)) for call in calls]
        return Found(text, as_text, finish)

    def streamed(self, parts: Sequence[Any]) -> Found:
        blocks, open_block, reason = list[Any](), None, ""
        for part in parts:
            if part["type"] == "content_block_start":
                assert open_block is None
                assert part["index"] == len(blocks)
                open_block = part["index"]
                blocks.append(dict(part["content_block"]))
            elif part["type"] == "content_block_delta":
                assert part["index"] == open_block
                delta, block = part["delta"], blocks[-1]
                if delta["type"] == "text_delta":
                    block["text"] += delta["text"]
                else:
                    assert block["input"] == {}
                    block["partial"] = block.get("partial", "") + delta["partial_json"]
            elif part["type"] == "content_block_stop":
                assert part["index"] == open_block
                open_block = None
            elif part["type"] == "message_delta":
                assert open_block is None
                reason = part["delta"]["stop_reason"]
        return self.read(blocks, reason)


ask_chat, ask_responses, ask_messages = _Chat(), _Responses(), _Messages()
