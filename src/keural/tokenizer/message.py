"""Turns of a conversation, and how tools, calls of tools and reasoning are written in them.

In: tool definitions, calls and reasoning as data. Out: text of a turn; and from a generated answer, these again.

The convention, which the chat template beside this file follows, too (its tags are those that servers recognise as Hermes'):

* tool definitions stand in the system turn after what it says, one JSON object a line between `<tools>` and `</tools>`;
* an assistant's calls stand after what it says, each as `{"name": .., "arguments": {..}}` between `<tool_call>` and `</tool_call>`;
  they are trained like the rest of the turn;
* each result is a turn of the role `tool`, never trained;
* reasoning stands before what the assistant says, between `<think>` and `</think>`, trained or not.

The tags are plain text for the tokenizer: a turn ends at its marker alone, so no result and no question can end or open one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
TOOLS_BEFORE = "# Tools\n\nYou can call these functions:\n<tools>\n"
TOOLS_AFTER = (
    "</tools>\n\nA call is a JSON object with the name and the arguments of a function, each in tags of its own:\n"
    '<tool_call>\n{"name": "function", "arguments": {"parameter": "value"}}\n</tool_call>'
)
_DECODER = json.JSONDecoder()


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    trained: bool | None = None
    """Whether content and end marker are trained; None: as usual, those of an assistant's turn are."""
    reasoning: str = ""
    """What an assistant thought before it spoke; of no meaning in other turns."""
    reasoning_trained: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether content and end marker are trained."""
        return self.role == "assistant" if self.trained is None else self.trained

    @property
    def text(self) -> str:
        """Everything between the turn's markers but the role."""
        return thought(self.reasoning) + self.content if self._thinks else self.content

    @property
    def _thinks(self) -> bool:
        return self.role == "assistant" and bool(self.reasoning)

    def parts(self) -> tuple[tuple[str, bool], ...]:
        """The turn's text in the parts that are encoded by themselves, each with whether it is trained."""
        trained = self.is_trained
        if not self._thinks:
            return ((self.content, trained),)
        return ((thought(self.reasoning), trained and self.reasoning_trained), (self.content, trained))


class ToolCall(NamedTuple):
    """A call of a function; arguments that are JSON text already stay as they are written."""

    name: str
    arguments: Mapping[str, Any] | str


class ParsedAnswer(NamedTuple):
    """What an assistant generated, taken apart."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""


def thought(reasoning: str) -> str:
    """Reasoning as it stands before an answer."""
    return f"{THINK}\n{reasoning}\n{THOUGHT}\n\n"


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with tool definitions in their system turn, which is made where there is none.

    A definition is `{name, description, parameters}`, or that under the key `function`, as chat interfaces have it.
    """
    if not tools:
        return list(messages)
    lines = "".join(f"{_json(tool.get('function', tool))}\n" for tool in tools)
    block = f"{TOOLS_BEFORE}{lines}{TOOLS_AFTER}"
    if messages and messages[0].role == "system":
        first = messages[0]
        return [first._replace(content=f"{first.content}\n\n{block}" if first.content else block), *messages[1:]]
    return [Message("system", block), *messages]


def with_calls(content: str, calls: Sequence[ToolCall]) -> str:
    """The content of an assistant's turn that says `content`, if anything, and then calls tools."""
    return "\n".join([*([content] if content else []), *map(_call, calls)])


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning that an answer begins with, and what follows it; one that does not end is all reasoning."""
    if not text.startswith(THINK):
        return "", text
    reasoning, _, rest = text.removeprefix(THINK).partition(THOUGHT)
    return reasoning.strip("\n"), rest.lstrip("\n")


def parse_answer(text: str) -> ParsedAnswer:
    """Take a generated answer apart: what `with_calls` and `thought` put together, and what a model writes that is near it.

    Nothing is lost: a call that is not whole, or not JSON with a name, stays in the content.
    """
    reasoning, rest = split_reasoning(text)
    said, calls, start = [], [], 0
    while (place := rest.find(CALL, start)) >= 0:
        found = _read_call(rest, place + len(CALL))
        said.append(rest[start : place if found else place + len(CALL)])
        start = place + len(CALL)
        if found:
            calls.append(found[0])
            start = found[1]
    said.append(rest[start:])
    return ParsedAnswer("".join(said).rstrip("\n") if calls else rest, tuple(calls), reasoning)


def _read_call(text: str, start: int) -> tuple[ToolCall, int] | None:
    """The call that begins here, and where it ends with its tag."""
    try:
        value, end = _DECODER.raw_decode(text, start + _blank(text, start))
    except ValueError:
        return None
    end += _blank(text, end)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not text.startswith(CALLED, end):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], arguments), end + len(CALLED)


def _blank(text: str, start: int) -> int:
    """How much white space is here."""
    return len(text) - start - len(text[start:].lstrip())


def _call(call: ToolCall) -> str:
    arguments = call.arguments if isinstance(call.arguments, str) and call.arguments else _json(call.arguments or {})
    return f'{CALL}\n{{"name": {_json(call.name)}, "arguments": {arguments}}}\n{CALLED}'


def _json(value: Any) -> str:
    """As the chat template writes JSON."""
    return json.dumps(value, ensure_ascii=False)
