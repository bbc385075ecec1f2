"""Strict typed objects, and the one line that says what is wrong with a file.

In: plain data read from a file. Out: a typed object, or a `UserError` that names the file and the worst key.
"""

import re
from pathlib import Path
from typing import Any, Self, TypeVar

from annotated_types import Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from keural.errors import UserError, nearest, quoted

SpecT = TypeVar("SpecT", bound=BaseModel)

LARGEST = 10**9
"""Upper bound of every whole number in a recipe whose field states no other."""
LARGEST_FLOAT = 1e38
"""Upper bound of every other number: float32 knows hardly larger ones."""
BOUNDED = "bounded"
"""Annotation of a field whose own validator states a bound."""


class Spec(BaseModel):
    """Base of all recipe objects: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            stated = any(limit == BOUNDED or isinstance(limit, Le | Lt) for limit in field.metadata)
            most = LARGEST if isinstance(value, int) else LARGEST_FLOAT
            if isinstance(value, int | float) and not stated and abs(value) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {quoted(value)}")
        return self


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
