"""Turns of a conversation as rows hold them: roles, content, tools and their calls, reasoning, and what is trained.

In: a list of turns (also as JSON text, as an array, or as an object of lists, as columns have it) and the options of a source. Out:
`Message`s, put in order as the options say. Every field that carries meaning is read, or the row is dropped with a reason, or its
source refused: `FLAGS` say what is trained, a `label` whether an answer is good, `TOOLS` are definitions, `CALLS` and `REASONING`
are parts of an assistant's turn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from keural.data.adapters.base import (
    ASSISTANT_FIRST,
    CUT,
    SYSTEM_INSIDE,
    BadRow,
    Reads,
    Undeclared,
    conversation,
    holds,
    leaves_items,
    lookup,
    placeholder_free,
    plain,
    says_nothing,
    scalar,
    text_of,
    trimmed,
    with_system,
)
from keural.data.adapters.judgements import label_key, said
from keural.data.readers.options import LIST, MAP, NAME, TEXT, Option, OptionTable
from keural.data.records import Conversation, Drop, labelled
from keural.recipe import SourceSpec
from keural.tokenizer.message import CALLED, Message, ToolCall, parse_answer, split_reasoning, with_calls, with_tools

TOOL_CALL = "tool_call"
"""Role of a turn that is nothing but calls, as JSON text; it becomes part of the assistant's turn."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": TOOL_CALL,
    TOOL_CALL: TOOL_CALL,
}
"""Names of roles in public sets."""
IN_ORDER = "in_order"
"""Value of option `roles`: who speaks first is the user, the other the assistant."""
_NO_SPEAKERS = ("system", "tool", TOOL_CALL)
"""Roles that are no side of a conversation, in whatever order it is."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
FLAGS = {
    "train": True,
    "trainable": True,
    "trained": True,
    "weight": True,
    "loss": True,
    "loss_weight": True,
    "loss_mask": True,
    "masked": False,
}
"""Fields of a turn or a row that say what is trained, and which value says that it is."""
TOOLS = ("tools", "functions")
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
AMBIGUOUS = "mask"
"""Such a field, of which 1 means trained in some sets and hidden in others; option `flags` says which."""
LABELS = ("label", "kto_tag")
"""Fields of a row that say whether its answer is good."""
_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Fields of a call of which one holds its arguments."""
_ROUND = ("system", "user", "assistant")
"""Roles of a round in the order in which they speak."""
_SPANS = "train_detail"
_CALL_ID, _NAME = "tool_call_id", "name"
_CHANNEL, _FINAL = "channel", "final"
"""Field of a turn that says for whom an answer is, and its value for what the user sees."""
_SPECIAL = frozenset((*FLAGS, *CALLS, *REASONING, _SPANS, _CALL_ID, _CHANNEL))
YES, NO = ("true", "1", "1.0"), ("false", "0", "0.0")
GOOD = ("+", "👍", "thumbs_up", "thumbs up", "thumbsup", "up", "good", "positive", "desirable", "chosen")
"""Words for a good answer, where a field is known to judge it."""
BAD = ("-", "👎", "thumbs_down", "thumbs down", "thumbsdown", "down", "bad", "negative", "undesirable", "rejected")
_TEXT_PARTS = ("text", "input_text", "output_text")
MEANS_SOMETHING_ELSE = "where the field means something else, name it in the option ignore"

REASONING_LEFT_OUT, GREETING_LEFT_OUT, QUESTION_TRAINED = "reasoning_left_out", "greeting_left_out", "question_trained"
INPUT_LEFT_OUT = "input_left_out"
ITEMS_LEFT_OUT = "other_items_left_out"
"""Notes of kept conversations."""

ROW_OPTIONS: OptionTable = {
    "system": Option(NAME, "field of the row with a system text, which is put before the turns", "system"),
    "tools": Option(NAME, "field of the row with the tool definitions", TOOLS),
    "label": Option(
        NAME,
        "field of the row that says whether its answer is good: true or 1; rows of false or 0 are dropped (but not as labelled "
        "answers); where it is not given, "
        "a label of true or false says so, too, and one of 1 or 0 refuses rows that hold turns, until it is declared",
        LABELS,
    ),
    "labels": Option(
        MAP, "what each value of the label means: true for a good answer, false for a bad one; any other value refuses the source"
    ),
    "reasoning": Option(
        TEXT,
        "what becomes of an answer's reasoning: left out, kept without being trained, or trained; where it is not given, a field "
        "of reasoning is left out and <think> in a text is text",
        choices=("drop", "keep", "train"),
    ),
    "flags": Option(MAP, "fields that say what is trained: true where a true value means trained, false where it means hidden"),
    "ignore": Option(LIST, "fields of rows or turns that mean something else here than they do elsewhere, and are not read"),
}
"""Options of every adapter of conversations."""
TURN_OPTIONS: OptionTable = {
    **ROW_OPTIONS,
    "role": Option(NAME, "field of a turn with its role", ROLE_KEYS),
    "content": Option(NAME, "field of a turn with its text", CONTENT_KEYS),
    "roles": Option(
        (dict, str),
        "what names of roles stand for (system, user, assistant, tool, tool_call), beside the usual names; in_order: who speaks "
        "first is the user, the other the assistant (system turns and tools aside)",
    ),
    "assistant_first": Option(
        TEXT,
        "where the assistant speaks first: the row is dropped, or what it says before the user is cut or kept",
        "drop",
        ("drop", "cut", "keep"),
    ),
    "system_inside": Option(
        TEXT,
        "where a system turn stands after others: the row is dropped, or the turn is merged with the user's beside it or kept",
        "drop",
        ("drop", "merge", "keep"),
    ),
    "consecutive": Option(
        TEXT, "where one side has several turns in a row: the row is dropped, or they are merged", "drop", ("drop", "merge")
    ),
}
"""Options of adapters whose rows hold turns."""


def check_row_options(source: SourceSpec) -> str | None:
    """What is wrong with the options `flags` and `labels`."""
    labels = source.options.get("labels", {})
    if wrong := [value for value, good in labels.items() if not isinstance(good, bool)]:
        return f"option 'labels': {wrong[0]!r} must be true (a good answer) or false (a bad one)"
    return (check_label_is_read(source) if _declares(source.options) else None) or check_flags(source)


def check_label_is_read(source: SourceSpec) -> str | None:
    """What is wrong with the options of a source whose rows have a label: a field cannot be that label and mean something else."""
    name = str(source.options.get("label", LABELS[0]))
    if name not in _ignored(source.options):
        return None
    return (
        f"option 'ignore' names {name!r}, the field that says which answers are good; name another field in option 'label', or use "
        "an adapter that reads none (prompt_completion)"
    )


def check_flags(source: SourceSpec) -> str | None:
    """What is wrong with the option `flags`."""
    flags = source.options.get("flags", {})
    if wrong := next((name for name, value in flags.items() if not isinstance(value, bool)), None):
        return f"option 'flags': {wrong!r} must be true (a true field is trained) or false (a true field is not)"
    return None


def check_turns(source: SourceSpec) -> str | None:
    """What is wrong with the options `flags`, `labels` and `roles`."""
    return check_row_options(source) or check_roles(source)


def check_roles(source: SourceSpec) -> str | None:
    """What is wrong with the option `roles`."""
    roles = source.options.get("roles", {})
    if isinstance(roles, str):
        return None if roles == IN_ORDER else f"option 'roles' must be a map of names or {IN_ORDER}, got {roles!r}"
    targets = ("system", "user", "assistant", "tool", TOOL_CALL)
    if wrong := next((role for role in roles.values() if role not in targets), None):
        return f"option 'roles': {wrong!r} is no role; there are {', '.join(targets)}"
    return None


def reads(source: SourceSpec, keys: Sequence[Any], turns: Sequence[str | int] = (), optional: Sequence[str] = ()) -> Reads:
    """What an adapter of conversations reads: `keys` are names of fields or lists of them; `turns` those that hold turns."""
    options = source.options
    named = [name for key in keys for name in (key if isinstance(key, list) else [key])]
    named += [options.get("system", "system"), *_flags(options), *_ignored(options)]
    named += [options.get("label", LABELS[0])] if _declares(options) else LABELS if source.as_labels else []
    named += [options["tools"]] if "tools" in options else TOOLS
    role, content = (
        [options[option]] if option in options else list(names)
        for option, names in (("role", ROLE_KEYS), ("content", CONTENT_KEYS))
    )
    special = _SPECIAL | _flags(options).keys() | (set(LABELS) if source.as_labels else set())
    return Reads(
        frozenset(part for name in (*named, *turns) for part in (str(name), str(name).split(".")[0])),
        tuple(turns),
        special | {str(name).split(".")[0] for name in (*role, *content, *_ignored(options))},
        booleans=frozenset(LABELS),
        optional=("system", "tools", "label", "flags", "ignore", *optional),
    )


def _flags(options: Mapping[str, Any]) -> dict[str, bool | None]:
    """Fields that say what is trained, and which value says that it is; None: nobody knows."""
    return {AMBIGUOUS: None, **FLAGS, **{str(name): value for name, value in options.get("flags", {}).items()}}


def _declares(options: Mapping[str, Any]) -> bool:
    """Whether a recipe says that a field of the rows says whether an answer is good."""
    return "label" in options or any(isinstance(good, bool) for good in options.get("labels", {}).values())


def _ignored(options: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in options.get("ignore", ())]


def listing(value: Any) -> Any:
    """A list that comes as an array, as JSON text, or as an object of equally long lists; anything else as it is."""
    value = plain(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and value:
        columns = {key: plain(column) for key, column in value.items()}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) == 1 and -1 not in lengths:
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return value


def one_of(value: Any, names: Sequence[str | int]) -> Any:
    """The one of some fields that is there; None where none is. Raises `BadRow` where two say different things."""
    first = None
    for name in names:
        each = lookup(value, name)
        if each is None:
            continue
        if first is None:
            first = each
        elif each != first:
            raise BadRow("fields_differ", ", ".join(str(name) for name in names if lookup(value, name) is not None))
    return first


class _Settings:
    """What the options of a source say of its turns: made once for all of its rows."""

    def __init__(self, source: SourceSpec) -> None:
        self.source, self.options = source, source.options

    @cached_property
    def ignore(self) -> frozenset[str]:
        return frozenset(_ignored(self.options))

    @cached_property
    def flags(self) -> dict[str, bool | None]:
        return _flags(self.options)

    @cached_property
    def meanings(self) -> dict[str | None, bool]:
        """What values of a label mean, where a recipe says whether they are of a good answer."""
        given = self.options.get("labels", {})
        return {label_key(value): good for value, good in given.items() if isinstance(good, bool)}

    @cached_property
    def declared(self) -> bool:
        """Whether a recipe or an adapter says which field is a label of good and bad answers."""
        return _declares(self.options)

    @cached_property
    def paths(self) -> list[str]:
        """Flags inside an object: `meta.train`."""
        return [name for name in map(str, self.options.get("flags", ())) if "." in name]

    @cached_property
    def special(self) -> frozenset[str]:
        return (_SPECIAL | self.flags.keys() | set(LABELS)) - self.ignore | (
            frozenset(CONTENT_KEYS) if "reasoning" in self.options or self.paths else frozenset()
        )

    @cached_property
    def roles(self) -> Mapping[str, str]:
        given = self.options.get("roles")
        return ROLES | {str(name).strip().lower(): role for name, role in given.items()} if isinstance(given, dict) else ROLES


_MADE: dict[int, _Settings] = {}
"""Settings by the identity of their source, which they keep alive."""


def _settings_of(source: SourceSpec) -> _Settings:
    """The settings of a source, made at its first row."""
    made = _MADE.get(id(source))
    if made is None or made.source is not source:
        if len(_MADE) > 100:
            _MADE.clear()
        made = _MADE[id(source)] = _Settings(source)
    return made


@dataclass
class TurnReader:
    """Reads one row of a source of conversations."""

    source: SourceSpec
    where: str
    has_turns: bool = True
    """Whether rows hold turns; of those a label of 1 or 0 is likely one of good and bad answers, elsewhere one of anything."""
    notes: list[str] = field(default_factory=list)
    """What the record will not have of the row, or is unusual in it."""
    said: str = ""
    """What the row's label says, where it has one."""
    good: bool | None = None
    """Whether the row's label says that its answer is good, of a source that is taken as labelled answers."""
    _answer: dict[str, Any] | None = None
    """The last turn as the row has it, where that is an answer."""
    _speakers: dict[str, str] = field(default_factory=dict)
    _call_ids: list[str] | None = None
    """Calls that wait for a result; None where they have no ids."""
    _call_names: list[str] = field(default_factory=list)
    """What the calls that wait for a result call."""

    _settings: _Settings = field(init=False)

    def __post_init__(self) -> None:
        self._settings = _settings_of(self.source)

    @property
    def options(self) -> Mapping[str, Any]:
        """The source's options."""
        return self.source.options

    @property
    def _label_names(self) -> Sequence[Any]:
        """Fields that may say whether an answer is good."""
        return [self.options.get("label", LABELS[0])] if self._settings.declared else LABELS

    @property
    def _judges_turns(self) -> bool:
        """Whether a label of the last turn is that of the labelled answer which the row becomes."""
        return self.source.as_labels and self.has_turns

    def check_row(self, row: Any, used: Sequence[Any] = ()) -> None:
        """Raise `BadRow` for a row that says that it is not to be learned. `used` are fields that are read as something else."""
        if not isinstance(row, dict):
            return
        names = {str(name) for each in used for name in (each if isinstance(each, list) else [each])}
        if self._flag(row, names) is False:
            raise BadRow("not_trained")
        declared = self._settings.declared
        if not declared and row.keys().isdisjoint(LABELS):
            return
        for label in self._label_names:
            if str(label) in names | self._settings.ignore:
                continue
            good = self.label(lookup(row, label), label)
            if good is None and declared and not self.source.as_labels:  # its answer may have it
                raise BadRow("missing_label")
            self.judge(good, label, lookup(row, label))

    def judge(self, good: bool | None, label: str | int, value: Any) -> None:
        """Take note of what a label says of the row's answer. Raises `BadRow` for a bad one, unless labels are wanted."""
        if good is None:
            return
        if self.source.as_labels:
            if self.good is not None and self.good != good:
                raise BadRow("fields_differ", f"{self.said}, {said(label, value)}")
            self.good = good
        elif not good:
            raise BadRow("label_false")
        self.said = said(label, value)

    def label(self, value: Any, name: str | int, required: bool = False) -> bool | None:
        """Whether a row's answer is good, where its label says so: true or false, also as text. Where a recipe or an adapter says
        that the field is such a label, 1 and 0 mean the same, so do the words of `GOOD` and `BAD`, and other values refuse the
        source; 1 and 0 do where nobody says so.
        """
        declared = required or self._settings.declared or self.source.as_labels
        if "labels" in self.options and (known := self._settings.meanings.get(label_key(value))) is not None:
            return known
        if isinstance(value, bool) or value is None:
            return value
        if value != value:  # NaN is how a table says null
            return None
        text = str(value).strip().lower()
        if text in ("true", "false"):
            return text == "true"
        if declared and text in (*GOOD, *BAD):
            return text in GOOD
        if text in (*YES, *NO):
            if not declared and not self.has_turns:
                return None
            if not declared:
                how = f"options: {{label: {name}}} reads 1 as a good and 0 as a bad answer"
                raise Undeclared(name, value, f"{how}; {MEANS_SOMETHING_ELSE}")
            return text in YES
        if declared and text:
            raise Undeclared(
                name, value, "options: {labels: {VALUES}} says what each means: true for a good answer, false for a bad one"
            )
        return None

    def check_items(self, row: Any, names: Sequence[Any]) -> None:
        """Note a row of which a field takes one item of several."""
        if any(leaves_items(row, name) for each in names for name in (each if isinstance(each, list) else [each])):
            self.notes.append(ITEMS_LEFT_OUT)

    def optional_input(self, text: str) -> str:
        """The text of an input beside the question; empty where it says that there is none, which is noted where it may be one."""
        if says_nothing(text):
            self.notes.append(INPUT_LEFT_OUT)
        return trimmed(placeholder_free(text))

    def _flag(self, value: dict[str, Any], used: set[str] | frozenset[str] = frozenset()) -> bool | None:
        """What a turn or row says of itself: trained, not trained, or nothing."""
        known = self._settings.flags
        said = {
            name: _flag_value(name, value[name], known[name]) for name in known.keys() & value.keys() - self._settings.ignore - used
        }
        for name in self._settings.paths:
            said[name] = _flag_value(name, lookup(value, name), known[name])
        flags = {flag for flag in said.values() if flag is not None}
        if len(flags) > 1:
            raise BadRow("fields_differ", ", ".join(sorted(name for name, flag in said.items() if flag is not None)))
        return flags.pop() if flags else None

    def turns(self, value: Any) -> list[Message]:
        """The turns of a list of them, each as the row has it; calls that are turns of their own become part of the assistant's."""
        found = listing(value)
        if not isinstance(found, list):
            raise BadRow("missing_messages") if found is None else BadRow("malformed_row", f"turns are a {type(found).__name__}")
        turns: list[Message] = []
        for item in self._spoken(found):
            turn = self.turn(item)
            if turn.role == TOOL_CALL:
                turn = turn._replace(role="assistant")
                if turns and turns[-1].role == "assistant":
                    turn = _joined(turns.pop(), turn)
            turns.append(turn)
        return turns

    def _spoken(self, items: Sequence[Any]) -> Iterator[Any]:
        """The items of a list of turns, each round as its turns: who asks before who answers, in whatever order the names stand,
        which programs that write JSON or Parquet may sort.
        """
        for item in items:
            if is_round(item, self.source):
                roles = {name: self._settings.roles[name.strip().lower()] for name in item}
                known = set(roles.values()) <= set(_ROUND)
                names = [name for role in _ROUND for name in item if roles[name] == role] if known else list(item)
                yield from ({ROLE_KEYS[0]: name, CONTENT_KEYS[0]: item[name]} for name in names if item[name] is not None)
            else:
                yield item

    def turn(self, item: Any) -> Message:
        """A turn from `{role, content}` or `{from, value}`, or the fields that options name."""
        if isinstance(item, str):
            item = listing(item)
        if not isinstance(item, dict):
            raise BadRow("malformed_row", f"a turn is a {type(item).__name__}")
        options = self.options
        role = self._role(item)
        found = lookup(item, options["content"]) if "content" in options else one_of(item, CONTENT_KEYS)
        parts = self._without_nulls(found)
        self._check_parts(parts)
        text = _content(parts, role)
        if role == TOOL_CALL:
            text = with_calls("", [self._call(call) for call in _calls_in(text)])
        turn = Message(role, trimmed(text))
        self._answer = item if role == "assistant" else None
        return self.with_extras(turn, item) if role == "tool" or item.keys() & self._settings.special else turn

    def _check_parts(self, parts: Any) -> None:
        """Raise `BadRow` where a part of a turn says whether it is trained: that is said of whole turns."""
        for part in parts if isinstance(parts, list) else ():
            named = part.keys() & (self._settings.flags.keys() - self._settings.ignore) if isinstance(part, dict) else ()
            if said := sorted(name for name in named if holds(part[name])):
                raise BadRow("trained_spans", f"{said[0]} of a part")

    def _role(self, item: dict[str, Any]) -> str:
        options = self.options
        keys = (options["role"],) if "role" in options else ROLE_KEYS
        names = [name.strip() for key in keys if (name := scalar(lookup(item, key))) is not None]
        if options.get("roles") == IN_ORDER and names and ROLES.get(names[0].lower()) not in _NO_SPEAKERS:
            if names[0] not in self._speakers and len(self._speakers) == 2:
                raise BadRow("more_than_two_speakers")
            return self._speakers.setdefault(names[0], ("user", "assistant")[min(len(self._speakers), 1)])
        roles = {self._settings.roles.get(name.lower(), "") for name in names}
        if not names or "" in roles:
            raise BadRow("unknown_role", f"{next((n for n in names if n.lower() not in self._settings.roles), 'none')!r:.40}")
        if len(roles) > 1:
            raise BadRow("fields_differ", ", ".join(map(str, keys)))
        return roles.pop()

    def with_extras(self, turn: Message, item: dict[str, Any]) -> Message:
        """The turn with the calls and the reasoning of the object that it is from, and with what that says of training."""
        if _SPANS in item and _SPANS not in self._settings.ignore and holds(item[_SPANS]):
            raise BadRow("trained_spans")
        channel = item.get(_CHANNEL)
        if turn.role == "assistant" and _CHANNEL not in self._settings.ignore and holds(channel) and channel != _FINAL:
            raise BadRow("other_channel", f"{channel!r:.40}")
        calls = self._calls(item)
        if calls and turn.role != "assistant":
            raise BadRow("malformed_tool_call", f"by a {turn.role}")
        if calls:
            turn = turn._replace(content=with_calls(turn.content, calls))
        if turn.role == "tool":
            self._check_result(scalar(item.get(_CALL_ID)), scalar(item.get(_NAME)))
        trained = False if self._is_bad(item) and turn.role == "assistant" else self._flag(item)
        if trained and turn.role not in ("assistant", TOOL_CALL):
            self.notes.append(QUESTION_TRAINED)
        return self.reasoned(turn._replace(trained=trained), item)

    def _is_bad(self, item: dict[str, Any]) -> bool:
        """Whether a turn says of itself that it is no good answer; a label of another type than true or false means anything."""
        if self._judges_turns:
            return False  # such an answer is wanted
        labels = (item.get(name) for name in LABELS if name not in self._settings.ignore)
        return any(str(label).strip().lower() == "false" for label in labels)

    def _calls(self, item: dict[str, Any]) -> list[ToolCall]:
        found = [(name, item[name]) for name in CALLS if name not in self._settings.ignore and holds(item.get(name))]
        if len(found) > 1:
            raise BadRow("fields_differ", ", ".join(CALLS))
        if not found:
            return []
        value = listing(found[0][1])
        listed = value if isinstance(value, list) else [value]
        ids = [scalar(lookup(listing(call), "id")) for call in listed]
        self._call_ids = [call_id for call_id in ids if call_id] if all(ids) else None
        calls = [self._call(listing(call)) for call in listed]
        self._call_names = [call.name for call in calls]
        return calls

    def _call(self, value: Any) -> ToolCall:
        """A call from `{name, arguments}` or that under `function`; arguments may be JSON text, or called parameters."""
        called = value.get("function", value) if isinstance(value, dict) else None
        name, arguments = lookup(called, "name"), one_of(called, _ARGUMENTS) if isinstance(called, dict) else None
        if not isinstance(name, str) or not name or lookup(value, "type") not in (None, "function"):
            raise BadRow("malformed_tool_call", "it has no name of a function")
        if isinstance(arguments, str):
            if not arguments.strip() or isinstance(_from_json(arguments), dict):
                return ToolCall(name, arguments.strip())
            raise BadRow("malformed_tool_call", "its arguments are no JSON object")
        if arguments is not None and not isinstance(arguments, dict):
            raise BadRow("malformed_tool_call", f"its arguments are a {type(arguments).__name__}")
        return ToolCall(name, self._without_nulls(arguments or {}))

    def _check_result(self, call_id: str | None, name: str | None) -> None:
        """Results must be of the calls before them, and in their order: the rendered turn does not say which call it answers.

        Where ids do not say which, the name of the function may.
        """
        waiting, self._call_names = self._call_names, self._call_names[1:]
        if call_id is None or self._call_ids is None:
            if name is not None and name in waiting[1:] and name != waiting[0]:
                raise BadRow("tool_results_out_of_order")
        elif call_id not in self._call_ids:
            raise BadRow("tool_result_without_call", "another call's id")
        elif call_id != self._call_ids.pop(0):
            raise BadRow("tool_results_out_of_order")

    def _without_nulls(self, value: Any) -> Any:
        """Objects without the keys that only other rows have."""
        if self.source.hub is None and ".parquet" not in self.where:  # there, an object has a null for every key that others have
            return value
        value = plain(value)
        if isinstance(value, dict):
            return {key: self._without_nulls(item) for key, item in value.items() if item is not None}
        return [self._without_nulls(item) for item in value] if isinstance(value, list) else value

    def reasoned(self, turn: Message, item: Any) -> Message:
        """The turn with the reasoning that stands beside it, or where option `reasoning` is given before it in its text."""
        value = one_of(item, [name for name in REASONING if name not in self._settings.ignore]) if isinstance(item, dict) else None
        if holds(value) and not isinstance(value, str):
            raise BadRow("reasoning_is_not_text", type(value).__name__)
        reasoning, content = trimmed(value or ""), turn.content
        if "reasoning" in self.options and turn.role == "assistant":
            inside, content = split_reasoning(content)
            if reasoning and inside and reasoning != inside:
                raise BadRow("fields_differ", "reasoning, content")
            reasoning, content = reasoning or inside, trimmed(content)
        if not reasoning:
            return turn
        if turn.reasoning and turn.reasoning != reasoning:
            raise BadRow("fields_differ", "reasoning of the row, of its last turn")
        if turn.role != "assistant":
            raise BadRow("reasoning_outside_answer", turn.role)
        policy = self.options.get("reasoning", "drop")
        if policy == "drop":
            self.notes.append(REASONING_LEFT_OUT)
            return turn._replace(content=content)
        return turn._replace(content=content, reasoning=reasoning, reasoning_trained=policy == "train")

    def system(self, row: Any) -> str:
        """The system text beside the turns, where the row has one."""
        name = self.options.get("system", "system")
        return "" if str(name) in self._settings.ignore else trimmed(text_of(row, name, required=False))

    def tools(self, row: Any) -> list[dict[str, Any]]:
        """The tool definitions beside the turns, where the row has them: `{name, ..}`, also under `function`, also as JSON text."""
        names = [self.options["tools"]] if "tools" in self.options else TOOLS
        value = listing(one_of(row, [name for name in names if name not in self._settings.ignore]))
        if not holds(value) or value == "null" or (isinstance(value, str) and not value.strip()):
            return []
        tools = [listing(tool) for tool in (value if isinstance(value, list) else [value])]
        for tool in tools:
            inner = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                raise BadRow("malformed_tools")
        return [self._without_nulls(tool) for tool in tools]

    def conversation(self, row: Any, turns: Sequence[Message]) -> Conversation | Drop:
        """The conversation of a row's turns, with the system text and the tools beside them, in the order that options allow."""
        self._judge_answer()
        arranged = self._arranged(with_system(self.system(row), turns))
        allowed = {name for name in (ASSISTANT_FIRST, SYSTEM_INSIDE) if self.options.get(name) == "keep"}
        tools = self.tools(row) if isinstance(row, dict) else []
        notes = tuple(dict.fromkeys(self.notes))
        record = conversation(with_tools(arranged, tools), self.where, self.source.language, notes, allowed)
        record = replace(record, label=self.said) if self.said and isinstance(record, Conversation) else record
        return self._labelled(record) if self.source.as_labels and isinstance(record, Conversation) else record

    def _judge_answer(self) -> None:
        """Take note of what the last turn's own label says, where it is an answer and labels are wanted."""
        if not self._judges_turns or self._answer is None:
            return
        for name in self._label_names:
            if str(name) not in self._settings.ignore:
                value = lookup(self._answer, name)
                self.judge(self.label(value, name), name, value)

    def _labelled(self, record: Conversation) -> Conversation:
        """The record as its last answer with the row's label. Raises `BadRow` where the label is of something else than that."""
        if self.good is None:
            raise BadRow("missing_label")
        if CUT in record.notes:
            raise BadRow("ends_with_user")
        if REASONING_LEFT_OUT in self.notes or record.messages[-1].reasoning:
            raise BadRow("has_reasoning")
        return labelled(record, self.good)

    def _arranged(self, turns: list[Message]) -> list[Message]:
        options = self.options
        if options.get("system_inside") == "merge":
            turns = self._system_merged(turns)
        if options.get("consecutive") == "merge":
            turns = _merged(turns)
        if options.get("assistant_first") == "cut":
            head = turns[:1] if turns and turns[0].role == "system" else []
            first = next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns))
            if first > len(head):
                self.notes.append(GREETING_LEFT_OUT)
                return [*head, *turns[first:]]
        return turns

    def _system_merged(self, turns: list[Message]) -> list[Message]:
        """System turns after the first turn as part of the user's turn beside them."""
        merged, waiting = turns[:1], ""
        for turn in turns[1:]:
            if turn.role == "system":
                if merged[-1].role == "user" and not waiting:
                    merged[-1] = merged[-1]._replace(content=_lines(merged[-1].content, turn.content))
                else:
                    waiting = _lines(waiting, turn.content)
            elif waiting and turn.role != "user":
                raise BadRow(SYSTEM_INSIDE)
            else:
                merged.append(turn._replace(content=_lines(waiting, turn.content)) if waiting else turn)
                waiting = ""
        if waiting:
            self.notes.append(CUT)
        return merged


def is_round(item: Any, source: SourceSpec) -> bool:
    """Whether an item of a list of turns is several of them under the names of who speaks: `{human: .., assistant: ..}`."""
    if not isinstance(item, dict) or len(item) < 2 or not source.options.keys().isdisjoint(("role", "content")):
        return False
    roles = _settings_of(source).roles
    speakers = [roles.get(name.strip().lower()) if isinstance(name, str) else None for name in item]
    return None not in speakers and len(set(speakers)) == len(speakers)  # of two names for one side, one is likely no speaker


def message_of(value: Any) -> Message:
    """One turn of a row whose adapter has no options for turns; what it thought drops the row."""
    reader = TurnReader(_BARE, "")
    turn = reader.turn(value)
    if REASONING_LEFT_OUT in reader.notes:
        raise BadRow("has_reasoning")
    return turn


def messages_of(value: Any) -> list[Message]:
    """The turns of a list, as `message_of` reads one."""
    reader = TurnReader(_BARE, "")
    turns = reader.turns(value)
    if REASONING_LEFT_OUT in reader.notes:
        raise BadRow("has_reasoning")
    return turns


_BARE = SourceSpec(name="turns", adapter="messages")


def _flag_value(name: str, value: Any, trained: bool | None) -> bool | None:
    if value is None or value == "":
        return None
    text = str(value).strip().lower()
    if trained is None:
        how = f"options: {{flags: {{{name}: true}}}} where 1 means trained, {{{name}: false}} where it means hidden"
        raise Undeclared(name, value, f"{how}; {MEANS_SOMETHING_ELSE}")
    if text not in (*YES, *NO):
        raise Undeclared(name, value, f"1 or true and 0 or false say what is trained; {MEANS_SOMETHING_ELSE}")
    return (text in YES) == trained


def _content(value: Any, role: str) -> str:
    """The text of a turn's content: text, a number, or parts that are text, joined by line ends; empty where there is none."""
    value = plain(value)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, dict) and role in ("tool", TOOL_CALL):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "\n".join(map(_part, value))
    text = scalar(value)
    if text is None:
        raise BadRow("malformed_row", f"content is a {type(value).__name__}")
    return text


def _part(part: dict[str, Any]) -> str:
    kind, text = part.get("type"), part.get("text")
    if (kind is not None and kind not in _TEXT_PARTS) or not isinstance(text, str):
        raise BadRow("content_not_text", f"{kind!r:.40}")
    return text


def _calls_in(text: str) -> list[Any]:
    """The calls that a turn of calls is: a JSON object or a list of them, or these in the tags of an answer."""
    value = _from_json(text)
    if value is None and (parsed := parse_answer(text.strip())).tool_calls and not parsed.content:
        return [call._asdict() for call in parsed.tool_calls]
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise BadRow("malformed_tool_call", "it is no JSON object")
    return calls


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _joined(first: Message, second: Message) -> Message:
    """Two turns of one side as one."""
    if first.is_trained != second.is_trained:
        raise BadRow("fields_differ", "one turn is trained, one is not")
    content = "\n".join(turn.content for turn in (first, second) if turn.content)
    return first._replace(content=content, trained=first.trained if second.trained is None else second.trained)


def _merged(turns: list[Message]) -> list[Message]:
    """Runs of user or assistant turns as one turn each; what comes after a call stays apart, and so does an empty turn."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if (
            last is not None
            and turn.role == last.role in ("user", "assistant")
            and turn.content
            and last.content
            and not turn.reasoning
            and not last.content.endswith(CALLED)
        ):
            merged[-1] = _joined(last, turn)
        else:
            merged.append(turn)
    return merged
