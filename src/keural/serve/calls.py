"""Calls of tools in an answer: the form that holds a model to them, and how they are read out of its text as it comes.

In: tools with the schemas of their arguments, or the text of an answer. Out: a grammar, or what is said and called, piece by piece.
The text is the one that training writes (`keural.tokenizer.message`): what is said, then each call between its tags, a JSON
object on one line. The grammar allows nothing else, so a call that has ended follows its tool's schema. It is written in what
llguidance and xgrammar read alike, for engines that run elsewhere follow it with either, and again as xgrammar's structural tag.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from keural.serve.constrain import OPTIONS, SEPARATORS
from keural.serve.stops import StopStrings
from keural.tokenizer.message import CALL, CALLED

MOST_CALLS = 16
"""In one answer: a model that may go on calling can do so without end."""
TAIL = f"}}\n{CALLED}"
"""What follows the arguments of a call. They have no line end, so it ends them wherever it stands."""
_BEGUN = [CALL[:length] for length in range(1, len(CALL))]
_ELSE = "|".join(f"{begun}[^{CALL[len(begun)]}{CALL[0]}]" for begun in _BEGUN)
UNCALLED = f"(?:[^{CALL[0]}]|(?:{'|'.join(_BEGUN)})*(?:{_ELSE}))*(?:{'|'.join(_BEGUN)})*"
"""An expression of text without `CALL`: what begins it is followed by something else, or begins it anew, or ends the text.
No engine's expressions can say `not` alike; that only the first letter of `CALL` is that letter makes this one so simple."""
_HEAD = re.compile(r'\n\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
_OPEN_TO_MORE = frozenset(
    {"additionalProperties", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "patternProperties",
     "propertyNames", "unevaluatedProperties", "minProperties", "dependentSchemas", "dependentRequired", "dependencies"}
)  # fmt: skip
"""Keys by which an object may need properties that `properties` does not name."""

Mode = Literal["none", "auto", "required"]
"""Whether an answer may not call, may, or does nothing else."""

Places = Literal["", "anywhere", "first"]
"""Where calls may be in an answer: nowhere, behind what is said, or instead of it, which then may spell anything."""


@dataclass(frozen=True)
class CallForm:
    """What an answer may call: the schemas of arguments by the names of tools, each an object's."""

    mode: Mode
    schemas: Mapping[str, Mapping[str, Any]]
    parallel: bool = True
    """Whether there may be several calls."""
    said: Mapping[str, Any] | None = None
    """The schema of an answer that may call and does not; None for any text, which calls may follow."""

    def grammar(self) -> str:
        """The form in Lark."""
        if self.mode == "none" or not self.schemas:
            return f"start: SAID\nSAID: /{UNCALLED}/\n"
        more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if self.parallel else ""
        names = [f"tool_{number}" for number in range(len(self.schemas))]
        rules = [f'call: "{CALL}" rest', f"rest: {' | '.join(names)}"]
        if self.mode == "required":
            rules.insert(0, f"start: call{more}")
        elif self.said is not None:
            rules[:0] = [f"start: said | call{more}", f"said: %json {_quoted({**self.said, OPTIONS: SEPARATORS})}"]
        else:
            rules.insert(0, f"start: SAID | first rest{more}")
            rules += [f"SAID: /{UNCALLED}/", f'first[lazy]: ANYTHING "{CALL}"', "ANYTHING: /(\\n|.)*/"]
        for rule, (name, schema) in zip(names, self.schemas.items(), strict=True):
            rules.append(f"{rule}: {_quoted(_head(name))} {rule}_arguments {_quoted(TAIL)}")
            rules.append(f"{rule}_arguments: %json {_quoted(arguments_schema(schema))}")
        return "\n".join(rules) + "\n"

    def structural_tag(self) -> dict[str, Any]:
        """The same form as a structural tag."""
        said: dict[str, Any] = {"type": "any_text", "excludes": [CALL]}
        if self.mode == "none" or not self.schemas:
            return {"type": "structural_tag", "format": said}
        call: dict[str, Any] = {"type": "or", "elements": [_tag(name, schema) for name, schema in self.schemas.items()]}
        another = {"type": "sequence", "elements": [{"type": "const_string", "value": "\n"}, call]}
        more = [{"type": "repeat", "min": 0, "max": MOST_CALLS - 1, "content": another}] if self.parallel else []
        if self.mode == "required":
            return {"type": "structural_tag", "format": {"type": "sequence", "elements": [call, *more]}}
        if self.said is not None:
            said = {"type": "json_schema", "json_schema": self.said}
        before = [] if self.said is not None else [said]
        either = [said, {"type": "sequence", "elements": [*before, call, *more]}]
        return {"type": "structural_tag", "format": {"type": "or", "elements": either}}


def _head(name: str) -> str:
    """What stands between the tag of a call and its arguments."""
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


def _tag(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A call of one tool in a structural tag, which knows nothing of llguidance's options."""
    arguments = {key: value for key, value in arguments_schema(schema).items() if key != OPTIONS}
    return {"type": "tag", "begin": CALL + _head(name), "content": {"type": "json_schema", "json_schema": arguments}, "end": TAIL}


def _quoted(value: Any) -> str:
    """JSON in a grammar. Readers take one that has `::=` anywhere, in a text too, for another language."""
    return json.dumps(value).replace("::=", "\\u003a:=")


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A stricter schema of arguments: JSON on one line, with the properties that are named and no others, where that is left open.

    What follows it follows `schema`, too.
    """
    return {"type": "object", **_closed(schema), OPTIONS: SEPARATORS}


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

    def __init__(self, places: Places = "anywhere") -> None:
        self._held = ""
        self._state: Literal["begin", "plain", "said", "head", "arguments", "tail"] = "begin" if places == "first" else "said"
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
        if self._state not in ("begin", "said"):
            return []
        said = held.rstrip("\n") if self._called else held
        return [Said(said)] if said else []

    def _advance(self, events: list[CallEvent]) -> bool:
        """Read on to the next state; False when there is not enough for it."""
        steps = {
            "begin": self._begin, "plain": self._plain, "said": self._said,
            "head": self._head, "arguments": self._arguments, "tail": self._tail,
        }  # fmt: skip
        return steps[self._state](events)

    def _begin(self, _: list[CallEvent]) -> bool:
        calls = begins_with_call(self._held)
        if calls is not None:
            self._state = "said" if calls else "plain"
        return calls is not None

    def _plain(self, events: list[CallEvent]) -> bool:
        if self._held:
            events.append(Said(self._held))
        self._held = ""
        return False

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

    def __init__(self, stops: Sequence[str], places: Places = "anywhere") -> None:
        """`stops` are not empty."""
        super().__init__(stops)
        self._text = ""
        self._calling = False
        self._calls: bool | None = None if places == "first" else True

    def push(self, piece: str) -> str:
        """See `StopStrings.push`."""
        self._text += piece
        self._calls = begins_with_call(self._text) if self._calls is None else self._calls
        if not self._calls:
            return "" if self._calls is None else super().push(self._taken())
        shown, going_on = "", True
        while going_on and self.found is None:
            more, going_on = self._call() if self._calling else self._said()
            shown += more
        return shown

    def flush(self) -> str:
        """See `StopStrings.flush`."""
        text = self._taken()
        return super().push(text) + super().flush() if not self._calling else text

    def _taken(self) -> str:
        text, self._text = self._text, ""
        return text

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


def begins_with_call(text: str) -> bool | None:
    """Whether an answer that begins so begins with a call; None where that cannot be said yet."""
    if len(text) < len(CALL) and CALL.startswith(text):
        return None
    return text.startswith(CALL)


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with, the whole of it aside."""
    return next((length for length in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:length])), 0)
