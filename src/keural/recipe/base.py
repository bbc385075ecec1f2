"""Strict typed objects, and the one line that says what is wrong with a file.

In: plain data read from a file. Out: a typed object, or a `UserError` that names the file and the worst key.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from keural.errors import UserError, nearest

SpecT = TypeVar("SpecT", bound=BaseModel)


class Spec(BaseModel):
    """Base of all recipe objects: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def validate(kind: type[SpecT], data: dict[str, Any], file: Path) -> SpecT:
    """`data`, read from `file`, as a typed object. Raises `UserError` naming the file and the worst key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        worst = min(
            error.errors(), key=lambda item: item["type"] != "extra_forbidden"
        )  # a misspelt key also shows as a missing one
        raise UserError(f"{file}: {_describe(worst, kind)}") from error


def _describe(error: Any, kind: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(re.sub(r'[.][0-9]+[.]', '.', key), _keys(kind))}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['ctx']['error']}"
    return f"key {key!r}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a spec."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _keys(inner, f"{prefix}{name}.")
    return keys
