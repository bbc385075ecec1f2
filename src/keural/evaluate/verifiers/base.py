"""What every instruction has: a kind, arguments, and a check; and how an answer is judged strictly and loosely.

In: rows of a benchmark, which name kinds and arguments; an answer. Out: instructions that are possible, or `UserError`; verdicts.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keural.errors import UserError, nearest, quoted

Check = Callable[..., bool]
"""Takes the answer and the arguments by name; whether the answer follows the instruction."""
Registry = Mapping[str, Check]
"""Kinds of instructions by name."""
RELATIONS = ("less than", "at least", "at most", "exactly")


@dataclass(frozen=True)
class Instruction:
    """One instruction of an item."""

    kind: str
    arguments: Mapping[str, Any]


class Verdicts(NamedTuple):
    """Of each instruction, whether it is followed: by the answer as it is, and by some form of it that forgives decoration."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]

    @property
    def all_strict(self) -> bool:
        """Whether every instruction is followed strictly."""
        return all(self.strict)

    @property
    def all_loose(self) -> bool:
        """Whether every instruction is followed loosely."""
        return all(self.loose)


def verdicts(registry: Registry, instructions: Sequence[Instruction], answer: str) -> Verdicts:
    """Judge an answer by IFEval's two rules (Zhou et al. 2023, section 2.3); an empty answer follows nothing."""
    checks = [(registry[instruction.kind], instruction.arguments) for instruction in instructions]
    strict = tuple(_follows(check, arguments, answer) for check, arguments in checks)
    forms = list(dict.fromkeys(loose_forms(answer)))
    loose = tuple(
        followed or any(_follows(check, arguments, form) for form in forms)
        for followed, (check, arguments) in zip(strict, checks, strict=True)
    )
    return Verdicts(strict, loose)


def loose_forms(answer: str) -> Iterator[str]:
    """The answer with and without its first line, its last line and its asterisks: what an introduction or bold would hide."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    for part in parts:
        yield part
        yield part.replace("*", "")


def _follows(check: Check, arguments: Mapping[str, Any], answer: str) -> bool:
    return bool(answer.strip()) and check(answer, **arguments)


def parse_instructions(
    registry: Registry, kinds: Sequence[str], arguments: Sequence[Mapping[str, Any] | None], where: str
) -> tuple[Instruction, ...]:
    """The instructions of a row; a language before the kind (`en:startend:quotation`) is left out, and so are empty arguments.

    Raises:
        UserError: naming `where`, for a kind that is unknown, or arguments that are missing, too many or of the wrong type.
    """
    if len(kinds) != len(arguments):
        raise UserError(f"{where}: {len(kinds)} instructions with {len(arguments)} sets of arguments; each needs its own")
    return tuple(_parse(registry, kind, given or {}, where) for kind, given in zip(kinds, arguments, strict=True))


def _parse(registry: Registry, kind: str, given: Mapping[str, Any], where: str) -> Instruction:
    name = kind if kind in registry else kind.partition(":")[2]
    if name not in registry:
        raise UserError(f"{where}: unknown instruction {quoted(kind)}{nearest(kind, registry)}")
    wanted = _parameters(registry[name])
    found = {key: value for key, value in given.items() if value is not None}
    for key in sorted(found.keys() ^ wanted.keys()):
        what = "lacks" if key in wanted else "has no argument"
        raise UserError(f"{where}: instruction {name} {what} {key!r}; it takes {', '.join(wanted) or 'none'}")
    return Instruction(name, {key: _typed(found[key], kind_of, f"{where}: {name}.{key}") for key, kind_of in wanted.items()})


@functools.cache
def _parameters(check: Check) -> dict[str, Any]:
    """Arguments of a check, by name, with their types; the answer is its first parameter."""
    parameters = list(inspect.signature(check).parameters.values())[1:]
    return {parameter.name: parameter.annotation for parameter in parameters}


def _typed(value: Any, kind: Any, where: str) -> Any:
    """An argument in its type; whole numbers may come as floats, as tables with gaps have them."""
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) and value >= 0:
        return int(value)
    if kind is str and isinstance(value, str) and value.strip():
        if where.endswith("relation") and value not in RELATIONS:
            raise UserError(f"{where}: {quoted(value)}; use one of {', '.join(RELATIONS)}")
        return value
    if kind not in (bool, int, str):
        items = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(items, list | tuple) and items and all(isinstance(item, str) and item.strip() for item in items):
            return tuple(items)
    what = {bool: "true or false", int: "a whole number", str: "a text"}.get(kind, "a list of texts")
    raise UserError(f"{where}: {quoted(value)} is not {what}")


def compare(count: int, relation: str, wanted: int) -> bool:
    """Whether a count has the relation to what is wanted."""
    return {
        "less than": count < wanted,
        "at least": count >= wanted,
        "at most": count <= wanted,
        "exactly": count == wanted,
    }[relation]
