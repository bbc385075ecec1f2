"""Strict typed objects, what of them determines a result, and the one line that says what is wrong with a file.

In: plain data read from a file. Out: a typed object, or a `UserError` that names the file and the worst key; of a typed object the
settings that determine a result, for its fingerprint.

Whether a key changes a result is said where the key is. A plain field changes every result that is made with it. `neutral` marks
a key that changes none, `not_for` one that does not change the results of some parts. Fingerprints follow from these marks
(`Spec.determining`); nobody keeps a list.

A value that is the key's default is left out of what determines a result, so a key that a later version adds, whose default is what
was done before, makes no finished work stale. Hence: **whoever changes the default of a key raises `VERSION`**.
"""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from annotated_types import Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from keural.errors import UserError, nearest, quoted
from keural.limits import LARGEST, LARGEST_FLOAT

SpecT = TypeVar("SpecT", bound=BaseModel)

BOUNDED = "bounded"
"""Annotation of a field whose own validator states a bound."""
VERSION = 1
"""Part of every fingerprint. Raised when the default of a key changes, for defaults are not in fingerprints themselves."""

Part = Literal["tokenizer", "cleaning", "data", "weights", "evaluation"]
"""What a run makes, each with a fingerprint of its own: the trained tokenizer, cleaned documents, token stores, a stage's weights,
the evaluation.
"""
Purpose = Literal["work", "check", "keeping", "report", "place"]
"""Why a key changes no result.

work: how the work is cut or where it is done; the results are the same numbers, summed in another order at most. check: refuses or
warns. keeping: what is saved and measured on the way. report: what is shown. place: where something lies; its content is in the
fingerprint.
"""


def neutral(purpose: Purpose, default: Any = PydanticUndefined, **constraints: Any) -> Any:
    """A field whose key changes no result: finished work stays finished and interrupted work resumes with any value.

    `constraints` are those of pydantic's `Field`; the mark is `json_schema_extra`: `changes_result` False and the `purpose`.
    """
    return Field(default, json_schema_extra={"changes_result": False, "purpose": purpose}, **constraints)


def not_for(parts: tuple[Part, ...], default: Any = PydanticUndefined, **constraints: Any) -> Any:
    """A field whose key changes results, but not those of `parts`; otherwise as `neutral`, the mark is `not_for`."""
    return Field(default, json_schema_extra={"changes_result": True, "not_for": list(parts)}, **constraints)


def length(default: Any = PydanticUndefined, **constraints: Any) -> Any:
    """A field that says how long a stage is, and nothing else of it: a stage that is longer begins as a shorter one does."""
    return Field(default, json_schema_extra={"changes_result": True, "length": True}, **constraints)


def length_list() -> Any:
    """A list, empty as a rule, that is part of how long a stage is (`length`)."""
    return Field(default_factory=list, json_schema_extra={"changes_result": True, "length": True})


def length_of(spec: "Spec") -> dict[str, Any]:
    """The values of the keys that say how long a stage is."""
    return {name: getattr(spec, name) for name, field in type(spec).model_fields.items() if mark_of(field).get("length")}


def mark_of(field: FieldInfo) -> dict[str, Any]:
    """What a field's key is marked with: `changes_result`, and `purpose`, `not_for` or `length`; a plain one changes results."""
    extra = field.json_schema_extra
    return {"changes_result": True} | (extra if isinstance(extra, dict) else {})


class Spec(BaseModel):
    """Base of all recipe objects: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, data: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(data, dict) else ():
            value = data.get(name)
            stated = any(limit == BOUNDED or isinstance(limit, Le | Lt) for limit in field.metadata)
            most = LARGEST_FLOAT if float in (field.annotation, *get_args(field.annotation)) else LARGEST
            if isinstance(value, int | float) and not stated and abs(value) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {quoted(value)}")
        return data

    def determining(self, part: Part, length: bool = True) -> dict[str, Any]:
        """The settings that determine the result of `part`, as plain data: marked keys and values that are defaults left out.

        Without `length` those are left out, too, that say how long a stage is.
        """
        found = {}
        for name, field in type(self).model_fields.items():
            mark = mark_of(field)
            if not mark["changes_result"] or part in mark.get("not_for", ()) or (mark.get("length") and not length):
                continue
            value = _determining(getattr(self, name), part, length)
            if field.is_required() or value != _determining(field.get_default(call_default_factory=True), part, length):
                found[name] = value
        return found


def _determining(value: Any, part: Part, length: bool) -> Any:
    """A value as plain data, specs inside it by what of them determines the result."""
    if isinstance(value, Spec):
        return value.determining(part, length)
    if isinstance(value, list | tuple):
        return [_determining(item, part, length) for item in value]
    return value


def validate(kind: type[SpecT], data: dict[str, Any], file: Path) -> SpecT:
    """`data`, read from `file`, as a typed object. Raises `UserError` naming the file and the worst key."""
    _check_plain(data, file)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        worst = min(
            error.errors(), key=lambda item: item["type"] != "extra_forbidden"
        )  # a misspelt key also shows as a missing one
        raise UserError(f"{file}: {_describe(worst, kind)}") from error


def _check_plain(data: dict[str, Any], file: Path) -> None:
    """Refuse what no setting can be: keys that are no text, text that is no Unicode or holds NUL, numbers beyond 64 bits."""
    waiting: list[tuple[str, Any]] = [("", data)]
    while waiting:
        key, value = waiting.pop()
        where = f"{file}: key {quoted(key.removeprefix('.'))}"
        if isinstance(value, dict):
            if odd := [name for name in value if not isinstance(name, str)]:
                raise UserError(f"{file}: {quoted(odd[0])} is no key{f' of {quoted(key[1:])}' if key else ''}; write it in quotes")
            waiting.extend((f"{key}.{name}", inner) for name, inner in value.items())
            waiting.extend((key, name) for name in value)
        elif isinstance(value, list):
            waiting.extend((f"{key}.{number}", inner) for number, inner in enumerate(value))
        elif isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
            raise UserError(f"{where}: {quoted(value)} holds a NUL character or bytes that are no UTF-8")
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            raise UserError(f"{where}: {quoted(value)} is too large")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _describe(error: Any, kind: type[BaseModel]) -> str:
    key = ".".join(quoted(part)[1:-1] if isinstance(part, str) else str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(re.sub(r'[.][0-9]+[.]', '.', key), _keys(kind))}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['ctx']['error']}"
    return f"key {key!r}: {error['msg'][0].lower()}{error['msg'][1:]}, got {quoted(error['input'])}"


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a spec."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _keys(inner, f"{prefix}{name}.")
    return keys
