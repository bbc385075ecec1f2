"""JSON and YAML of strangers as plain values: a file that is meant to hurt is refused as any other bad one.

In: text. Out: lists, dicts, strings, numbers; or `Malformed`, which says what is wrong and where. Nesting has a limit (the parsers
recurse, and so does whoever walks the value), aliases of YAML may not unfold to far more than what was written, and no tag runs
anything.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import yaml
from yaml.composer import Composer, ComposerError
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.resolver import Resolver

from keural.errors import quoted

MAX_DEPTH = 100
"""Lists and objects inside each other; files of this package have fewer than ten."""
FREE_VALUES = 10_000
"""So many values may a YAML file's aliases unfold to, and beyond that ten times the values that are written in it."""


class Malformed(ValueError):
    """Text that is not what it should be; `line` counts from 1, where it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.line = line


class Unreadable:
    """Stands in a row for a value that cannot be, e.g. the date 9999-99-99."""


UNREADABLE = Unreadable()


def parse_json(text: str | bytes, *, depth: int = MAX_DEPTH, parts: int | None = None, unique: bool = False) -> Any:
    """The value of JSON text (bytes: UTF-8), with lists and objects inside each other down to `depth`. Raises `Malformed`.

    With `parts` there are at most so many lists, objects and keys in it: to check each of them, or say what is wrong with it,
    takes a hundred times longer than the parser. With `unique` an object in which a key is given twice is refused.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text  # json guesses, and takes halves of surrogate pairs
        value = json.loads(text, object_pairs_hook=_unique(parts) if unique else None)
    except Malformed:
        raise
    except json.JSONDecodeError as error:
        raise Malformed(error.msg, error.lineno) from error
    except UnicodeDecodeError as error:
        raise Malformed(f"not {error.encoding.upper()} at byte {error.start:,}") from error
    except RecursionError as error:
        raise Malformed(f"nested deeper than {depth} levels") from error
    except ValueError as error:  # a number with too many digits
        raise Malformed("a number has too many digits") from error
    _check_size(value, depth, parts)
    return value


def json_beginning(text: str) -> tuple[list[Any], str | None]:
    """The whole items of the list that JSON text, cut off somewhere, begins with; and the key that the list has in an object.

    There are none where it begins with something else.
    """
    decode = json.JSONDecoder().raw_decode
    place, key, items = _past_blanks(text, 0), None, []
    with contextlib.suppress(ValueError, RecursionError, IndexError):  # where it is cut, or no JSON at all
        while text[place] == "{":
            key, place = decode(text, _past_blanks(text, place + 1))
            place = _past_blanks(text, _past_blanks(text, place) + 1)  # the colon
            if text[place] not in "[{":
                _, place = decode(text, place)
                place = _past_blanks(text, place)
                if text[place] != ",":
                    return [], None
                text, place = "{" + text[place + 1 :], 0
        if text[place] != "[":
            return [], None
        place += 1
        while True:
            item, place = decode(text, _past_blanks(text, place))
            items.append(item)
            place = _past_blanks(text, place)
            if text[place] != ",":
                break
            place += 1
    return items, key


def _past_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n\ufeff":
        place += 1
    return place


def _unique(most: int | None) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes objects in which no key is given twice: readers differ in which one they take. Of objects and keys at most so many."""
    count = 0

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal count
        count += 1 + len(pairs)
        if most is not None and count > most:
            raise _too_many(most)
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise Malformed(f"key {quoted(key)} is given twice")
            found[key] = value
        return found

    return build


def _too_many(parts: int) -> Malformed:
    return Malformed(f"more than {parts:,} lists, objects and keys")


def parse_yaml(text: str) -> Any:
    """The value of a YAML 1.1 document, in which `1e-4` is a number and a key given twice is an error. Raises `Malformed`."""
    return _load(text, _StrictLoader)[0]


def parse_yaml_rows(text: str) -> tuple[Any, bool]:
    """The value of a YAML document with data, and whether parts of it are `UNREADABLE`. Raises `Malformed`."""
    value, loader = _load(text, _RowLoader)
    return value, isinstance(loader, _RowLoader) and loader.failed


def holds_unreadable(value: Any) -> bool:
    """Whether some part of a value could not be read."""
    return any(isinstance(part, Unreadable) for part, _ in _parts(value))


def _parts(value: Any) -> Any:
    """Every value inside `value`, itself included, with its depth; without recursion."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        yield part, depth
        if isinstance(part, dict):
            waiting.extend((inner, depth + 1) for inner in part.values())
        elif isinstance(part, list):
            waiting.extend((inner, depth + 1) for inner in part)


def _check_size(value: Any, depth: int, parts: int | None) -> None:
    level, count = [value] if isinstance(value, dict | list) else [], 0
    for _ in range(depth):
        if not level:
            return
        count += len(level) + sum(len(part) for part in level if isinstance(part, dict))
        if parts is not None and count > parts:
            raise _too_many(parts)
        level = [
            inner
            for part in level
            for inner in (part.values() if isinstance(part, dict) else part)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise Malformed(f"nested deeper than {depth} levels")


_MERGE = "tag:yaml.org,2002:merge"
_IMPOSSIBLE = (ConstructorError, ValueError, OverflowError, AttributeError, LookupError, TypeError)
"""What PyYAML raises of a scalar that is not what its form or tag says: a date, a number, `!!bool maybe`."""

_Parser: Any = yaml.CSafeLoader.__bases__[0] if yaml.__with_libyaml__ else None
if _Parser is None:

    class _PlainParser(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser):
        def __init__(self, stream: str) -> None:
            yaml.reader.Reader.__init__(self, stream)
            yaml.scanner.Scanner.__init__(self)
            yaml.parser.Parser.__init__(self)

    _Parser = _PlainParser


class _Loader(Composer, _Parser, SafeConstructor, Resolver):
    """Events from libyaml, nodes from Python, where depth and size can be watched: libyaml's own recursion ends in a crash."""

    def __init__(self, text: str) -> None:
        _Parser.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = self._written = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; refused where it is too deep, or where aliases have made it too large."""
        event = self.peek_event()
        mark: Any = event.start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise ComposerError(None, None, "an alias stands inside what it stands for", mark)
            return node
        self._written += 1
        size = self._sizes[id(node)] = 1 + self._size_inside(node)
        if size > FREE_VALUES + 10 * self._written:
            raise ComposerError(None, None, f"its aliases unfold to {size:,} values", mark)
        return node

    def _size_inside(self, node: Any) -> int:
        if isinstance(node, yaml.SequenceNode):
            return sum(self._sizes[id(item)] for item in node.value)
        if isinstance(node, yaml.MappingNode):
            return sum(self._sizes[id(key)] + self._sizes[id(value)] for key, value in node.value)
        return 0


class _StrictLoader(_Loader):
    """For recipes."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; an error names its line."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except _IMPOSSIBLE as error:
            raise ConstructorError(None, None, f"{quoted(node.value)} cannot be read", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, unless a key is given twice."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise ConstructorError(None, None, f"key {quoted(key)} is given twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return dict(super().construct_mapping(node, deep))


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _RowLoader(_Loader):
    """For data: what cannot be is marked in its row and does not end the file."""

    failed = False

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; `UNREADABLE` where a scalar has none."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            return super().construct_object(node, deep)
        except _IMPOSSIBLE:
            self.failed = True
            self.recursive_objects.pop(node, None)
            return UNREADABLE

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; what stands twice under one name with two values is `UNREADABLE`."""
        written = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE)
        twice = [name for name, count in written.items() if count > 1 and self._differ(node, name)]
        value = dict(super().construct_mapping(node, deep))
        if twice:
            self.failed = True
            value |= {key: UNREADABLE for key in value if str(key) in twice}
        return value

    @staticmethod
    def _differ(node: yaml.MappingNode, name: str) -> bool:
        first, *others = (value for key, value in node.value if key.value == name)
        same = (
            isinstance(first, yaml.ScalarNode) and isinstance(other, yaml.ScalarNode) and first.value == other.value
            for other in others
        )
        return not all(same)


def _load(text: str, kind: type[_Loader]) -> tuple[Any, _Loader]:
    try:
        loader = kind(text)
        return loader.get_single_data(), loader
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        raise Malformed(
            " ".join(part for part in (error.context, error.problem) if part), mark.line + 1 if mark else None
        ) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise Malformed(str(error)) from error
    except RecursionError as error:
        raise Malformed(f"nested deeper than {MAX_DEPTH} levels") from error
    except _IMPOSSIBLE as error:
        raise Malformed(f"a value cannot be read ({error})") from error
