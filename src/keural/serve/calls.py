"""Calls of tools in an answer: the form that holds a model to them, and how they are read out of its text as it comes.

In: tools with the schemas of their arguments, or the text of an answer. Out: a grammar, or what is said and called, piece by piece.
The text is the one that training writes (`keural.tokenizer.message`): what is said, then each call between its tags, a JSON
object on one line. The grammar allows nothing else, so a call that has ended follows its tool's schema.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from keural.serve.constrain import SEPARATORS
from keural.serve.stops import StopStrings
from keural.tokenizer.message import CALL, CALLED

MOST_CALLS = 16
"""In one answer: a model that may go on calling can do so without end."""
TAIL = f"}}\n{CALLED}"
"""What follows the arguments of a call. They have no line end, so it ends them wherever it stands."""
_HEAD = re.compile(r'\n\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
_OPEN_TO_MORE = frozenset(
    {"additionalProperties", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "patternProperties",
     "propertyNames", "unevaluatedProperties", "minProperties", "dependentSchemas", "dependentRequired", "dependencies"}
)  # fmt: skip
"""Keys by which an object may need properties that `properties` does not name."""

Mode = Literal["none", "auto", "required"]
"""Whether an answer may not call, may, or does nothing else."""


@dataclass(frozen=True)
class CallForm:
    """What an answer may call: the schemas of arguments by the names of tools, each an object's."""

    mode: Mode
    schemas: Mapping[str, Mapping[str, Any]]
    parallel: bool = True
    """Whether there may be several calls."""

    def grammar(self) -> str:
        """The form in llguidance's Lark."""
        said = f"SAID: /(?s:.*)/ & ~/(?s:.*){CALL}(?s:.*)/"  # the first part is what the second is the rest of: whole characters
        if self.mode == "none" or not self.schemas:
            return f"start: SAID\n{said}\n"
        more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if self.parallel else ""
        names = [f"tool_{number}" for number in range(len(self.schemas))]
        rules = [f'call: "{CALL}" rest', f"rest: {' | '.join(names)}"]
        if self.mode == "required":
            rules.insert(0, f"start: call{more}")
        else:
            rules.insert(0, f"start: SAID | first rest{more}")
            rules += [said, f'first[lazy]: ANYTHING "{CALL}"', "ANYTHING: /(?s:.*)/"]
        for rule, (name, schema) in zip(names, self.schemas.items(), strict=True):
            head = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
            rules.append(f"{rule}: {head} {rule}_arguments {json.dumps(TAIL)}")
            rules.append(f"{rule}_arguments: %json {json.dumps(arguments_schema(schema))}")
        return "\n".join(rules) + "\n"


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A stricter schema of arguments: JSON on one line, with the properties that are named and no others, where that is left open.

    What follows it follows `schema`, too.
    """
    return {"type": "object", **_closed(schema), "x-guidance": SEPARATORS}


def _closed(schema: Any) -> Any:
    """The schema with no other properties than those that it names, where nothing in it could ask for others."""
    if not isinstance(schema, Mapping) or "properties" not in schema or schema.keys() & (_OPEN_TO_MORE - {"additionalProperties"}):
        return schema
    named = schema["properties"]
    required = schema.get("required", [])
    if not isinstance(named, Mapping) or not isinstance(required, list) or not all(name in named for name in required):
        return schema
    inner = {name: _closed_item(value) for name, value in named.items()}
    return {"additionalProperties": False, **schema, "properties": inner}


def _closed_item(schema: Any) -> Any:
    if isinstance(schema, Mapping) and schema.get("type") == "array" and "items" in schema and not schema.keys() & _OPEN_TO_MORE:
        return {**schema, "items": _closed_item(schema["items"])}
    return _closed(schema)


class Said(NamedTuple):
    """More of what is said."""

    text: str


class CallBegun(NamedTuple):
    """A call of a tool."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON of the call that has begun last."""

    text: str


class CallEnded(NamedTuple):
    """The arguments of that call are whole."""


CallEvent = Said | CallBegun | Arguments | CallEnded


class CallReader:
    """Takes an answer apart while it comes. How it was cut into pieces does not matter."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["said", "head", "arguments", "tail"] = "said"
        self._called = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, piece: str) -> list[CallEvent]:
        """What the text up to here has that was not given yet. Line ends before a call, and what may become one, are held back."""
        self._held += piece
        events: list[CallEvent] = []
        while self._advance(events):
            pass
        return events

    def flush(self) -> list[CallEvent]:
        """What was held back, at the end of the text; after a call, line ends are no content."""
        held, self._held = self._held, ""
        if self._state != "said":
            return []
        said = held.rstrip("\n") if self._called else held
        return [Said(said)] if said else []

    def _advance(self, events: list[CallEvent]) -> bool:
        """Read on to the next state; False when there is not enough for it."""
        return {"said": self._said, "head": self._head, "arguments": self._arguments, "tail": self._tail}[self._state](events)

    def _said(self, events: list[CallEvent]) -> bool:
        place = self._held.find(CALL)
        shown = self._held[:place] if place >= 0 else self._held[: len(self._held) - overlap(self._held, CALL)]
        shown = shown.rstrip("\n")
        if shown:
            events.append(Said(shown))
        if place < 0:
            self._held = self._held[len(shown) :]
            return False
        self._held, self._state, self._called = self._held[place + len(CALL) :], "head", True
        return True

    def _head(self, events: list[CallEvent]) -> bool:
        head = _HEAD.match(self._held)
        if head is None:
            return False
        events.append(CallBegun(json.loads(head[1])))
        self._held, self._state = self._held[head.end() :], "arguments"
        self._depth, self._in_string, self._escaped = 0, False, False
        return True

    def _arguments(self, events: list[CallEvent]) -> bool:
        end = next((place + 1 for place, letter in enumerate(self._held) if self._closes(letter)), None)
        text, self._held = self._held[:end], "" if end is None else self._held[end:]
        if text:
            events.append(Arguments(text))
        if end is None:
            return False
        events.append(CallEnded())
        self._state = "tail"
        return True

    def _closes(self, letter: str) -> bool:
        """Whether this letter ends the JSON object."""
        if self._in_string:
            self._in_string = letter != '"' or self._escaped
            self._escaped = letter == "\\" and not self._escaped
            return False
        self._in_string = letter == '"'
        self._depth += (letter in "{[") - (letter in "}]")
        return self._depth == 0 and letter == "}"

    def _tail(self, _: list[CallEvent]) -> bool:
        if len(self._held) < len(TAIL):
            return False
        self._held, self._state = self._held[len(TAIL) :], "said"
        return True


class StopsBesideCalls(StopStrings):
    """Stop strings in what an answer says; the calls beside it, and the line ends before them, are never cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty."""
        super().__init__(stops)
        self._text = ""
        self._calling = False

    def push(self, piece: str) -> str:
        """See `StopStrings.push`."""
        self._text += piece
        shown, going_on = "", True
        while going_on and self.found is None:
            more, going_on = self._call() if self._calling else self._said()
            shown += more
        return shown

    def flush(self) -> str:
        """See `StopStrings.flush`."""
        text, self._text = self._text, ""
        return super().push(text) + super().flush() if not self._calling else text

    def _said(self) -> tuple[str, bool]:
        """What may be shown of what is said, and whether a call follows."""
        place = self._text.find(CALL)
        end = len(self._text[: place if place >= 0 else len(self._text) - overlap(self._text, CALL)].rstrip("\n"))
        shown = super().push(self._text[:end])
        self._text = self._text[end:]
        if place >= 0 and self.found is None:
            self._calling = True
            shown += super().flush()
        return shown, self._calling

    def _call(self) -> tuple[str, bool]:
        """What there is of a call, and whether it has ended."""
        place = self._text.find(TAIL)
        self._calling = place < 0
        end = len(self._text) - overlap(self._text, TAIL) if self._calling else place + len(TAIL)
        shown, self._text = self._text[:end], self._text[end:]
        return shown, not self._calling


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with, the whole of it aside."""
    return next((length for length in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:length])), 0)
